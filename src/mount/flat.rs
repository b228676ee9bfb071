//! Bytes of a chain as a flat file: read, seek for data and holes, count blocks.
//!
//! A disk, or a part of one. Its size never changes once made; knows nothing of inodes, of rebasing, and of
//! who keeps it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::chain::Chain;
use crate::error::Result;
use crate::layer::{Detail, GuestOffset};

/// How many bytes of a file are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allocated {
    Exactly(u64),
    /// Still being counted, or it could not be: no more than this.
    AtMost(u64),
}

/// What a seek looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    Data,
    Hole,
}

/// The bytes of a chain in `[start, start + length)`.
#[derive(Debug)]
pub(super) struct Flat {
    chain: Chain,
    start: u64,
    length: u64,
    data: Counter,
    /// Of a text about the chain.
    text: Counter,
    /// How often the bytes have changed.
    changes: AtomicU64,
    /// Nobody wants its block count any more; it shall not keep files open for that.
    is_dropped: AtomicBool,
}

/// Finds out how long a text about a chain is, in bytes. `None` if that fails, or if somebody says that
/// it may stop.
pub(super) type Measure = fn(&Chain, &AtomicBool) -> Option<u64>;

/// Something that is counted in the background.
#[derive(Debug, Default)]
struct Counter {
    count: Mutex<Count>,
    counted: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
enum Count {
    #[default]
    NotAsked,
    UnderWay,
    /// When so many changes had been made; `None` if it could not be counted.
    Known(Option<u64>, u64),
}

/// A run of bytes that are all data or all hole.
struct Run {
    start: u64,
    length: u64,
    is_data: bool,
}

impl Flat {
    /// All that a guest sees of a chain.
    pub(super) fn whole(chain: Chain) -> Self {
        let length = chain.virtual_size();
        Self::part(chain, 0, length)
    }

    /// So many bytes of a chain from `start` on, all of which it has.
    pub(super) fn part(chain: Chain, start: u64, length: u64) -> Self {
        let (data, text) = (Counter::default(), Counter::default());
        let (changes, is_dropped) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { chain, start, length, data, text, changes, is_dropped }
    }

    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` from `offset` as far as the file reaches; returns how many bytes that were.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let left = self.length.saturating_sub(offset);
        let length = left.min(buffer.len() as u64) as usize;
        if length > 0 {
            self.chain.read_at(GuestOffset(self.start + offset), &mut buffer[..length])?;
        }
        Ok(length)
    }

    /// The first offset at or after `offset` that holds what is looked for; the end of the file
    /// counts as a hole. `None` beyond the end, and where no data follows.
    pub(super) fn seek(&self, offset: u64, goal: Seek) -> Result<Option<u64>> {
        if offset >= self.length {
            return Ok(None);
        }
        for run in self.runs(offset) {
            let run = run?;
            if run.is_data == (goal == Seek::Data) {
                return Ok(Some(run.start));
            }
        }
        Ok((goal == Seek::Hole).then_some(self.length))
    }

    /// How many bytes are data: counted in the background, once unless they change, for which `held` is kept. Whoever
    /// asks waits so long; a count that takes longer is given with the next answer.
    pub(super) fn allocated(self: &Arc<Self>, held: impl Send + 'static, patience: Duration) -> Allocated {
        match self.count(|flat| &flat.data, Self::count_data, held, patience) {
            Some(bytes) => Allocated::Exactly(bytes),
            None => Allocated::AtMost(self.length),
        }
    }

    /// The same of a text about the chain, in bytes.
    pub(super) fn text_length(
        self: &Arc<Self>,
        measure: Measure,
        held: impl Send + 'static,
        patience: Duration,
    ) -> Option<u64> {
        self.count(|flat| &flat.text, move |flat| measure(&flat.chain, &flat.is_dropped), held, patience)
    }

    fn count(
        self: &Arc<Self>,
        counter: fn(&Self) -> &Counter,
        count: impl FnOnce(&Self) -> Option<u64> + Send + 'static,
        held: impl Send + 'static,
        patience: Duration,
    ) -> Option<u64> {
        self.start_counting(counter, count, held);
        let Counter { count, counted } = counter(self);
        let count = count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = counted.wait_timeout_while(count, patience, |count| matches!(count, Count::UnderWay));
        match *waited.unwrap_or_else(PoisonError::into_inner).0 {
            Count::Known(found, _) => found,
            Count::NotAsked | Count::UnderWay => None,
        }
    }

    /// Somebody has written: the next who asks has them counted again.
    pub(super) fn count_again(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Lets a count that is under way stop.
    pub(super) fn stop_counting(&self) {
        self.is_dropped.store(true, Ordering::Relaxed);
    }

    /// The runs from `offset` to the end; neighbours may be alike. Ends after an error.
    fn runs(&self, offset: u64) -> impl Iterator<Item = Result<Run>> {
        let end = self.start + self.length;
        let runs = self.chain.extents(GuestOffset(self.start + offset)..GuestOffset(end), Detail::Holes);
        runs.map(|run| {
            let (at, owned) = run?;
            Ok(Run { start: at.0 - self.start, length: owned.extent.length, is_data: !owned.is_zero() })
        })
    }

    fn start_counting(
        self: &Arc<Self>,
        counter: fn(&Self) -> &Counter,
        count: impl FnOnce(&Self) -> Option<u64> + Send + 'static,
        held: impl Send + 'static,
    ) {
        let mut state = counter(self).count.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = self.changes.load(Ordering::Acquire);
        match *state {
            Count::NotAsked => {}
            Count::Known(_, before) if before != changes => {}
            Count::UnderWay | Count::Known(..) => return,
        }
        let flat = self.clone();
        let work = move || {
            let found = count(&flat);
            let Counter { count, counted } = counter(&flat);
            *count.lock().unwrap_or_else(PoisonError::into_inner) = Count::Known(found, changes);
            counted.notify_all();
            drop(flat);
            drop(held);
        };
        match thread::Builder::new().name("block count".into()).spawn(work) {
            Ok(_) => *state = Count::UnderWay,
            Err(e) => log::warn!("cannot start a thread to count blocks: {e}"),
        }
    }

    fn count_data(&self) -> Option<u64> {
        let mut bytes = 0;
        for run in self.runs(0) {
            match run {
                _ if self.is_dropped.load(Ordering::Relaxed) => return None,
                Ok(run) => bytes += if run.is_data { run.length } else { 0 },
                Err(e) => {
                    log::error!("cannot count the blocks of the disk: {e}");
                    return None;
                }
            }
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    /// A raw disk of 1 MiB with data in `[256 KiB, 512 KiB)`.
    fn chain() -> (tempfile::TempDir, Chain) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![7; 256 << 10], 256 << 10).unwrap();
        let chain = Opener::new().chain(&path, None, Access::ReadOnly).unwrap();
        (dir, chain)
    }

    #[test]
    fn seeks_find_data_and_holes_and_the_hole_at_the_end() {
        let (_dir, chain) = chain();
        let flat = Flat::whole(chain);
        assert_eq!(flat.seek(5, Seek::Data).unwrap(), Some(256 << 10));
        assert_eq!(flat.seek(5, Seek::Hole).unwrap(), Some(5));
        assert_eq!(flat.seek(300 << 10, Seek::Data).unwrap(), Some(300 << 10));
        assert_eq!(flat.seek(300 << 10, Seek::Hole).unwrap(), Some(512 << 10));
        assert_eq!(flat.seek(512 << 10, Seek::Data).unwrap(), None);
        assert_eq!(flat.seek(1 << 20, Seek::Hole).unwrap(), None);
    }

    #[test]
    fn a_part_counts_from_its_own_beginning_and_ends_with_itself() {
        let (_dir, chain) = chain();
        let flat = Arc::new(Flat::part(chain, 128 << 10, 256 << 10));
        let mut buffer = [9; 4];
        assert_eq!(flat.read((128 << 10) - 2, &mut buffer).unwrap(), 4);
        assert_eq!(buffer, [0, 0, 7, 7]);
        assert_eq!(flat.read((256 << 10) - 1, &mut buffer).unwrap(), 1);
        assert_eq!(flat.read(256 << 10, &mut buffer).unwrap(), 0);
        assert_eq!(flat.read(u64::MAX, &mut buffer).unwrap(), 0);
        assert_eq!(flat.seek(0, Seek::Data).unwrap(), Some(128 << 10));
        assert_eq!(flat.seek(200 << 10, Seek::Hole).unwrap(), Some(256 << 10));
        assert_eq!(flat.allocated((), Duration::from_secs(9)), Allocated::Exactly(128 << 10));
    }
}
