//! When the content of the files in the tree may have changed last: what `stat` shows as the times of
//! modification and of change. Programs that copy what has changed (rsync, restic, borg) go by these.
//!
//! Whoever changes something takes note of it afterwards: who has read it in between finds a later time, and
//! reads it again.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// The times of the files that show guest bytes; none, as long as nothing has changed since the image was
/// mounted.
#[derive(Debug, Default)]
pub(super) struct Times(Mutex<Known>);

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// A guest has written.
    written: Moved,
    /// The disk and its snapshots stand on a backing file that was not compared with the one before.
    exchanged: Moved,
    /// There are other layers below the image.
    rebased: Moved,
    /// Somebody has said when the disk was modified (`touch`), and it holds until the disk moves.
    said: Option<(SystemTime, Moved)>,
}

/// When something has happened last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moved(Option<SystemTime>);

impl Moved {
    /// It happens now: later than ever before, whatever somebody does to the clock.
    pub(super) fn now(self) -> Self {
        let now = SystemTime::now();
        Self(Some(self.0.map_or(now, |before| now.max(before + Duration::from_nanos(1)))))
    }

    /// Since the image was mounted, if ever.
    pub(super) fn time(self) -> Option<SystemTime> {
        self.0
    }
}

impl Times {
    /// A guest has written to the disk.
    pub(super) fn note_written(&self) {
        let mut known = self.known();
        known.written = known.written.now();
    }

    /// The image stands on other layers, by which a guest sees the same.
    pub(super) fn note_rebased(&self) {
        let mut known = self.known();
        known.rebased = known.rebased.now();
    }

    /// The image stands on other layers, by which a guest may see anything.
    pub(super) fn note_exchanged(&self) {
        let mut known = self.known();
        known.rebased = known.rebased.now();
        known.exchanged = known.rebased;
    }

    /// Of the disk, and of its partitions.
    pub(super) fn of_disk(&self) -> Moved {
        let known = self.known();
        known.written.max(known.exchanged)
    }

    /// Somebody says when the disk was modified. That he does is a change, too.
    pub(super) fn say(&self, time: SystemTime) {
        let mut known = self.known();
        known.written = known.written.max(known.exchanged).now();
        known.said = Some((time, known.written));
    }

    /// The time of modification that was said of the disk, if nothing has changed since.
    pub(super) fn said_of_disk(&self) -> Option<SystemTime> {
        let known = self.known();
        let is_still_so = |(_, since): &(SystemTime, Moved)| *since == known.written.max(known.exchanged);
        known.said.filter(is_still_so).map(|(time, _)| time)
    }

    /// Of the internal snapshots, to which no guest writes.
    pub(super) fn of_snapshots(&self) -> Moved {
        self.known().exchanged
    }

    /// Of the layers below the image, and of what is said of them.
    pub(super) fn of_layers(&self) -> Moved {
        self.known().rebased
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_moves_the_times_of_what_it_can_change_and_no_others() {
        let times = Times::default();
        let all = || [times.of_disk(), times.of_snapshots(), times.of_layers()];
        let moved = |change: &dyn Fn(&Times)| {
            let before = all();
            change(&times);
            std::array::from_fn(|n| all()[n] > before[n])
        };
        assert_eq!(all(), [Moved::default(); 3]);
        assert_eq!(moved(&Times::note_written), [true, false, false]);
        assert_eq!(moved(&Times::note_rebased), [false, false, true]);
        assert_eq!(moved(&Times::note_exchanged), [true, true, true]);
        assert_eq!(moved(&Times::note_written), [true, false, false]);
        assert_eq!(moved(&Times::note_exchanged), [true, true, true]);
    }
}
