//! `rebasefs rebase`: the engine without a mount, with qemu-img's options.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::options::{self, Opening, Output, Refused};
use super::{print, size};
use crate::chain::Chain;
use crate::error::{Context, Error, Result};
use crate::file::{Access, CacheMode};
use crate::layer::{Format, Reference};
use crate::rebase::{Copied, Mode, Progress, Rehearsal, Report, Request, rebase, reclaim, rehearse};

/// Give an image another backing file and keep every guest-visible byte
///
/// Old and new backing file are compared, what differs is copied into the image, then the header
/// names the new one. If it is stopped at any moment, the image is whole; start it again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rebasefs rebase -b new.img -F raw cow.qcow2     another backing file
  rebasefs rebase -b \"\" cow.qcow2               no backing file any more (flatten)
  rebasefs rebase -u -b /new/place/base.img -F raw cow.qcow2     the same file has moved")]
pub(super) struct Arguments {
    /// The new backing file, as it is to stand in the header: relative to the image's directory;
    /// "" to have none any more
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,
    /// Format of the new backing file; recognised from the file if left out
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = options::format_name)]
    backing_format: Option<String>,
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", value_parser = Format::from_name)]
    format: Option<Format>,
    /// Unsafe: change the reference only, for a backing file that was moved or renamed
    #[arg(short = 'u', long = "backing-unsafe")]
    is_unsafe: bool,
    /// Cache mode of the image: writeback, writethrough, none, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    cache: CacheMode,
    /// Cache mode of the backing files
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    backing_cache: CacheMode,
    /// Change nothing: say what would be compared and copied
    #[arg(long, conflicts_with = "is_unsafe")]
    dry_run: bool,
    /// Before the header names the new backing file, compare all that the image will read as, from
    /// what is on disk, with what it reads as now
    #[arg(long, conflicts_with = "is_unsafe")]
    verify: bool,
    /// Afterwards, drop what the image holds although the new backing file has the same bytes, and
    /// free its space
    #[arg(long, conflicts_with_all = ["is_unsafe", "dry_run"])]
    reclaim: bool,
    /// How to print what happened
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[arg(short, long, hide = true)]
    compress: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The image to rebase
    image: PathBuf,
}

impl Arguments {
    fn check(&self) -> Result<()> {
        self.refused.check()?;
        if self.compress {
            let error = Error::unsupported("-c is not supported: what is copied is stored as it is");
            return Err(error.hint("compress afterwards with `qemu-img convert -c`"));
        }
        // qemu-img removes the backing file then, silently in unsafe mode.
        if self.backing.is_none() {
            let error = Error::invalid("no backing file given");
            return Err(error.hint("-b FILE for another one, -b \"\" for none"));
        }
        Ok(())
    }

    fn request(&self) -> Request {
        let name = self.backing.clone().filter(|name| !name.is_empty());
        Request {
            backing: name.map(|name| Reference { name, format: self.backing_format.clone() }),
            mode: if self.is_unsafe { Mode::Unsafe } else { Mode::Safe },
            verify: self.verify,
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.check()?;
    if arguments.cache == CacheMode::Unsafe {
        log::warn!("cache mode unsafe: if the machine stops before all is on disk, the image is lost");
    }
    let opener = arguments.opening.opener().caching(arguments.cache, arguments.backing_cache);
    let request = arguments.request();
    let (image, progress) = (&arguments.image, Progress::default());
    let access = if arguments.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let chain = match request.mode {
        Mode::Safe => opener.chain(image, arguments.format, access)?,
        Mode::Unsafe => Chain::new([opener.layer(image, arguments.format, access)?]),
    };
    let work = || match arguments.dry_run {
        true => rehearse(&chain, &opener, &request, &progress),
        false => {
            let (chain, mut report) = rebase(&chain, &opener, &request, &progress)?;
            if arguments.reclaim {
                let reclaimed = reclaim(&chain, &opener, &progress, drop);
                report.reclaimed = reclaimed.doing(|| "reclaiming space after the rebase".to_owned())?;
            }
            Ok(Rehearsal { report, ..Rehearsal::default() })
        }
    };
    let done = match arguments.progress && !arguments.quiet {
        true => shown(&progress, work)?,
        false => work()?,
    };
    if !arguments.quiet && request.mode == Mode::Safe {
        print_result(arguments, &done)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_result(arguments: &Arguments, done: &Rehearsal) -> Result<()> {
    match arguments.output {
        Output::Json => print::print_json(&as_json(arguments, done)),
        Output::Human => {
            let kind = |range: &Copied| if range.is_zero { "zero" } else { "copy" };
            let line = |range: &Copied| format!("{} {:#x} {:#x}\n", kind(range), range.start, range.length);
            print::print(
                &(done.ranges.iter().map(line).collect::<String>() + &summary(arguments, &done.report)),
            )
        }
    }
}

fn as_json(arguments: &Arguments, done: &Rehearsal) -> serde_json::Value {
    let Report { missing, equal, compared, copied, zeroed, reclaimed } = done.report;
    let range =
        |range: &Copied| json!({"start": range.start.0, "length": range.length, "zero": range.is_zero});
    let mut object = json!({
        "filename": arguments.image.to_string_lossy(),
        "dry-run": arguments.dry_run,
        "missing": missing,
        "equal": equal,
        "compared": compared,
        "copied": copied,
        "zeroed": zeroed,
        "reclaimed": reclaimed,
    });
    if arguments.dry_run {
        object["ranges"] = done.ranges.iter().map(range).collect();
    }
    object
}

/// One line on what happened.
fn summary(arguments: &Arguments, report: &Report) -> String {
    let [missing, equal, compared, copied, zeroed] =
        [report.missing, report.equal, report.compared, report.copied, report.zeroed].map(size::text);
    let what = if arguments.dry_run { "Nothing written" } else { "Image rebased" };
    format!(
        "{what}: of {missing} not in the overlay, {equal} were equal by metadata, {compared} compared; \
         {copied} copied, {zeroed} zeroed\n"
    )
}

/// Does the work, with a line that tells how far it has come, in qemu-img's form.
fn shown<T>(progress: &Progress, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let show = |end: &str| {
        // Nothing to do is done.
        let (done, total) = (progress.done(), progress.total());
        let percent = if total == 0 { 0.0 } else { done as f64 * 100.0 / total as f64 };
        print::print(&format!("    ({percent:.2}/100%)\r{end}"))
    };
    let (stop, stopped) = mpsc::channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while stopped
                .recv_timeout(Duration::from_millis(100))
                .is_err_and(|e| e == RecvTimeoutError::Timeout)
            {
                // Progress that cannot be shown stops nothing.
                let _ = show("");
            }
        });
        let result = work();
        drop(stop);
        result
    })?;
    print::print("    (100.00/100%)\r\n")?;
    Ok(result)
}
