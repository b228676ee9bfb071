//! What moves when somebody writes to a file.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

const SECOND_NS: i64 = 1_000_000_000;

/// What a file looks like at one moment. Size, modification time and number change when it is written
/// to or replaced, but not when it is seen from another machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// When it was written to, in nanoseconds since 1970; 0 where the file system does not know.
    pub modified_ns: i64,
    /// When anything about it was changed, also its name and permissions; likewise.
    pub changed_ns: i64,
    /// Its number on its file system.
    pub inode: u64,
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata, size: u64, inode: u64) -> Self {
        let modified_ns = nanoseconds(metadata.mtime(), metadata.mtime_nsec());
        let changed_ns = nanoseconds(metadata.ctime(), metadata.ctime_nsec());
        match is_the_present(modified_ns) {
            true => Self { size, inode, ..Self::default() },
            false => Self { size, modified_ns, changed_ns, inode },
        }
    }

    /// Whether it has other bytes than it had when it looked like `before`, as far as its size and
    /// its modification time tell.
    pub fn is_written_since(&self, before: &Self) -> bool {
        let times = (before.modified_ns, self.modified_ns);
        let has_moved = times.0 != times.1 && times.0 != 0 && times.1 != 0;
        has_moved || (self.size, self.inode) != (before.size, before.inode)
    }

    /// Whether anything about it has changed since, as far as its change time tells.
    pub fn is_touched_since(&self, before: &Self) -> bool {
        let times = (before.changed_ns, self.changed_ns);
        times.0 != times.1 && times.0 != 0 && times.1 != 0
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(SECOND_NS).saturating_add(rest)
}

/// QEMU's FUSE export answers every question with the present second: that is no time of the file.
fn is_the_present(time_ns: i64) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().cast_signed());
    time_ns % SECOND_NS == 0 && (time_ns / SECOND_NS).abs_diff(now) <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_no_time_of_a_file() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
        assert!(is_the_present(now * SECOND_NS));
        assert!(!is_the_present(now * SECOND_NS + 1) && !is_the_present((now - 60) * SECOND_NS));
        let (unknown, known) =
            (Stamp::default(), Stamp { modified_ns: 1, changed_ns: 1, ..Stamp::default() });
        assert!(!known.is_written_since(&unknown) && !unknown.is_touched_since(&known));
        let later = Stamp { modified_ns: 2, changed_ns: 2, ..known };
        assert!(later.is_written_since(&known) && later.is_touched_since(&known));
    }
}
