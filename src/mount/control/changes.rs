//! Who waits for `ctl/status` to say something else, and is woken when another state begins. How somebody
//! is woken is not known here.

use std::collections::HashMap;

use crate::mount::times::Moved;

/// Wakes one who waits. Must not block.
pub(in crate::mount) type Waker = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(super) struct Changes {
    /// How many there were.
    number: u64,
    /// When the last one was.
    moved: Moved,
    /// Who waits for the next, by the opening of the file that he waits at.
    waiting: HashMap<u64, Waker>,
}

impl Changes {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    /// Notes a change and wakes all who wait for one.
    pub(super) fn add(&mut self) {
        self.number += 1;
        self.moved = self.moved.now();
        self.waiting.drain().for_each(|(_, wake)| wake());
    }

    /// Whether there was a change after that of the number `seen`; if not, whoever has this opening
    /// is woken by the next one.
    pub(super) fn is_after(&mut self, seen: Option<u64>, opening: u64, waker: Option<Waker>) -> bool {
        if seen != Some(self.number) {
            return true;
        }
        if let Some(waker) = waker {
            self.waiting.insert(opening, waker);
        }
        false
    }

    /// The opening is closed.
    pub(super) fn forget(&mut self, opening: u64) {
        self.waiting.remove(&opening);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn each_who_waits_is_woken_once_and_not_for_what_was_seen() {
        let woken = Arc::new(AtomicU32::new(0));
        let waker = || -> Option<Waker> {
            let woken = woken.clone();
            Some(Box::new(move || {
                woken.fetch_add(1, Ordering::Relaxed);
            }))
        };
        let mut changes = Changes::default();
        assert!(changes.is_after(None, 1, waker()), "nothing was read yet");
        assert!(!changes.is_after(Some(0), 1, waker()));
        assert!(!changes.is_after(Some(0), 1, waker()));
        assert!(!changes.is_after(Some(0), 2, waker()));
        assert!(!changes.is_after(Some(0), 3, waker()));
        changes.forget(3);
        changes.add();
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        changes.add();
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        assert!(changes.is_after(Some(0), 1, waker()) && !changes.is_after(Some(2), 1, None));
    }
}
