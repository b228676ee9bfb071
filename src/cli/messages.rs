//! Messages: which are printed, whether they carry the time, and in which colours. A progress bar makes
//! way for them, as it does for all that is printed.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anstream::{AutoStream, ColorChoice};
use env_logger::{Builder, Env, Target, TimestampPrecision, WriteStyle};

use super::progress;
use crate::rebase::UNVERIFIED;

/// What is told with no, one, two and more `-v`. fuser warns that it could not unmount what `umount`
/// has unmounted already.
const LEVELS: [&str; 4] = [
    "warn,fuser::session=error",
    "info,fuser=warn,fuser::session=error",
    "debug,fuser=info,fuser::session=error",
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

/// Messages go to the standard error from now on. `-v` counts more than `RUST_LOG`.
pub(super) fn start(verbose: u8, time: Time, unverified: Unverified) {
    let level = LEVELS[usize::from(verbose).min(LEVELS.len() - 1)];
    let mut builder = match verbose {
        0 if unverified == Unverified::Untold => {
            Builder::from_env(Env::default().default_filter_or(format!("{level},{UNVERIFIED}=off")))
        }
        0 => Builder::from_env(Env::default().default_filter_or(level)),
        _ => Builder::new(),
    };
    if verbose > 0 {
        builder.parse_filters(level);
    }
    builder.format_timestamp((time == Time::Told).then_some(TimestampPrecision::Seconds));
    builder.target(Target::Pipe(Box::new(AboveTheBar))).write_style(style());
    // A program that calls us as a library may have a logger of its own.
    let _ = builder.try_init();
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
