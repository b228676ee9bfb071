//! What a rebase prints: how far it has come, what it did, where it was stopped.

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use super::Arguments;
use crate::cli::options::Output;
use crate::cli::{print, size, stop};
use crate::error::Result;
use crate::rebase::{Copied, Progress, Rehearsal, Report};

/// How far it came before this signal.
pub(super) fn stopped(signal: i32, progress: &Progress, is_dry_run: bool) -> String {
    let [done, total, kept] = [progress.done(), progress.total(), progress.kept()].map(size::text);
    let kept = if is_dry_run { String::new() } else { format!(", {kept} copied and kept") };
    format!("{} after {done} of {total}{kept}", stop::name(signal))
}

/// What came of one image.
pub(super) fn print(arguments: &Arguments, image: &Path, done: &Rehearsal) -> Result<()> {
    match arguments.output {
        Output::Json => print::print_json(&as_json(arguments, image, done)),
        Output::Human => {
            let kind = |range: &Copied| if range.is_zero { "zero" } else { "copy" };
            let line = |range: &Copied| format!("{} {:#x} {:#x}\n", kind(range), range.start, range.length);
            print::print(
                &(done.ranges.iter().map(line).collect::<String>() + &summary(arguments, &done.report)),
            )
        }
    }
}

pub(super) fn as_json(arguments: &Arguments, image: &Path, done: &Rehearsal) -> serde_json::Value {
    match arguments.options.dry_run {
        true => done.as_json(image),
        false => done.report.as_json(image),
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
pub(super) fn shown<T>(fraction: impl Fn() -> f64 + Sync, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let show = |end: &str| print::print(&format!("    ({:.2}/100%)\r{end}", fraction() * 100.0));
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
