//! How far many rebases have come together, and the way to stop all of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::rebase::{Differences, Phase, Progress};

/// The progress of many rebases.
#[derive(Debug)]
pub struct Together {
    /// Stops all.
    all: Arc<Progress>,
    overlays: usize,
    finished: AtomicUsize,
    /// Of those that are under way.
    active: Mutex<Vec<Arc<Progress>>>,
    differences: Arc<Differences>,
}

impl Together {
    /// So many rebases, none of which has begun, that share these differences. Stopped by `all`.
    pub fn new(overlays: usize, differences: Arc<Differences>, all: Arc<Progress>) -> Self {
        Self { all, overlays, finished: AtomicUsize::new(0), active: Mutex::default(), differences }
    }

    /// How much of all the work is done, from 0 to 1. Finding differences, where there is more than
    /// one, counts as half of it.
    pub fn fraction(&self) -> f64 {
        let active: f64 = self.active().iter().map(|progress| progress.fraction()).sum();
        let finished = self.finished.load(Ordering::Relaxed) as f64;
        let overlays = (finished + active) / (self.overlays.max(1) as f64);
        let finding = self.differences.progress();
        let weight = if finding.total() > 0 { 0.5 } else { 0.0 };
        (weight * finding.fraction() + (1.0 - weight) * overlays).min(1.0)
    }

    /// From now on something may be copied.
    pub(super) fn enter(&self) {
        self.all.enter(Phase::Copy);
    }

    pub(super) fn begun(&self) -> Arc<Progress> {
        let progress = Arc::new(self.all.companion());
        self.active().push(progress.clone());
        progress
    }

    pub(super) fn ended(&self, progress: &Arc<Progress>) {
        let mut active = self.active();
        active.retain(|other| !Arc::ptr_eq(other, progress));
        self.finished();
    }

    pub(super) fn finished(&self) {
        self.finished.fetch_add(1, Ordering::Relaxed);
    }

    fn active(&self) -> MutexGuard<'_, Vec<Arc<Progress>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
