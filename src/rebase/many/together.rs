//! How far many rebases have come together, and the way to stop all of them.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use crate::rebase::{Differences, Phase, Progress, Standing};

/// The progress of many rebases.
#[derive(Debug)]
pub(crate) struct Together {
    /// Stops all.
    all: Arc<Progress>,
    overlays: usize,
    /// When the look at all of them was over.
    began: OnceLock<Begun>,
    state: Mutex<State>,
    differences: Arc<Differences>,
}

#[derive(Debug)]
struct Begun {
    at: Instant,
    /// How many comparisons are shared.
    moves: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Of those that are under way.
    active: Vec<Arc<Progress>>,
    finished: usize,
    /// What those have looked at, and what they keep.
    done: u64,
    kept: u64,
    /// The farthest that was told: what has been found out may show that there is more to do.
    highest: f64,
}

impl Together {
    /// So many rebases, none of which has begun, that share these differences. Stopped by `all`.
    pub fn new(overlays: usize, differences: Arc<Differences>, all: Arc<Progress>) -> Self {
        Self { all, overlays, began: OnceLock::new(), state: Mutex::default(), differences }
    }

    /// How far all have come. How many bytes the overlays lack is known when it is their turn, so each
    /// overlay counts alike; finding differences, where it is shared, counts as half of the work.
    pub fn standing(&self) -> Standing {
        let mut state = self.state();
        let sum = |what: fn(&Progress) -> u64| state.active.iter().map(|one| what(one)).sum::<u64>();
        let (done, kept) = (sum(Progress::done) + state.done, sum(Progress::kept) + state.kept);
        let fraction = self.fraction(&state).max(state.highest);
        state.highest = fraction;
        let is_over = state.finished == self.overlays;
        Standing {
            phase: if is_over { Phase::Done } else { self.all.phase() },
            done: done + self.differences.done(),
            total: None,
            kept,
            fraction,
            elapsed: self.began.get().map(|began| began.at.elapsed()),
            images: Some((state.finished, self.overlays)),
        }
    }

    fn fraction(&self, state: &State) -> f64 {
        let active: f64 = state.active.iter().map(|progress| progress.fraction()).sum();
        let overlays = (state.finished as f64 + active) / (self.overlays.max(1) as f64);
        let moves = self.began.get().map_or(0, |began| began.moves);
        if moves == 0 {
            return overlays.min(1.0);
        }
        // What the overlays do is behind what they need for it.
        let found = self.differences.found() / moves as f64;
        let finding = found.min(1.0).max(overlays);
        (0.5 * (finding + overlays)).min(1.0)
    }

    /// From now on something may be copied. So many comparisons are shared.
    pub(super) fn enter(&self, moves: usize) {
        self.all.enter(Phase::Copy);
        self.began.get_or_init(|| Begun { at: Instant::now(), moves });
    }

    pub(super) fn begun(&self) -> Arc<Progress> {
        let progress = Arc::new(self.all.companion());
        self.state().active.push(progress.clone());
        progress
    }

    pub(super) fn ended(&self, progress: &Arc<Progress>) {
        let mut state = self.state();
        state.active.retain(|other| !Arc::ptr_eq(other, progress));
        state.done += progress.done();
        state.kept += progress.kept();
        state.finished += 1;
    }

    /// One that did not begin.
    pub(super) fn finished(&self) {
        self.state().finished += 1;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
