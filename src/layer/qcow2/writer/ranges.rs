//! Clusters of the guest that somebody is changing: nobody else may until he is done.
//!
//! A write that needs a new cluster copies what it leaves of the old one. Two of them in one cluster
//! would each copy what the other is about to change; and what a rebase fills in must not arrive on top of
//! what a guest has written meanwhile.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The ranges that are held, in numbers of clusters. As few as there are threads.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    held: Mutex<Vec<Range<u64>>>,
    given_back: Condvar,
}

/// A range that is held as long as this lives.
pub(super) struct Held<'a> {
    ranges: &'a Ranges,
    range: Range<u64>,
}

impl Ranges {
    /// Waits until nobody holds any of `range`, and holds it.
    pub fn hold(&self, range: Range<u64>) -> Held<'_> {
        let overlaps = |held: &mut Vec<Range<u64>>| {
            held.iter().any(|other| other.start < range.end && range.start < other.end)
        };
        let free = self.given_back.wait_while(self.held(), overlaps);
        free.unwrap_or_else(PoisonError::into_inner).push(range.clone());
        Held { ranges: self, range }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held();
        if let Some(place) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(place);
        }
        drop(held);
        self.ranges.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn who_overlaps_waits_and_who_does_not_goes_on() {
        let ranges = Ranges::default();
        let first = ranges.hold(2..5);
        drop((ranges.hold(0..2), ranges.hold(5..9)));
        let is_free = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = ranges.hold(4..6);
                assert!(is_free.load(Ordering::Relaxed));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            is_free.store(true, Ordering::Relaxed);
            drop(first);
        });
    }
}
