//! Writing an overlay: new clusters for what it did not hold, in the order of invariants I2 and I3.
//!
//! Owns the order of writes. Data goes to its place at once; refcounts, L2 and L1 tables change in
//! memory and reach the file in [`commit`](Overlay::commit): first what nothing points to yet, then
//! a barrier, then the pointers. So a cut at any point leaves leaked clusters at most. What is put
//! where is decided in `fill` and `compress` for a rebase, in `guest`, `zero` and `grow` for a
//! guest; what is given up in `forget`; the tables in memory are in `staged`, the header swap in `swap`; what must not
//! overlap in `structures`, who must not write at the same time in `ranges`.

mod compress;
mod fill;
mod forget;
mod grow;
mod guest;
mod ranges;
mod staged;
mod stale;
mod structures;
mod swap;
mod zero;

pub use self::guest::Guest;
pub(super) use self::staged::Staged;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use self::forget::Forgotten;
use self::ranges::Ranges;
use self::staged::View;
use super::check::{self, Examination};
use super::entry::SUBCLUSTERS;
use super::header::{Header, autoclear, field, incompatible};
use super::live::Hold;
use super::refcount::{Refcounts, Write};
use super::{Preamble, Qcow2};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::{Content, Detail, ExtentKind, Filled, GuestOffset, Layer, Missing, Overlay, Reference};

/// Metadata that waits in memory is written when it reaches so many bytes.
const STAGED_BUDGET: usize = 8 << 20;

/// So many bytes of data, at most, are copied again after a power cut.
const UNCOMMITTED_BUDGET: u64 = 512 << 20;

/// What to do about an image that must not be written.
const REPAIR: &str = "`rebasefs check -r all IMAGE` repairs what can be repaired; otherwise copy what a guest sees with `qemu-img convert -O qcow2 IMAGE NEW`";
/// What to do about one that nothing repairs.
const RESCUE: &str = "copy what a guest sees into a new image: `qemu-img convert -O qcow2 IMAGE NEW`";

/// A qcow2 image that is being written: the active disk and all internal snapshots at once.
#[derive(Debug)]
pub struct Writer {
    file: Arc<dyn HostFile>,
    data_file: Arc<dyn HostFile>,
    preamble: Preamble,
    /// The active disk first.
    views: Vec<Qcow2>,
    /// Whether what is filled in is compressed.
    is_compressing: AtomicBool,
    /// Whether a guest reads and writes all the while, through the tables in memory.
    is_live: bool,
    /// The same as in the state, for those who only look.
    staged: Staged,
    /// Clusters of the guest that somebody is changing.
    ranges: Ranges,
    /// Held by readers while they follow an extent: what they were led to is not given to others.
    readers: RwLock<()>,
    /// Held by guests while they write: who needs the disk to stand still holds it alone.
    guests: RwLock<()>,
    /// Whether the image tells that a guest has written to it.
    is_marked: AtomicBool,
    /// Whether it was said that space cannot be given back.
    has_failed_to_punch: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    refcounts: Refcounts,
    staged: Staged,
    forgotten: Forgotten,
    /// Bytes that were filled in since the last commit, and would be lost with it.
    uncommitted: u64,
    /// A sync has failed, in this way: what was written before it may be lost, and nothing may be built
    /// on it.
    lost: Option<ErrorKind>,
}

impl Writer {
    /// Takes an image, opened for writing, as overlay. Refuses what must not be written.
    ///
    /// # Errors
    /// The image uses a feature that is not written, or its refcounts cannot be read.
    pub fn open(image: &Qcow2) -> Result<Self> {
        let preamble = image.preamble().clone();
        refuse_corrupt(&preamble.header).path(image.file().path())?;
        let mut views = vec![image.clone()];
        let mut tables = vec![view((preamble.header.l1_offset, preamble.header.l1_entries), image)];
        let snapshots = image.snapshots()?;
        structures::refuse_overlapping_l1(&preamble.header, &snapshots).path(image.file().path())?;
        for snapshot in snapshots {
            let at_snapshot = image.at_snapshot(&snapshot)?;
            tables.push(view((snapshot.l1_offset, snapshot.l1_entries), &at_snapshot));
            views.push(at_snapshot);
        }
        let file = image.file().clone();
        let staged = Staged::new(file.clone(), preamble.header.clone(), tables);
        let state = State {
            refcounts: Refcounts::read(file.clone(), &preamble.header)?,
            staged: staged.clone(),
            forgotten: Forgotten::default(),
            uncommitted: 0,
            lost: None,
        };
        Ok(Self {
            data_file: image.data_file().clone(),
            file,
            preamble,
            views,
            is_compressing: AtomicBool::new(false),
            is_live: false,
            staged,
            ranges: Ranges::default(),
            readers: RwLock::default(),
            guests: RwLock::default(),
            is_marked: AtomicBool::new(false),
            has_failed_to_punch: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// Lets a guest write while the image is read, through [`active`](Self::active).
    pub(super) fn live(mut self) -> Self {
        let hooked = |(number, view): (usize, &Qcow2)| view.looking_into(&self.staged, number);
        self.views = self.views.iter().enumerate().map(hooked).collect();
        Self { is_live: true, ..self }
    }

    /// The active disk as it is in memory.
    pub(super) fn active(&self, image: &Qcow2) -> Qcow2 {
        image.looking_into(&self.staged, 0)
    }

    /// See [`Layer::hold`].
    pub(super) fn hold(&self) -> Hold<'_> {
        self.readers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when nobody follows an extent any more that was looked up before.
    fn wait_for_readers(&self) {
        drop(self.readers.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn header(&self) -> &Header {
        &self.preamble.header
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit_if_large(&self, state: &mut State) -> Result<()> {
        let is_large = state.staged.bytes() + state.refcounts.dirty_bytes() > STAGED_BUDGET;
        match is_large || state.uncommitted >= UNCOMMITTED_BUDGET {
            true => self.commit_state(state),
            false => Ok(()),
        }
    }

    /// Makes durable what waits in memory. A write that fails is tried again with all the others: what fails
    /// twice is an error, and waits for the next commit.
    fn commit_state(&self, state: &mut State) -> Result<()> {
        self.commit_once(state).or_else(|error| {
            if state.lost.is_some() {
                return Err(error);
            }
            log::warn!("{error}; trying once more");
            self.commit_once(state)
        })
    }

    fn commit_once(&self, state: &mut State) -> Result<()> {
        if let Some(kind) = state.lost {
            let what = "an earlier sync of the image failed, and what was written before it may be lost; \
                        nothing more is written";
            return Err(Error::new(kind, what).path(self.file.path()));
        }
        self.clear_unknown_autoclear_bits()?;
        self.write_unlinked(state)?;
        self.write_in_order(state)?;
        state.uncommitted = 0;
        // 4. Counts of what no durable pointer needs any more: until they are written, it leaks.
        self.write_counts(state)
    }

    fn write_counts(&self, state: &mut State) -> Result<()> {
        let counts = state.refcounts.take_dirty();
        self.write_all(&counts).inspect_err(|_| state.refcounts.put_back(&counts))
    }

    /// What nothing points to yet; and counts that can only leak.
    fn write_unlinked(&self, state: &mut State) -> Result<()> {
        let counts = state.refcounts.take_dirty();
        let written = self.write_all(&counts).and_then(|()| self.write_all(&state.staged.new_table_writes()));
        written.inspect_err(|_| state.refcounts.put_back(&counts))
    }

    /// The one place that orders metadata writes. A write that fails is not lost: it waits in memory, and
    /// the next commit writes it again, with all that must be durable before it.
    fn write_in_order(&self, state: &mut State) -> Result<()> {
        // 1. What was written so far: data, and what nothing points to yet.
        self.sync().inspect_err(|error| state.lost = Some(error.kind()))?;
        // 2. The pointers to new refcount blocks or a new refcount table: from here on the counts
        //    of all that we allocated are durable.
        self.write_links(&state.refcounts.links(), &mut state.lost)
            .inspect_err(|_| state.refcounts.are_not_linked())?;
        // What no durable pointer needs any more.
        if let Some((at, clusters)) = state.refcounts.are_linked() {
            state.refcounts.release(at, clusters, 1)?;
        }
        // 3. The pointers that let guest offsets lead to the new clusters.
        self.write_links(&state.staged.links(), &mut state.lost)?;
        state.staged.are_written();
        if self.is_live {
            // Who reads does so by the tables in memory.
            self.wait_for_readers();
            self.release_forgotten(state)?;
        }
        Ok(())
    }

    fn write_links(&self, links: &[Write], lost: &mut Option<ErrorKind>) -> Result<()> {
        if links.is_empty() {
            return Ok(());
        }
        self.write_all(links)?;
        self.file.sync().inspect_err(|error| *lost = Some(error.kind()))
    }

    fn write_all(&self, writes: &[Write]) -> Result<()> {
        writes.iter().try_for_each(|(at, bytes)| self.file.write_at(*at, bytes))
    }

    fn sync(&self) -> Result<()> {
        if self.header().has_data_file() {
            self.data_file.sync()?;
        }
        self.file.sync()
    }

    /// A writer clears the autoclear bits that it does not know (qcow2 specification, *Header*).
    fn clear_unknown_autoclear_bits(&self) -> Result<()> {
        let known = self.header().autoclear & autoclear::KNOWN;
        if self.header().autoclear == known {
            return Ok(());
        }
        self.file.write_at(HostOffset(field::AUTOCLEAR as u64), &known.to_be_bytes())?;
        self.file.sync()
    }
}

impl Overlay for Writer {
    fn unit(&self) -> u64 {
        let header = self.header();
        if header.has_subclusters() {
            header.cluster_size() / u64::from(SUBCLUSTERS)
        } else {
            header.cluster_size()
        }
    }

    fn whole(&self) -> u64 {
        if self.is_compressing.load(Ordering::Relaxed) { self.header().cluster_size() } else { self.unit() }
    }

    fn end(&self) -> u64 {
        self.staged.end()
    }

    /// A cluster that is in use although its refcount says that it is free would be overwritten.
    fn check_tables(&self) -> Result<()> {
        if self.is_live {
            // They were found right when it was opened, and are ahead of the file.
            return Ok(());
        }
        let path = self.file.path();
        if self.header().incompatible & incompatible::DIRTY != 0 {
            let what = "the image was not closed properly: its refcounts may be wrong";
            return Err(Error::corrupt(what).path(path).hint(REPAIR));
        }
        let Examination { report, references, .. } = check::examine(&self.views[0])?;
        if report.is_sound() {
            return self.refuse_shared_structures(references.overlap).path(path);
        }
        let errors = report.corruptions + report.check_errors;
        let first = report.messages.first().map_or("", String::as_str);
        let what = format!("the image has {errors} errors and must not be written; the first: {first}");
        Err(Error::corrupt(what).path(path).hint(REPAIR))
    }

    fn missing_at(&self, at: GuestOffset, length: u64) -> Result<Missing> {
        let mut answer = Missing { is_missing: false, length };
        for (number, view) in self.views.iter().enumerate() {
            // The disk may have grown since the writer was opened.
            let size = self.staged.size(number);
            if at.0 >= size {
                continue;
            }
            let limit = answer.length.min(size - at.0);
            let extent = match view.virtual_size() == size {
                true => view.extent_at(at, limit, Detail::Owner)?,
                false => view.with_size(size).extent_at(at, limit, Detail::Owner)?,
            };
            answer.is_missing |= extent.kind == ExtentKind::NotMine;
            answer.length = extent.length;
        }
        Ok(answer)
    }

    fn has_zero_clusters(&self) -> bool {
        self.header().version >= 3
    }

    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<Filled> {
        let _held = self.is_live.then(|| self.hold_clusters(at, content.length()));
        let filled = match content {
            Content::Data(bytes) => self.fill_data(at, bytes, None),
            Content::Stored(bytes, file, from) => self.fill_data(at, bytes, Some((file, from))),
            Content::Zero(length) if !self.has_zero_clusters() => {
                self.fill_data(at, &vec![0; length as usize], None)
            }
            Content::Zero(length) => self.fill_zero(at, length),
        };
        filled.path(self.file.path())
    }

    fn forget(&self, at: GuestOffset, length: u64) -> Result<u64> {
        self.forget_range(at, length).path(self.file.path())
    }

    fn free_forgotten(&self) -> Result<()> {
        self.free_forgotten_clusters().path(self.file.path())
    }

    fn commit(&self) -> Result<()> {
        self.commit_state(&mut self.state())
    }

    fn check_backing(&self, backing: Option<&Reference>) -> Result<()> {
        let header = self.header();
        if backing.is_some() && header.autoclear & autoclear::DATA_FILE_RAW != 0 {
            let what = "its external data file is a raw image by itself, which rules out a backing file";
            return Err(Error::unsupported(what).path(self.file.path()).hint(RESCUE));
        }
        swap::check(&*self.file, backing)
    }

    fn set_backing(&self, backing: Option<&Reference>) -> Result<()> {
        self.check_backing(backing)?;
        // A guest's commit can move the refcount table, which the header names too.
        let _state = self.state();
        swap::swap(&*self.file, backing)
    }
}

fn view((l1_at, entries): (u64, u32), image: &Qcow2) -> View {
    let (l1_at, entries) = (HostOffset(l1_at), u64::from(entries));
    View { l1_at, entries, l1: image.l1().clone(), size: image.virtual_size() }
}

fn refuse_corrupt(header: &Header) -> Result<()> {
    match header.incompatible & incompatible::CORRUPT {
        0 => Ok(()),
        _ => Err(Error::corrupt("the image is marked as corrupt and must not be written").hint(REPAIR)),
    }
}
