//! How far a rebase has come: written by the engine, read by whoever shows it, and the way to
//! stop it.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::Standing;
use crate::error::{Error, ErrorKind, Result};

/// The step of a rebase that is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum Phase {
    /// Opening files, finding out what needs a look.
    #[default]
    Plan,
    /// Comparing old and new backing file, and copying what differs.
    Copy,
    /// Making durable what was copied.
    Commit,
    /// Comparing what the image will read as with what it reads as now.
    Verify,
    /// Letting the header name the new backing file.
    Swap,
    /// Dropping what the overlay holds for nothing.
    Reclaim,
    /// Over.
    Done,
}

impl Phase {
    /// The word shown in `ctl/status`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Copy => "copy",
            Self::Commit => "commit",
            Self::Verify => "verify",
            Self::Swap => "swap",
            Self::Reclaim => "reclaim",
            Self::Done => "done",
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Plan,
            1 => Self::Copy,
            2 => Self::Commit,
            3 => Self::Verify,
            4 => Self::Swap,
            5 => Self::Reclaim,
            _ => Self::Done,
        }
    }
}

/// How far a rebase has come. Shared between the engine's threads and those who watch.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    total: AtomicU64,
    done: AtomicU64,
    kept: AtomicU64,
    /// When the plan was made.
    began: OnceLock<Instant>,
    /// Shared with those that are stopped together with this one.
    is_cancelled: Arc<AtomicBool>,
}

impl Progress {
    /// The progress of something else, which is stopped together with this.
    #[must_use]
    pub fn companion(&self) -> Self {
        Self { is_cancelled: self.is_cancelled.clone(), ..Self::default() }
    }

    /// The step that is under way.
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.phase.load(Ordering::Relaxed))
    }

    /// Guest bytes that need a look, each time that one is needed: when they are compared, verified,
    /// reclaimed. 0 until the plan is made; the same from then on.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Guest bytes of these that have been dealt with.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Guest bytes that the overlay holds by itself by now and did not before: a rebase that is stopped
    /// and started again does not copy them again.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// How much of the work is done, from 0 to 1; 0 until the plan is made.
    pub fn fraction(&self) -> f64 {
        match self.total() {
            0 => 0.0,
            total => (self.done() as f64 / total as f64).min(1.0),
        }
    }

    /// All this at one moment.
    pub fn standing(&self) -> Standing {
        // Read before the total: it is 0, or what belongs to it.
        let done = self.done();
        Standing {
            phase: self.phase(),
            done,
            total: Some(self.total()),
            kept: self.kept(),
            fraction: self.fraction(),
            elapsed: self.began.get().map(Instant::elapsed),
            images: None,
        }
    }

    /// Asks the engine to stop at the next opportunity. After the header swap it has no effect.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn add_total(&self, bytes: u64) {
        self.began.get_or_init(Instant::now);
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What is in the total and has not been dealt with.
    pub(super) fn left(&self) -> u64 {
        self.total().saturating_sub(self.done())
    }

    /// A part of the work for which so many bytes of the total are set aside.
    pub(super) fn part(&self, announced: u64, actual: u64) -> Part<'_> {
        Part { progress: self, announced, actual: actual.max(1), seen: 0, advanced: 0 }
    }

    pub(super) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn keep(&self, bytes: u64) {
        self.kept.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn stop_if_cancelled(&self) -> Result<()> {
        if !self.is_cancelled() {
            return Ok(());
        }
        let (what, hint) = match self.phase() {
            Phase::Reclaim => (
                "reclaiming was stopped; the image stands on its new backing file",
                "start it again: what was dropped already is dropped",
            ),
            _ => (
                "the rebase was stopped; the image still stands on its old backing file",
                "start it again: what was copied already is not copied twice",
            ),
        };
        Err(Error::new(ErrorKind::Cancelled, what).hint(hint))
    }
}

/// A part of the work that turns out larger or smaller than was announced before anything was read:
/// it moves the bar evenly over what was announced, and all of that when it is through.
#[derive(Debug)]
pub(super) struct Part<'a> {
    progress: &'a Progress,
    announced: u64,
    actual: u64,
    seen: u64,
    advanced: u64,
}

impl Part<'_> {
    /// So many more bytes of the actual ones have been dealt with.
    pub fn advance(&mut self, bytes: u64) {
        self.seen = self.seen.saturating_add(bytes).min(self.actual);
        self.reach((u128::from(self.announced) * u128::from(self.seen) / u128::from(self.actual)) as u64);
    }

    /// All of them have.
    pub fn finish(mut self) {
        self.reach(self.announced);
    }

    fn reach(&mut self, place: u64) {
        self.progress.advance(place - self.advanced);
        self.advanced = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_moves_evenly_over_what_was_announced_however_much_it_turns_out_to_be() {
        for (announced, actual) in [(100, 1000), (1000, 100), (100, 0), (0, 100), (u64::MAX, u64::MAX)] {
            let progress = Progress::default();
            progress.add_total(announced);
            let mut part = progress.part(announced, actual);
            let mut last = 0;
            for _ in 0..12 {
                part.advance(actual / 10);
                assert!(progress.done() >= last && progress.done() <= announced);
                last = progress.done();
            }
            part.finish();
            assert_eq!((progress.done(), progress.left()), (announced, 0));
        }
    }
}
