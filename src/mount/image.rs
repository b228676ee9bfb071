//! The image that is mounted: its disk, and its parts, as flat files.
//!
//! Holds the chain of the moment; readers take a snapshot of it and hold no lock while they do
//! I/O. Knows nothing of inodes and of rebasing.

use std::collections::BTreeSet;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::thread;
use std::time::Duration;

use super::flat::{Allocated, Flat, Measure, Seek};
use super::partitions::Partition;
use super::parts::{Folder, Part, Parts};
use super::times::Times;
use crate::chain::{Chain, Watch};
use crate::error::{Error, ErrorKind, Result};

/// Who asks for the block count of the disk waits so long.
const PATIENCE: Duration = Duration::from_secs(2);

/// The same for a part: of them there may be many, and `ls` asks for each.
const PATIENCE_FOR_PARTS: Duration = Duration::from_millis(200);

/// How long readers of a chain that is gone are waited for when somebody wants to stop.
const GRACE: Duration = Duration::from_millis(300);

/// The guest-visible bytes of a chain that can be exchanged for another with the same bytes.
#[derive(Debug)]
pub(super) struct Image {
    current: RwLock<Arc<Moment>>,
    /// What was current before, as long as somebody reads from it.
    past: Mutex<Vec<Weak<Moment>>>,
    /// Held by whoever is about to exchange the chain.
    changing: Mutex<()>,
    times: Times,
}

/// What is read from until the chain is replaced.
#[derive(Debug)]
struct Moment {
    /// How many there were before it.
    number: u32,
    disk: Arc<Flat>,
    parts: Parts,
    /// What the backing files were when the chain was taken.
    watch: Arc<Watch>,
}

/// A part of the image as it is at one moment, which does not pass for who waits for its readers.
pub(super) struct View {
    moment: Arc<Moment>,
    flat: Arc<Flat>,
}

impl Image {
    pub(super) fn new(chain: Chain) -> Self {
        let first = Moment::new(0, chain, Arc::default());
        Self {
            current: RwLock::new(Arc::new(first)),
            past: Mutex::default(),
            changing: Mutex::default(),
            times: Times::default(),
        }
    }

    pub(super) fn change_lock(&self) -> &Mutex<()> {
        &self.changing
    }

    /// A guest has written: blocks are to be counted again.
    pub(super) fn note_written(&self) {
        let moment = self.moment();
        moment.disk.count_again();
        moment.parts.note_written();
        self.times.note_written();
    }

    /// When what it shows may have changed last.
    pub(super) fn times(&self) -> &Times {
        &self.times
    }

    /// The chain of the moment.
    pub(super) fn chain(&self) -> Chain {
        self.moment().disk.chain().clone()
    }

    /// What `look` makes of the chain of the moment, which is counted among its readers meanwhile.
    pub(super) fn with_chain<T>(&self, look: impl FnOnce(&Chain) -> T) -> T {
        look(self.moment().disk.chain())
    }

    /// Lets all who read from now on read from `chain`.
    pub(super) fn replace(&self, chain: Chain) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let next = Moment::new(current.number + 1, chain, current.parts.viewed());
        let previous = std::mem::replace(&mut *current, Arc::new(next));
        drop(current);
        previous.disk.stop_counting();
        previous.parts.stop_counting();
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.retain(|moment| moment.strong_count() > 0);
        past.push(Arc::downgrade(&previous));
        drop(past);
        // Closes the files of the old chain, if nobody reads it any more; not under a lock.
        drop(previous);
    }

    /// The same, and returns when nobody reads from any chain before it any more (invariant I4): an
    /// error, if that takes longer than whoever wants to `stop` can wait.
    pub(super) fn supersede(&self, chain: Chain, stop: impl Fn() -> bool) -> Result<()> {
        self.replace(chain);
        self.wait_for_readers_of_the_past(stop)
    }

    /// Returns when nobody reads from a chain before the present one any more. An overlay that a guest writes
    /// to has its tables in common with those: what it drops would read there as what an older backing file
    /// has.
    pub(super) fn wait_for_readers_of_the_past(&self, stop: impl Fn() -> bool) -> Result<()> {
        let mut left = GRACE.as_millis();
        // Nobody finds them any more: their number can only fall.
        while self.has_readers_of_the_past() {
            left -= u128::from(stop());
            if left == 0 {
                let what = "somebody still reads by the tables before: the space is not freed, and may leak";
                let hint = "`rebasefs check -r leaks IMAGE` frees it when the image is not mounted";
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
        past.iter().any(|moment| moment.strong_count() > 0)
    }

    /// What the backing files of the moment were when the chain was taken.
    pub(super) fn watch(&self) -> Arc<Watch> {
        self.moment().watch.clone()
    }

    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.moment().disk.size()
    }

    /// Fills `buffer` from `offset` as far as the disk reaches; returns how many bytes that were.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.moment().disk.read(offset, buffer)
    }

    /// The next data or hole of the disk; see [`Flat::seek`].
    pub(super) fn seek(&self, offset: u64, goal: Seek) -> Result<Option<u64>> {
        self.moment().disk.seek(offset, goal)
    }

    /// How many bytes of the disk are data: counted once for a chain, in the background.
    pub(super) fn allocated(&self) -> Allocated {
        let moment = self.moment();
        moment.disk.allocated(moment.clone(), PATIENCE)
    }

    /// How long a text about the chain is, in bytes, which `measure` finds out in the background, once as
    /// long as the chain is the same. `None` if that takes long.
    pub(super) fn text_length(&self, measure: Measure) -> Option<u64> {
        let moment = self.moment();
        moment.disk.text_length(measure, moment.clone(), PATIENCE)
    }

    /// Another number for each chain that there was.
    pub(super) fn number(&self) -> u32 {
        self.moment().number
    }

    /// A part of the image as it is now.
    pub(super) fn part(&self, part: Part) -> Result<View> {
        let moment = self.moment();
        let flat = moment.parts.open(moment.disk.chain(), part)?;
        Ok(View { moment, flat })
    }

    /// The part of this name, if there is one.
    pub(super) fn part_named(&self, folder: Folder, name: &str) -> Result<Option<Part>> {
        let moment = self.moment();
        moment.parts.named(moment.disk.chain(), folder, name)
    }

    /// So many parts of a kind with their names, without those that come first.
    pub(super) fn parts(&self, folder: Folder, skip: usize, take: usize) -> Result<Vec<(String, Part)>> {
        let moment = self.moment();
        moment.parts.list(moment.disk.chain(), folder, skip, take)
    }

    /// The partitions of the disk.
    pub(super) fn partitions(&self) -> Result<Arc<[Partition]>> {
        let moment = self.moment();
        moment.parts.partitions(moment.disk.chain())
    }

    /// The snapshots and partitions that somebody has looked at since the mount began.
    pub(super) fn viewed(&self) -> BTreeSet<Part> {
        self.moment().parts.viewed().lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn moment(&self) -> Arc<Moment> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Moment {
    fn new(number: u32, chain: Chain, viewed: Arc<Mutex<BTreeSet<Part>>>) -> Self {
        let watch = Arc::new(Watch::new(&chain.below(0)));
        Self { number, disk: Arc::new(Flat::whole(chain)), parts: Parts::new(viewed), watch }
    }
}

impl View {
    /// The part, to be read from also when the chain is another one: a layer, whose files nobody
    /// writes to.
    pub(super) fn for_ever(self) -> Arc<Flat> {
        self.flat
    }

    pub(super) fn allocated(&self) -> Allocated {
        self.flat.allocated(self.moment.clone(), PATIENCE_FOR_PARTS)
    }
}

impl std::ops::Deref for View {
    type Target = Flat;

    fn deref(&self) -> &Flat {
        &self.flat
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use std::sync::atomic::AtomicBool;

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
    fn blocks_are_those_of_the_data() {
        let (_dir, image) = image();
        assert_eq!(image.allocated(), Allocated::Exactly(256 << 10));
        image.replace(Chain::default());
        assert_eq!((image.size(), image.allocated()), (0, Allocated::Exactly(0)));
    }

    #[test]
    fn a_chain_is_superseded_when_its_last_reader_has_gone() {
        let (_dir, image) = image();
        let reader = image.moment();
        let error = image.supersede(Chain::default(), || true).unwrap_err();
        assert!(error.to_string().contains("still reads"), "{error}");
        let hint = "`rebasefs check -r leaks IMAGE` frees it when the image is not mounted";
        assert!(error.to_string().ends_with(&format!("({hint})")), "{error}");
        drop(reader);
        // One who reads from what was replaced already is waited for, too.
        let reader = image.moment();
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
