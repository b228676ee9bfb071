//! Many overlays in one command: where they are listed, a line of result each, one exit code.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;

use super::{Arguments, Done, Output, print, report, work_on};
use crate::chain::Opener;
use crate::cli::stop::{self, Stop};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::rebase::{Differences, Many, Mode, Progress, Request, Together};
use crate::shown::{self, Shown};

/// A list may have so many bytes.
const MAX_LIST: u64 = 256 << 20;

/// What is asked for if there is more than one image.
#[derive(Debug, Args)]
#[command(next_help_heading = "Many images")]
pub(super) struct Several {
    /// Rebase the images in this list, too: a path a line; - for the standard input
    #[arg(long, value_name = "LIST")]
    from_file: Option<PathBuf>,
    /// Paths in the list end with a NUL byte, not with a newline
    #[arg(short = '0', long, requires = "from_file")]
    null: bool,
    /// Rebase so many images at a time [default: 8 for each processor, at most 32]
    #[arg(long, value_name = "NUMBER")]
    jobs: Option<NonZeroUsize>,
    /// Keep in FILE where old and new backing file differ, for --difference
    #[arg(long, value_name = "FILE", conflicts_with = "is_unsafe")]
    save_difference: Option<PathBuf>,
    /// Do not compare old and new backing file: FILE, made with --save-difference, says where they differ
    #[arg(long, value_name = "FILE", conflicts_with_all = ["is_unsafe", "save_difference"])]
    difference: Option<PathBuf>,
}

impl Several {
    /// Whether one image alone would do without all this.
    pub(super) fn are_given(&self) -> bool {
        self.from_file.is_some() || self.save_difference.is_some() || self.difference.is_some()
    }

    /// The images that were typed, and those in the list.
    fn overlays(&self, typed: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let mut overlays = typed.to_vec();
        if let Some(list) = &self.from_file {
            let read = if list == Path::new("-") { read_list(std::io::stdin()) } else { read_file(list) };
            let bytes = read.path(list).doing(|| "reading the list of images".to_owned())?;
            overlays.extend(paths(&bytes, if self.null { 0 } else { b'\n' }));
        }
        match overlays.is_empty() {
            false => Ok(overlays),
            true => Err(Error::invalid("the list of images is empty")),
        }
    }

    fn differences(&self, stop: &Progress) -> Result<Differences> {
        let differences = Differences::new(stop.companion());
        match (&self.difference, &self.save_difference) {
            (Some(file), _) => differences.load(file),
            (None, Some(file)) => Ok(differences.saving_to(file)),
            (None, None) => Ok(differences),
        }
    }
}

fn read_file(list: &Path) -> Result<Vec<u8>> {
    read_list(File::open(list).map_err(|e| Error::io(e, "cannot open for reading"))?)
}

fn read_list(list: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = list.take(MAX_LIST + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io(e, "cannot read"))?;
    match bytes.len() as u64 > MAX_LIST {
        true => Err(Error::invalid("is too large for a list of images")),
        false => Ok(bytes),
    }
}

/// The paths of a list; empty ones do not count.
fn paths(list: &[u8], end: u8) -> impl Iterator<Item = PathBuf> {
    let names = list.split(move |byte| *byte == end).filter(|name| !name.is_empty());
    names.map(|name| OsString::from_vec(name.to_vec()).into())
}

/// Rebases all of them. The exit code is 1 if one failed.
pub(super) fn run(
    arguments: &Arguments,
    opener: &Opener,
    request: Request,
    progress: &Arc<Progress>,
    stop: &Stop,
) -> Result<ExitCode> {
    let options = &arguments.many;
    let differences = Arc::new(options.differences(progress)?);
    let many = Many {
        overlays: options.overlays(&arguments.images)?,
        format: arguments.format,
        request: Request { differences: Some(differences.clone()), ..request },
        at_a_time: options.jobs.map_or_else(Many::usual_number, usize::from),
    };
    let together = Together::new(many.overlays.len(), differences.clone(), progress.clone());
    let results =
        Results { arguments, many: &many, failed: AtomicUsize::new(0), unprinted: Mutex::default() };
    let work = || {
        let looked = many.look(opener, progress)?;
        many.run(
            looked,
            &together,
            |overlay, request, progress| {
                work_on(arguments, opener, request, &many.overlays[overlay], progress)
            },
            |overlay, result| results.print(overlay, &result),
        );
        Ok(())
    };
    let done = match arguments.quiet {
        true => work(),
        false => arguments.showing.during(|| together.standing(), work),
    };
    if let Some(file) = options.save_difference.as_ref().filter(|_| !differences.are_saved()) {
        log::warn!("{}: was not written: no backing files were compared", file.shown());
    }
    match (done, stop.signal()) {
        (Err(error), Some(signal)) if error.kind() == ErrorKind::Cancelled => {
            let (name, untouched) = (stop::name(signal), stop::UNTOUCHED);
            print::complain(&format!("rebasefs: {name} before anything was written: {untouched}"));
            Ok(stop::exit_code(signal).into())
        }
        (done, signal) => done.and_then(|()| results.finish(signal)),
    }
}

/// Prints what comes of each, and counts.
struct Results<'a> {
    arguments: &'a Arguments,
    many: &'a Many,
    failed: AtomicUsize,
    /// Why something could not be printed.
    unprinted: Mutex<Option<Error>>,
}

impl Results<'_> {
    fn print(&self, overlay: usize, result: &Result<Done>) {
        let path = &self.many.overlays[overlay];
        let is_json = self.arguments.output == Output::Json;
        let line = match result {
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                print::complain(&format!("{}: failed: {error}", path.shown()));
                is_json.then(|| report::failed_as_json(path, error))
            }
            Ok(done) if is_json => {
                Some(shown::json(&report::as_json(self.arguments, path, done).to_string()).into_owned())
            }
            Ok(done) => Some(format!("{}: {}", path.shown(), self.summary(done))),
        };
        let Some(line) = line.filter(|_| !self.arguments.quiet) else { return };
        if let Err(error) = print::print(&(line + "\n")) {
            self.unprinted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    fn summary(&self, done: &Done) -> String {
        let what = match (self.many.request.mode, self.arguments.options.dry_run) {
            (Mode::Unsafe, _) => return "rebased: only the reference was changed".to_owned(),
            (Mode::Safe, true) => "nothing written",
            (Mode::Safe, false) => "rebased",
        };
        format!("{what}: {}", report::summary(self.arguments, done))
    }

    /// The last line, and the exit code.
    fn finish(self, signal: Option<i32>) -> Result<ExitCode> {
        if let Some(error) = self.unprinted.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let (all, failed) = (self.many.overlays.len(), self.failed.into_inner());
        if failed == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        let signal_name = signal.map_or(String::new(), |signal| format!("{}: ", stop::name(signal)));
        print::complain(&format!("rebasefs: {signal_name}{failed} of {all} images failed"));
        Ok(signal.map_or(ExitCode::FAILURE, |signal| stop::exit_code(signal).into()))
    }
}
