//! Many overlays, one new base: what differs between old and new backing file is found out once for
//! all overlays that move from the one to the other, several at a time.
//!
//! Each is a whole rebase of its own, with its own barriers; one that fails stops no other. Nothing is
//! begun before all have been looked at: an overlay that is given twice, or that stands on another
//! one of the list, would pull the ground from under a rebase.

mod look;
mod together;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) use look::Looked;
pub(crate) use together::Together;

use super::{ChainKey, Mode, Progress, Request};
use crate::error::Result;
use crate::layer::Format;

/// Overlays at a time for each processor: most of the time they wait for a disk.
const PER_PROCESSOR: usize = 8;
/// More at a time only wait for each other.
const MAX_AT_A_TIME: usize = 32;

/// Overlays that are to get the same new backing file.
#[derive(Clone, Debug)]
pub(crate) struct Many {
    /// The overlays.
    pub overlays: Vec<PathBuf>,
    /// Their format; recognised if left out.
    pub format: Option<Format>,
    /// What is asked for, with the differences that they share.
    pub request: Request,
    /// How many are worked on at the same time.
    pub at_a_time: usize,
}

/// From which chain to which an overlay moves.
type Move = (ChainKey, ChainKey);

impl Many {
    /// As many at a time as is good on this machine.
    pub fn usual_number() -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (processors * PER_PROCESSOR).min(MAX_AT_A_TIME)
    }

    /// Works on all overlays, several at a time: `work` on one, as this request says; then `done` at
    /// once, in the order in which they come to their ends. Stopped by `together`.
    pub fn run<T>(
        &self,
        looked: Looked,
        together: &Together,
        work: impl Fn(usize, &Request, &Progress) -> Result<T> + Sync,
        done: impl Fn(usize, Result<T>) + Sync,
    ) {
        let Looked { failed, moves } = looked;
        let left = Left::new(&moves);
        together.enter(if self.finds_differences() { left.shared() } else { 0 });
        for (overlay, error) in failed {
            together.finished();
            done(overlay, Err(error));
        }
        self.in_parallel(moves.len(), |number| {
            let (overlay, its_move) = &moves[number];
            let progress = together.begun();
            let request = self.request_of(left.all_of(its_move));
            let result = progress.stop_if_cancelled().and_then(|()| work(*overlay, &request, &progress));
            together.ended(&progress);
            if left.is_last_of(its_move)
                && let Some(differences) = &self.request.differences
            {
                differences.close(&its_move.0, &its_move.1);
            }
            done(*overlay, result);
        });
    }

    /// Whether the overlays share what they find out, and do not look it up.
    fn finds_differences(&self) -> bool {
        let differences = self.request.differences.as_ref();
        self.request.mode == Mode::Safe && differences.is_some_and(|shared| !shared.is_loaded())
    }

    /// The request of an overlay that so many others move with, itself included: to find out for one
    /// alone where the chains differ would cost more than comparing what it does not hold.
    fn request_of(&self, overlays: usize) -> Request {
        let differences = self.request.differences.clone();
        let differences = differences.filter(|shared| overlays > 1 || shared.is_kept());
        Request { differences, ..self.request.clone() }
    }

    /// Calls `work` with each number below `count`, on several threads.
    fn in_parallel(&self, count: usize, work: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let worker = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    break;
                }
                work(number);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.at_a_time.min(count) {
                // Those that there are do the work.
                if let Err(e) =
                    std::thread::Builder::new().name("overlays".into()).spawn_scoped(scope, worker)
                {
                    log::debug!("no more threads: {e}");
                    break;
                }
            }
            worker();
        });
    }
}

/// How many overlays make a move, and how many of them are not through.
struct Left {
    all: HashMap<Arc<Move>, usize>,
    left: Mutex<HashMap<Arc<Move>, usize>>,
}

impl Left {
    fn new(moves: &[(usize, Arc<Move>)]) -> Self {
        let mut all = HashMap::new();
        for (_, its_move) in moves {
            *all.entry(its_move.clone()).or_insert(0) += 1;
        }
        Self { left: Mutex::new(all.clone()), all }
    }

    /// How many moves to another chain are made by more than one overlay.
    fn shared(&self) -> usize {
        self.all.iter().filter(|(its_move, count)| **count > 1 && its_move.0 != its_move.1).count()
    }

    fn all_of(&self, its_move: &Arc<Move>) -> usize {
        self.all.get(its_move).copied().unwrap_or(0)
    }

    /// Counts one that is through.
    fn is_last_of(&self, its_move: &Arc<Move>) -> bool {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.get_mut(its_move).is_some_and(|count| {
            *count -= 1;
            *count == 0
        })
    }
}
