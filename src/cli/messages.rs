//! Messages: which are printed, whether they carry the time, and in which colours. A progress bar makes
//! way for them, as it does for all that is printed.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anstream::{AutoStream, ColorChoice};
use env_logger::{Builder, Env, Logger, Target, TimestampPrecision, WriteStyle};
use log::{Log, Metadata, Record};

use super::progress;
use crate::rebase::UNVERIFIED;
use crate::shown;

/// What is told with no, one, two and more `-v`. fuser warns that it could not unmount what `umount`
/// has unmounted already, and calls it an error that nobody waits for a reply any more.
const LEVELS: [&str; 4] = [
    "warn,fuser::session=error,fuser::reply=off",
    "info,fuser=warn,fuser::session=error,fuser::reply=off",
    "debug,fuser=info,fuser::session=error,fuser::reply=off",
    "trace",
];

/// Whether a line begins with the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Time {
    /// Somebody looks on, or adds the time himself: a terminal, a pipe, the journal.
    Untold,
    /// Nobody else will know: a file.
    Told,
}

impl Time {
    /// As the standard error demands it.
    pub(super) fn of_standard_error() -> Self {
        let metadata = io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
        if metadata.is_ok_and(|metadata| metadata.is_file()) { Self::Told } else { Self::Untold }
    }
}

/// Whether it is told what could not be verified of a name that is only to be recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unverified {
    Told,
    /// A program reads the standard error, and has asked for nothing to be looked at.
    Untold,
}

impl Unverified {
    /// As the standard error demands it.
    pub(super) fn on_a_terminal() -> Self {
        if io::stderr().is_terminal() { Self::Told } else { Self::Untold }
    }
}

/// Messages go to the standard error from now on. What was typed, `-v` or `-q`, counts more than
/// `RUST_LOG`, and `-v` more than `-q`.
pub(super) fn start(verbose: u8, is_quiet: bool, time: Time, unverified: Unverified) {
    let level = LEVELS[usize::from(verbose).min(LEVELS.len() - 1)];
    let level = match (verbose, is_quiet, unverified) {
        (0, true, _) => "error".to_owned(),
        (0, false, Unverified::Untold) => format!("{level},{UNVERIFIED}=off"),
        _ => level.to_owned(),
    };
    let mut builder = if verbose > 0 || is_quiet {
        let mut builder = Builder::new();
        builder.parse_filters(&level);
        builder
    } else {
        Builder::from_env(Env::default().default_filter_or(level))
    };
    builder.format_timestamp((time == Time::Told).then_some(TimestampPrecision::Seconds));
    builder.target(Target::Pipe(Box::new(AboveTheBar))).write_style(style());
    let logger = builder.build();
    let most = logger.filter();
    // A program that calls us as a library may have a logger of its own.
    if log::set_boxed_logger(Box::new(OneLineEach(logger))).is_ok() {
        log::set_max_level(most);
    }
}

/// Messages name files, and names can hold what a terminal obeys; each is shown on one line.
struct OneLineEach(Logger);

impl Log for OneLineEach {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if self.0.matches(record) {
            let message = record.args().to_string();
            let mut shown = Record::builder();
            shown.metadata(record.metadata().clone()).module_path(record.module_path());
            self.0.log(&shown.args(format_args!("{}", shown::line(&message))).build());
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// The standard error, where the logger takes it for a pipe: a message is written in one go, and the
/// bar is drawn anew below it.
struct AboveTheBar;

impl Write for AboveTheBar {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        progress::aside(|| io::stderr().lock().write_all(message))?;
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// As the logger decides for a standard error that it knows: a pipe has no colours for it.
fn style() -> WriteStyle {
    match std::env::var("RUST_LOG_STYLE").as_deref() {
        Ok("always") => WriteStyle::Always,
        Ok("never") => WriteStyle::Never,
        _ if AutoStream::choice(&io::stderr()) == ColorChoice::Never => WriteStyle::Never,
        _ => WriteStyle::Always,
    }
}
