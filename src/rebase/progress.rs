//! How far a rebase has come: written by the engine, read by whoever shows it, and the way to
//! stop it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// The step of a rebase that is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    /// Guest bytes that need a look; 0 until the plan is made.
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
        self.total.fetch_add(bytes, Ordering::Relaxed);
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
