//! What a rebase prints: how far it has come, what it did, where it was stopped.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::Arguments;
use crate::chain::Chain;
use crate::cli::options::Output;
use crate::cli::{print, progress, size, stop};
use crate::error::{Error, Result};
use crate::rebase::{Copied, Progress, Rehearsal, Report};
use crate::shown;

/// How far it came before this signal.
pub(super) fn stopped(signal: i32, progress: &Progress, is_dry_run: bool) -> String {
    let [done, total, kept] = [progress.done(), progress.total(), progress.kept()].map(size::text);
    let kept = if is_dry_run { String::new() } else { format!(", {kept} copied and kept") };
    format!("{} after {done} of {total}{kept}", stop::name(signal))
}

/// What came of one image.
pub(super) struct Done {
    /// What was done, or would be.
    pub found: Rehearsal,
    /// How long it took.
    pub took: Duration,
    /// The bytes that the overlay took on the disk before and takes now, if it was written to.
    pub sizes: Option<(u64, u64)>,
}

/// The bytes that the overlay and its external data file take on their file systems.
pub(super) fn size_on_disk(chain: &Chain) -> Result<u64> {
    let own = chain.top().map_or_else(Chain::default, |top| Chain::new([top.clone()]));
    own.files().map(|file| file.allocated_bytes()).sum()
}

/// Prints it. The line that closes a rebase is for a person: a script that calls qemu-img today reads
/// nothing from its standard output.
pub(super) fn print(arguments: &Arguments, image: &Path, done: &Done) -> Result<()> {
    match arguments.output {
        Output::Json => print::print_json(&as_json(arguments, image, done)),
        Output::Human if !arguments.options.dry_run && !is_watched() => Ok(()),
        Output::Human => {
            let kind = |range: &Copied| if range.is_zero { "zero" } else { "copy" };
            let line = |range: &Copied| format!("{} {:#x} {:#x}\n", kind(range), range.start, range.length);
            let mut ranges: String = done.found.ranges.iter().map(line).collect();
            if done.found.is_cut {
                ranges += &format!("more than {} ranges: not all are listed\n", Rehearsal::MAX_RANGES);
            }
            let what = if arguments.options.dry_run { "Nothing written" } else { "Image rebased" };
            print::print(&format!("{ranges}{what}: {}\n", summary(arguments, done)))
        }
    }
}

/// Whether a person looks on, or wants to be told in any case (`-v`).
fn is_watched() -> bool {
    std::io::stdout().is_terminal() || log::log_enabled!(log::Level::Info)
}

/// An image that has failed: an object as well where objects are wanted, the same as that of one of many.
pub(super) fn print_failed(arguments: &Arguments, image: &Path, error: &Error) {
    if arguments.output == Output::Json {
        // The error itself is what counts.
        let _ = print::print(&(failed_as_json(image, error) + "\n"));
    }
}

/// The object of an image that has failed, on a line.
pub(super) fn failed_as_json(image: &Path, error: &Error) -> String {
    let object = json!({"filename": image.to_string_lossy(), "error": error.to_string()});
    shown::json(&object.to_string()).into_owned()
}

pub(super) fn as_json(arguments: &Arguments, image: &Path, done: &Done) -> serde_json::Value {
    let mut object = match arguments.options.dry_run {
        true => done.found.as_json(image),
        false => done.found.report.as_json(image),
    };
    if let Some((before, after)) = done.sizes {
        object["actual-size-before"] = before.into();
        object["actual-size"] = after.into();
        object["seconds"] = (done.took.as_millis() as f64 / 1000.0).into();
    }
    object
}

/// The figures of what happened.
pub(super) fn summary(arguments: &Arguments, done: &Done) -> String {
    let Report { missing, equal, compared, copied, zeroed, reclaimed } = done.found.report;
    let [missing, equal, compared, copied, zeroed, reclaimed] =
        [missing, equal, compared, copied, zeroed, reclaimed].map(size::text);
    let mut parts = vec![
        format!("of {missing} not in the overlay, {equal} were equal by metadata, {compared} compared"),
        format!("{copied} copied, {zeroed} zeroed"),
    ];
    if arguments.options.reclaim {
        parts.push(format!("{reclaimed} reclaimed"));
    }
    if let Some((before, after)) = done.sizes {
        parts.push(format!("{} on the disk, {} before", size::text(after), size::text(before)));
    }
    parts.push(progress::time(done.took));
    parts.join("; ")
}
