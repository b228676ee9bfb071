//! A chain as a flat file: read, seek for data and holes, count blocks.
//!
//! Holds the chain of the moment; readers take a snapshot of it and hold no lock while they do
//! I/O. Knows nothing of inodes and of rebasing.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use std::thread;
use std::time::Duration;

use crate::chain::{Chain, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{Detail, ExtentKind, GuestOffset};

/// Who asks for the block count waits so long; a count that takes longer is given with the next
/// answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long readers of a chain that is gone are waited for when somebody wants to stop.
const GRACE: Duration = Duration::from_millis(300);

/// The guest-visible bytes of a chain that can be exchanged for another with the same bytes.
#[derive(Debug)]
pub(super) struct Image {
    current: RwLock<Arc<Snapshot>>,
    /// What was current before, as long as somebody reads from it.
    past: Mutex<Vec<Weak<Snapshot>>>,
}

/// How many bytes of the disk are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allocated {
    Exactly(u64),
    /// Still being counted, or it could not be: no more than this.
    AtMost(u64),
}

#[derive(Debug)]
struct Snapshot {
    chain: Chain,
    /// What the backing files were when the chain was taken.
    watch: Arc<Watch>,
    count: Mutex<Count>,
    counted: Condvar,
    /// Nobody wants its block count any more; it shall not keep files open for that.
    is_replaced: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
enum Count {
    NotAsked,
    UnderWay,
    Known(Allocated),
}

/// What a seek looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    Data,
    Hole,
}

impl Image {
    pub(super) fn new(chain: Chain) -> Self {
        Self { current: RwLock::new(Arc::new(Snapshot::new(chain))), past: Mutex::default() }
    }

    /// The chain of the moment.
    pub(super) fn chain(&self) -> Chain {
        self.snapshot().chain.clone()
    }

    /// Lets all who read from now on read from `chain`.
    pub(super) fn replace(&self, chain: Chain) {
        let next = Arc::new(Snapshot::new(chain));
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let previous = std::mem::replace(&mut *current, next);
        drop(current);
        previous.is_replaced.store(true, Ordering::Relaxed);
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.retain(|snapshot| snapshot.strong_count() > 0);
        past.push(Arc::downgrade(&previous));
        drop(past);
        // Closes the files of the old chain, if nobody reads it any more; not under a lock.
        drop(previous);
    }

    /// The same, and returns when nobody reads from any chain before it any more (invariant I4): an
    /// error, if that takes longer than whoever wants to `stop` can wait.
    pub(super) fn supersede(&self, chain: Chain, stop: impl Fn() -> bool) -> Result<()> {
        self.replace(chain);
        let mut left = GRACE.as_millis();
        // Nobody finds them any more: their number can only fall.
        while self.has_readers_of_the_past() {
            left -= u128::from(stop());
            if left == 0 {
                let what = "somebody still reads by the tables before: the space is not freed, but leaked";
                let hint = "`rebasefs check -r leaks` frees it when the image is not mounted";
                return Err(Error::new(ErrorKind::Cancelled, what).hint(hint));
            }
            thread::sleep(Duration::from_millis(1));
        }
        // What they have read is read: no load of theirs comes after what follows here.
        fence(Ordering::Acquire);
        Ok(())
    }

    fn has_readers_of_the_past(&self) -> bool {
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.iter().any(|snapshot| snapshot.strong_count() > 0)
    }

    /// What the backing files of the moment were when the chain was taken.
    pub(super) fn watch(&self) -> Arc<Watch> {
        self.snapshot().watch.clone()
    }

    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.snapshot().chain.virtual_size()
    }

    /// Fills `buffer` from `offset` as far as the disk reaches; returns how many bytes that were.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let snapshot = self.snapshot();
        let left = snapshot.chain.virtual_size().saturating_sub(offset);
        let length = left.min(buffer.len() as u64) as usize;
        snapshot.chain.read_at(GuestOffset(offset), &mut buffer[..length])?;
        Ok(length)
    }

    /// The first offset at or after `offset` that holds what is looked for; the end of the disk
    /// counts as a hole. `None` beyond the end, and where no data follows.
    pub(super) fn seek(&self, offset: u64, goal: Seek) -> Result<Option<u64>> {
        let snapshot = self.snapshot();
        let size = snapshot.chain.virtual_size();
        if offset >= size {
            return Ok(None);
        }
        for run in snapshot.runs(offset) {
            let run = run?;
            if run.is_data == (goal == Seek::Data) {
                return Ok(Some(run.start));
            }
        }
        Ok((goal == Seek::Hole).then_some(size))
    }

    /// How many bytes are data: counted once for a chain, in the background.
    pub(super) fn allocated(&self) -> Allocated {
        let snapshot = self.snapshot();
        snapshot.start_counting();
        snapshot.wait_for_count()
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A run of bytes that are all data or all hole.
struct Run {
    start: u64,
    length: u64,
    is_data: bool,
}

impl Snapshot {
    fn new(chain: Chain) -> Self {
        Self {
            watch: Arc::new(Watch::new(&chain.below(0))),
            chain,
            count: Mutex::new(Count::NotAsked),
            counted: Condvar::new(),
            is_replaced: AtomicBool::new(false),
        }
    }

    /// The runs from `offset` to the end; neighbours may be alike. Ends after an error.
    fn runs(&self, offset: u64) -> impl Iterator<Item = Result<Run>> {
        let size = self.chain.virtual_size();
        let mut next = offset;
        std::iter::from_fn(move || {
            if next >= size {
                return None;
            }
            let start = next;
            let run = self.chain.extent_at(GuestOffset(start), size - start, Detail::Holes).map(|owned| {
                let is_data = matches!(owned.extent.kind, ExtentKind::Data(_) | ExtentKind::Compressed(_));
                Run { start, length: owned.extent.length, is_data }
            });
            next = run.as_ref().map_or(size, |run| start + run.length);
            Some(run)
        })
    }

    fn start_counting(self: &Arc<Self>) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*count, Count::NotAsked) {
            return;
        }
        let snapshot = self.clone();
        let counter = move || snapshot.finish_counting(snapshot.count_data());
        match thread::Builder::new().name("block count".into()).spawn(counter) {
            Ok(_) => *count = Count::UnderWay,
            Err(e) => log::warn!("cannot start a thread to count blocks: {e}"),
        }
    }

    fn count_data(&self) -> Allocated {
        let mut bytes = 0;
        for run in self.runs(0) {
            match run {
                _ if self.is_replaced.load(Ordering::Relaxed) => return self.upper_bound(),
                Ok(run) => bytes += if run.is_data { run.length } else { 0 },
                Err(e) => {
                    log::error!("cannot count the blocks of the disk: {e}");
                    return self.upper_bound();
                }
            }
        }
        Allocated::Exactly(bytes)
    }

    fn finish_counting(&self, allocated: Allocated) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) = Count::Known(allocated);
        self.counted.notify_all();
    }

    fn wait_for_count(&self) -> Allocated {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited =
            self.counted.wait_timeout_while(count, PATIENCE, |count| matches!(count, Count::UnderWay));
        match *waited.unwrap_or_else(PoisonError::into_inner).0 {
            Count::Known(allocated) => allocated,
            Count::NotAsked | Count::UnderWay => self.upper_bound(),
        }
    }

    fn upper_bound(&self) -> Allocated {
        Allocated::AtMost(self.chain.virtual_size())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    /// A raw disk of 1 MiB with data in `[256 KiB, 512 KiB)`.
    fn image() -> (tempfile::TempDir, Image) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![7; 256 << 10], 256 << 10).unwrap();
        let chain = Opener::new().chain(&path, None, Access::ReadOnly).unwrap();
        (dir, Image::new(chain))
    }

    #[test]
    fn reads_end_with_the_disk() {
        let (_dir, image) = image();
        let mut buffer = [9; 8];
        assert_eq!(image.read((1 << 20) - 3, &mut buffer).unwrap(), 3);
        assert_eq!(buffer, [0, 0, 0, 9, 9, 9, 9, 9]);
        assert_eq!(image.read(1 << 20, &mut buffer).unwrap(), 0);
        assert_eq!(image.read(u64::MAX, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn seeks_find_data_and_holes_and_the_hole_at_the_end() {
        let (_dir, image) = image();
        assert_eq!(image.seek(5, Seek::Data).unwrap(), Some(256 << 10));
        assert_eq!(image.seek(5, Seek::Hole).unwrap(), Some(5));
        assert_eq!(image.seek(300 << 10, Seek::Data).unwrap(), Some(300 << 10));
        assert_eq!(image.seek(300 << 10, Seek::Hole).unwrap(), Some(512 << 10));
        assert_eq!(image.seek(512 << 10, Seek::Data).unwrap(), None);
        assert_eq!(image.seek(1 << 20, Seek::Hole).unwrap(), None);
    }

    #[test]
    fn blocks_are_those_of_the_data() {
        let (_dir, image) = image();
        assert_eq!(image.allocated(), Allocated::Exactly(256 << 10));
        image.replace(Chain::default());
        assert_eq!((image.size(), image.allocated()), (0, Allocated::Exactly(0)));
    }

    #[test]
    fn a_chain_is_superseded_when_its_last_reader_has_gone() {
        let (_dir, image) = image();
        let reader = image.snapshot();
        let error = image.supersede(Chain::default(), || true).unwrap_err();
        assert!(error.to_string().contains("still reads"), "{error}");
        drop(reader);
        // One who reads from what was replaced already is waited for, too.
        let reader = image.snapshot();
        image.replace(Chain::default());
        let has_gone = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                has_gone.store(true, Ordering::Relaxed);
                drop(reader);
            });
            image.supersede(Chain::default(), || false).unwrap();
            assert!(has_gone.load(Ordering::Relaxed));
        });
    }
}
