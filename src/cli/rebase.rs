//! `rebasefs rebase`: the engine without a mount, with qemu-img's options.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use clap::Args;

use super::options::{Opening, Output, Refused};
use super::stop::{self, Stop};
use super::{print, size};
use crate::chain::Chain;
use crate::error::{Context, ErrorKind, Result};
use crate::file::{Access, CacheMode};
use crate::layer::Format;
use crate::rebase::{Copied, Mode, Options, Progress, Rehearsal, Report, rebase, reclaim, rehearse};

/// Give an image another backing file and keep every guest-visible byte
///
/// Old and new backing file are compared, what differs is copied into the image, then the header
/// names the new one. If it is stopped at any moment (Ctrl-C), the image is whole; start it again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rebasefs rebase -b new.img -F raw cow.qcow2     another backing file
  rebasefs rebase -b \"\" cow.qcow2               no backing file any more (flatten)
  rebasefs rebase -u -b /new/place/base.img -F raw cow.qcow2     the same file has moved")]
pub(super) struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", value_parser = Format::from_name)]
    format: Option<Format>,
    /// Cache mode of the image: writeback, writethrough, none, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    cache: CacheMode,
    /// How to print what happened
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Show how far it has come
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The image to rebase
    image: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let (options, request) = (&arguments.options, arguments.options.request()?);
    if arguments.cache == CacheMode::Unsafe {
        log::warn!("cache mode unsafe: if the machine stops before all is on disk, the image is lost");
    }
    let opener = arguments.opening.opener().caching(arguments.cache, options.backing_cache);
    let (image, progress) = (&arguments.image, Arc::new(Progress::default()));
    let stop = Stop::watch(progress.clone())?;
    let access = if options.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let chain = match request.mode {
        Mode::Safe => opener.chain(image, arguments.format, access)?,
        Mode::Unsafe => Chain::new([opener.layer(image, arguments.format, access)?]),
    };
    let work = || match options.dry_run {
        true => rehearse(&chain, &opener, &request, &progress),
        false => {
            let (chain, mut report) = rebase(&chain, &opener, &request, &progress)?;
            if options.reclaim {
                let reclaimed = reclaim(&chain, &opener, &progress, |_| Ok(()));
                report.reclaimed = reclaimed.doing(|| "reclaiming space after the rebase".to_owned())?;
            }
            Ok(Rehearsal { report, ..Rehearsal::default() })
        }
    };
    let done = match arguments.progress && !arguments.quiet {
        true => shown(&progress, work),
        false => work(),
    };
    let done = match (done, stop.signal()) {
        (Err(error), Some(signal)) if error.kind() == ErrorKind::Cancelled => {
            print::complain(&format!("rebasefs: {}: {error}", stopped(signal, &progress, options.dry_run)));
            return Ok(stop::exit_code(signal).into());
        }
        (done, signal) => {
            let done = done?;
            if let Some(signal) = signal {
                print::complain(&format!("rebasefs: {} came too late: it is done", stop::name(signal)));
            }
            done
        }
    };
    if !arguments.quiet && request.mode == Mode::Safe {
        print_result(arguments, &done)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How far it came before this signal.
fn stopped(signal: i32, progress: &Progress, is_dry_run: bool) -> String {
    let [done, total, kept] = [progress.done(), progress.total(), progress.kept()].map(size::text);
    let kept = if is_dry_run { String::new() } else { format!(", {kept} copied and kept") };
    format!("{} after {done} of {total}{kept}", stop::name(signal))
}

fn print_result(arguments: &Arguments, done: &Rehearsal) -> Result<()> {
    match arguments.output {
        Output::Json => print::print_json(&match arguments.options.dry_run {
            true => done.as_json(&arguments.image),
            false => done.report.as_json(&arguments.image),
        }),
        Output::Human => {
            let kind = |range: &Copied| if range.is_zero { "zero" } else { "copy" };
            let line = |range: &Copied| format!("{} {:#x} {:#x}\n", kind(range), range.start, range.length);
            print::print(
                &(done.ranges.iter().map(line).collect::<String>() + &summary(arguments, &done.report)),
            )
        }
    }
}

/// One line on what happened.
fn summary(arguments: &Arguments, report: &Report) -> String {
    let [missing, equal, compared, copied, zeroed] =
        [report.missing, report.equal, report.compared, report.copied, report.zeroed].map(size::text);
    let what = if arguments.options.dry_run { "Nothing written" } else { "Image rebased" };
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
