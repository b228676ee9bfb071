//! What the control files say: text of lines. State → text.

use std::ffi::OsStr;
use std::fmt::{Display, Write};
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;

use super::{Done, Outcome, Running, Task};
use crate::chain::info::{ImageInfo, json};
use crate::chain::{Chain, Change};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::partitions::Partition;
use crate::rebase::{Difference, Phase, Progress, Report, Request};
use crate::shown::{self, Shown};

/// `ctl/backing`: the backing file as the header names it, byte for byte; empty if there is none.
pub(super) fn backing(chain: &Chain) -> Vec<u8> {
    let Some(reference) = chain.top().and_then(|top| top.backing()) else { return Vec::new() };
    [reference.name.as_bytes(), b"\n"].concat()
}

/// `ctl/chain`: a line a layer with depth, format, virtual size in bytes, and file. The file
/// comes last, since it may contain spaces.
pub(super) fn chain(chain: &Chain) -> Vec<u8> {
    let lines = chain.layers().iter().enumerate().map(|(depth, layer)| {
        let file = layer.file().path().shown();
        format!("{depth} {} {} {file}\n", layer.format(), layer.virtual_size())
    });
    lines.collect::<String>().into_bytes()
}

/// More is not kept of `ctl/info`, in bytes. Only an image made to be large has so many snapshots.
const MAX_INFO: usize = 64 << 20;

/// `ctl/info`: the JSON of `qemu-img info --backing-chain`, an object a layer.
pub(super) fn info(chain: &Chain) -> Result<Vec<u8>> {
    let mut text = String::new();
    for layer in chain.layers() {
        text += if text.is_empty() { "[\n    " } else { ",\n    " };
        text += &json(&ImageInfo::of(&**layer)?)?.replace('\n', "\n    ");
        if text.len() > MAX_INFO {
            let what = format!("what is to be said of the chain has more than {MAX_INFO} bytes");
            return Err(Error::unsupported(what)
                .hint("`rebasefs info --output=json --backing-chain IMAGE` prints all of it"));
        }
    }
    text += if text.is_empty() { "[]\n" } else { "\n]\n" };
    Ok(text.into_bytes())
}

/// `ctl/partitions`: what the partition table says, as JSON.
pub(super) fn partitions(partitions: &[Partition]) -> Result<Vec<u8>> {
    Ok((json(&partitions)? + "\n").into_bytes())
}

/// `ctl/difference`: which guest bytes another backing file would show otherwise, as JSON, a line a
/// range.
pub(super) fn difference(chain: &Chain, asked: &Request, found: &Difference) -> Vec<u8> {
    let text = |path: &dyn AsRef<OsStr>| Value::from(path.as_ref().to_string_lossy());
    let image = chain.top().map_or(Value::Null, |top| text(&top.file().path()));
    let backing = asked.backing.as_ref().map_or(Value::Null, |backing| text(&backing.name));
    let bytes = found.bytes();
    let mut json = format!(
        "{{\n  \"filename\": {image},\n  \"backing-filename\": {backing},\n  \"different\": {bytes},\n  \"ranges\": ["
    );
    for (number, (start, length)) in found.ranges().enumerate() {
        let separator = if number == 0 { "" } else { "," };
        // Writing to a string cannot fail.
        let _ = write!(json, "{separator}\n    {{ \"start\": {}, \"length\": {length} }}", start.0);
    }
    json += if bytes == 0 { "]\n}\n" } else { "\n  ]\n}\n" };
    shown::json(&json).into_owned().into_bytes()
}

/// `ctl/status`: lines of `key: value`.
pub(super) fn status(
    chain: &Chain,
    changes: &[Change],
    running: Option<&Running>,
    last: Option<&Outcome>,
    refused: Option<&str>,
) -> Vec<u8> {
    let mut lines = Lines::default();
    lines.add("state", state(running.map(|running| &running.progress), last));
    if let Some(Running { command, progress }) = running {
        lines.add("request", command.in_words());
        lines.add("phase", progress.phase().word());
        lines.come_so_far(progress);
        lines.goes_on(progress);
    }
    let backing = chain.top().and_then(|top| top.backing());
    lines.add("backing", backing.map_or(String::new(), |backing| backing.name.shown().to_string()));
    chain.broken_off().into_iter().for_each(|why| lines.add("missing", why));
    changes.iter().for_each(|change| lines.add("changed", change));
    if running.is_none() {
        last.into_iter().for_each(|last| lines.outcome(last));
    }
    refused.into_iter().for_each(|why| lines.add("refused", why));
    lines.0.into_bytes()
}

fn state(running: Option<&Progress>, last: Option<&Outcome>) -> &'static str {
    match (running, last.map(|last| &last.result)) {
        (Some(progress), _) if progress.is_cancelled() => "stopping",
        (Some(_), _) => "running",
        (None, None) => "idle",
        (None, Some(Ok(_))) => "done",
        (None, Some(Err(e))) if e.kind() == ErrorKind::Cancelled => "cancelled",
        (None, Some(Err(_))) => "failed",
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, key: &str, value: impl Display) {
        let value = value.to_string();
        let value = shown::line(&value);
        let space = if value.is_empty() { "" } else { " " };
        self.0.extend([key, ":", space, &value, "\n"]);
    }

    fn come_so_far(&mut self, progress: &Progress) {
        self.add("bytes-done", progress.done());
        self.add("bytes-total", progress.total());
    }

    /// How fast it is, as soon as that is known.
    fn goes_on(&mut self, progress: &Progress) {
        let standing = progress.standing();
        self.add("percent", standing.percent());
        standing.rate().iter().for_each(|rate| self.add("bytes-per-second", *rate as u64));
        standing.left().iter().for_each(|left| self.add("seconds-left", left.as_secs_f64().ceil()));
    }

    fn outcome(&mut self, outcome: &Outcome) {
        if let Some(asked) = &outcome.asked {
            self.add("request", asked.command.in_words());
        }
        match (&outcome.result, &outcome.asked) {
            (Ok(Done::Compared(bytes)), _) => {
                self.add("phase", Phase::Done.word());
                self.add("bytes-different", bytes);
            }
            (Ok(Done::Rebased(report)), asked) => {
                self.add("phase", Phase::Done.word());
                // Nobody has looked at bytes otherwise.
                if asked.as_ref().is_none_or(|asked| !asked.command.changes_bytes()) {
                    self.figures(report);
                }
            }
            (Err(error), asked) => {
                asked.iter().for_each(|asked| self.broken_off(asked));
                self.add("error", error);
            }
        }
    }

    fn figures(&mut self, report: &Report) {
        self.add("bytes-missing", report.missing);
        self.add("bytes-equal", report.equal);
        self.add("bytes-compared", report.compared);
        self.add("bytes-copied", report.copied);
        self.add("bytes-zeroed", report.zeroed);
        self.add("bytes-reclaimed", report.reclaimed);
    }

    /// How far a job came that was stopped or failed after it knew what to do, and what is kept.
    fn broken_off(&mut self, job: &Running) {
        if job.progress.phase() == Phase::Plan {
            return;
        }
        self.add("phase", job.progress.phase().word());
        self.come_so_far(&job.progress);
        if job.command.task == Task::Rebase {
            self.add("bytes-kept", job.progress.kept());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::mount::control::command::Command;

    fn job(name: &str) -> Running {
        let command = Command::backing(name.into()).unwrap();
        Running { command, progress: Progress::default() }
    }

    fn text(running: Option<&Running>, last: Option<&Outcome>) -> String {
        String::from_utf8(status(&Chain::default(), &[], running, last, None)).unwrap()
    }

    #[test]
    fn status_tells_what_runs_or_what_came_of_it() {
        assert_eq!(text(None, None), "state: idle\nbacking:\n");
        let running = job("new.img");
        assert!(
            text(Some(&running), None)
                .starts_with("state: running\nrequest: rebase onto 'new.img'\nphase: plan\nbytes-done: 0\n")
        );
        running.progress.cancel();
        assert!(text(Some(&running), None).starts_with("state: stopping\n"));
        let done =
            Outcome { asked: Some(job("flatten").into()), result: Ok(Done::Rebased(Report::default())) };
        assert!(text(None, Some(&done)).contains("state: done\nbacking:\nrequest: flatten\nphase: done\n"));
    }

    #[test]
    fn a_failure_fits_one_line_whatever_the_name() {
        let failed = Outcome { asked: None, result: Err(Error::invalid("bad").path("a\nstate: done")) };
        let text = text(None, Some(&failed));
        assert_eq!(text, "state: failed\nbacking:\nerror: a\\nstate: done: bad\n");
    }
}
