//! What moves when somebody writes to a file, and when it can be relied on to move.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECOND_NS: i64 = 1_000_000_000;

/// What a file looks like at one moment. Size, times and number change when it is written to or
/// replaced, but not when it is seen from another machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// When it was written to, in nanoseconds since 1970, as far as whoever wrote did not set another
    /// time; `None` where the file system does not know.
    pub modified_ns: Option<i64>,
    /// When anything about it was changed, also its name and permissions; likewise. Nobody can set it.
    pub changed_ns: Option<i64>,
    /// When it was read, likewise. Tells a clock from a file; no change.
    pub accessed_ns: Option<i64>,
    /// Its number on its file system.
    pub inode: u64,
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata, size: u64, inode: u64) -> Self {
        Self {
            size,
            modified_ns: Some(nanoseconds(metadata.mtime(), metadata.mtime_nsec())),
            changed_ns: Some(nanoseconds(metadata.ctime(), metadata.ctime_nsec())),
            accessed_ns: Some(nanoseconds(metadata.atime(), metadata.atime_nsec())),
            inode,
        }
    }

    /// Whether its times are the present second, all of them. QEMU's FUSE export answers every question with
    /// that, which is no time of the file. A file that was just made looks the same where times are whole
    /// seconds, but not for long.
    pub(crate) fn is_clock(&self) -> bool {
        let is_one = self.changed_ns == self.modified_ns && self.accessed_ns == self.modified_ns;
        is_one && self.modified_ns.is_some_and(is_the_present)
    }

    /// The same without times.
    pub(crate) fn without_times(self) -> Self {
        Self { modified_ns: None, changed_ns: None, accessed_ns: None, ..self }
    }

    /// Whether it has other bytes than it had when it looked like `before`, as far as its size and
    /// its modification time tell.
    pub fn is_written_since(&self, before: &Self) -> bool {
        let has_moved = before.modified_ns.is_some() && self.modified_ns != before.modified_ns;
        has_moved || (self.size, self.inode) != (before.size, before.inode)
    }

    /// Whether anything about it has changed since, as far as its change time tells.
    pub fn is_touched_since(&self, before: &Self) -> bool {
        before.changed_ns.is_some() && self.changed_ns != before.changed_ns
    }

    /// How long to wait until a write is certain to move a time: a file system counts in ticks, and what
    /// is written in the tick of the last write moves nothing. `None` if that tick is over.
    pub(crate) fn wait(&self) -> Option<Duration> {
        let times = [self.modified_ns?, self.changed_ns?];
        let is_coarse = times.iter().all(|time| time % SECOND_NS == 0);
        let (wait, young) = if is_coarse { COARSE } else { FINE };
        let now = now_ns();
        // Another machine's clock may be ahead.
        times.iter().any(|time| u128::from(time.abs_diff(now)) < young.as_nanos()).then_some(wait)
    }
}

/// A tick where times are whole seconds (FAT counts in two), and how old a time must be to be of an earlier
/// one; and the same where they are not: a tick of the kernel is 10 ms at most.
const COARSE: (Duration, Duration) = (Duration::from_millis(2100), Duration::from_secs(3));
const FINE: (Duration, Duration) = (Duration::from_millis(30), Duration::from_secs(1));

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(SECOND_NS).saturating_add(rest)
}

fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

fn is_the_present(time_ns: i64) -> bool {
    time_ns % SECOND_NS == 0 && (time_ns / SECOND_NS).abs_diff(now_ns() / SECOND_NS) <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_no_time_of_a_file() {
        let of = |modified: i64, changed: i64| Stamp {
            modified_ns: Some(modified),
            changed_ns: Some(changed),
            accessed_ns: Some(changed),
            ..Stamp::default()
        };
        let now = now_ns() / SECOND_NS * SECOND_NS;
        assert!(of(now, now).is_clock());
        assert!(!of(0, now).is_clock() && !of(now + 1, now + 1).is_clock());
        assert!(!of(now - 60 * SECOND_NS, now - 60 * SECOND_NS).is_clock());
        let (known, later) = (of(1, 1), of(2, 2));
        let unknown = known.without_times();
        assert!(!unknown.is_clock());
        assert!(!known.is_written_since(&unknown) && !known.is_touched_since(&unknown));
        assert!(later.is_written_since(&known) && later.is_touched_since(&known));
    }

    #[test]
    fn the_first_second_of_1970_is_a_time() {
        let packed = Stamp { modified_ns: Some(0), changed_ns: Some(5), ..Stamp::default() };
        assert!(Stamp { modified_ns: Some(1), ..packed }.is_written_since(&packed));
        assert!(packed.is_written_since(&Stamp { modified_ns: Some(1), ..packed }));
    }

    #[test]
    fn a_time_is_waited_for_until_its_tick_is_over() {
        let stamp = |modified: i64, changed: i64| Stamp {
            modified_ns: Some(modified),
            changed_ns: Some(changed),
            ..Stamp::default()
        };
        let (now, minute) = (now_ns(), 60 * SECOND_NS);
        let second = now / SECOND_NS * SECOND_NS;
        assert_eq!(stamp(now - minute, now - minute).wait(), None);
        assert_eq!(stamp(second - minute, second - minute).wait(), None);
        assert_eq!(stamp(0, second).wait(), Some(COARSE.0));
        assert_eq!(stamp(0, second | 1).wait(), Some(FINE.0));
        assert_eq!(stamp(0, second - minute).wait(), None);
        assert_eq!(Stamp::default().wait(), None);
    }
}
