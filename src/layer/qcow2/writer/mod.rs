//! Writing an overlay: new clusters for what it did not hold, in the order of invariants I2 and I3.
//!
//! Owns the order of writes. Data goes to its place at once; refcounts, L2 and L1 tables change in
//! memory and reach the file in [`commit`](Overlay::commit): first what nothing points to yet, then
//! a barrier, then the pointers. So a cut at any point leaves leaked clusters at most. What is put
//! where is decided in `fill` and `compress`, what is given up in `forget`, the tables in memory are in
//! `staged`, the header swap in `swap`; what must not overlap in `structures`.

mod compress;
mod fill;
mod forget;
mod staged;
mod structures;
mod swap;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::forget::Forgotten;
use self::staged::{Staged, View};
use super::entry::SUBCLUSTERS;
use super::header::{Compression, Header, autoclear, field, incompatible};
use super::refcount::{Refcounts, Write};
use super::{Preamble, Qcow2, check};
use crate::error::{Context, Error, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::{Content, Detail, ExtentKind, Filled, GuestOffset, Layer, Missing, Overlay, Reference};

/// Metadata that waits in memory is written when it reaches so many bytes.
const STAGED_BUDGET: usize = 8 << 20;

/// So many bytes of data, at most, are copied again after a power cut.
const UNCOMMITTED_BUDGET: u64 = 512 << 20;

/// What to do about an image that must not be written.
const REPAIR: &str = "repair it with `rebasefs check -r all` first";

/// A qcow2 image that is being written: the active disk and all internal snapshots at once.
#[derive(Debug)]
pub struct Writer {
    file: Arc<dyn HostFile>,
    data_file: Arc<dyn HostFile>,
    preamble: Preamble,
    /// The active disk first.
    views: Vec<Qcow2>,
    /// How what is filled in is compressed, if it is.
    compression: Option<Compression>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    refcounts: Refcounts,
    staged: Staged,
    forgotten: Forgotten,
    /// Bytes that were filled in since the last commit, and would be lost with it.
    uncommitted: u64,
    /// A commit is under way, or has failed: what of it is durable is not known then, and nothing
    /// may be built on it.
    is_committing: bool,
}

impl Writer {
    /// Takes an image, opened for writing, as overlay. Refuses what must not be written.
    pub fn open(image: &Qcow2) -> Result<Self> {
        let preamble = image.preamble().clone();
        refuse_corrupt(&preamble.header).path(image.file().path())?;
        let mut views = vec![image.clone()];
        let mut tables = vec![view(HostOffset(preamble.header.l1_offset), image)];
        let snapshots = image.snapshots()?;
        structures::refuse_overlapping_l1(&preamble.header, &snapshots).path(image.file().path())?;
        for snapshot in snapshots {
            let at_snapshot = image.at_snapshot(&snapshot)?;
            tables.push(view(HostOffset(snapshot.l1_offset), &at_snapshot));
            views.push(at_snapshot);
        }
        let file = image.file().clone();
        let state = State {
            refcounts: Refcounts::read(file.clone(), &preamble.header)?,
            staged: Staged::new(file.clone(), preamble.header.clone(), tables),
            forgotten: Forgotten::default(),
            uncommitted: 0,
            is_committing: false,
        };
        Ok(Self {
            data_file: image.data_file().clone(),
            file,
            preamble,
            views,
            compression: None,
            state: Mutex::new(state),
        })
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

    fn commit_state(&self, state: &mut State) -> Result<()> {
        if std::mem::replace(&mut state.is_committing, true) {
            return Err(Error::invalid("an earlier write to the image failed; nothing more is written"));
        }
        self.clear_unknown_autoclear_bits()?;
        self.write_in_order(state)?;
        state.uncommitted = 0;
        state.is_committing = false;
        Ok(())
    }

    /// The one place that orders metadata writes.
    fn write_in_order(&self, state: &mut State) -> Result<()> {
        // 1. What nothing points to yet; and counts that can only leak.
        self.write_all(state.refcounts.take_dirty())?;
        self.write_all(state.staged.take_new_tables())?;
        self.sync()?;
        // 2. The pointers to new refcount blocks or a new refcount table: from here on the counts
        //    of all that we allocated are durable.
        let (links, old_table) = state.refcounts.take_links();
        if !links.is_empty() {
            self.write_all(links)?;
            self.file.sync()?;
        }
        // 3. The pointers that let guest offsets lead to the new clusters.
        let links = state.staged.take_links();
        if !links.is_empty() {
            self.write_all(links)?;
            self.file.sync()?;
        }
        // 4. What no durable pointer needs any more.
        if let Some((at, clusters)) = old_table {
            state.refcounts.release(at, clusters, 1)?;
        }
        self.write_all(state.refcounts.take_dirty())
    }

    fn write_all(&self, writes: Vec<Write>) -> Result<()> {
        writes.into_iter().try_for_each(|(at, bytes)| self.file.write_at(at, &bytes))
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
        if self.compression.is_some() { self.header().cluster_size() } else { self.unit() }
    }

    fn end(&self) -> u64 {
        self.views.iter().map(Layer::virtual_size).max().unwrap_or(0)
    }

    /// A cluster that is in use although its refcount says that it is free would be overwritten.
    fn check_tables(&self) -> Result<()> {
        let path = self.file.path();
        if self.header().incompatible & incompatible::DIRTY != 0 {
            let what = "the image was not closed properly: its refcounts may be wrong";
            return Err(Error::corrupt(what).path(path).hint(REPAIR));
        }
        let report = check::check(&self.views[0])?;
        if report.is_sound() {
            return self.refuse_shared_structures().path(path);
        }
        let errors = report.corruptions + report.check_errors;
        let first = report.messages.first().map_or("", String::as_str);
        let what = format!("the image has {errors} errors and must not be written; the first: {first}");
        Err(Error::corrupt(what).path(path).hint(REPAIR))
    }

    fn missing_at(&self, at: GuestOffset, length: u64) -> Result<Missing> {
        let mut answer = Missing { is_missing: false, length };
        for view in self.views.iter().filter(|view| at.0 < view.virtual_size()) {
            let limit = answer.length.min(view.virtual_size() - at.0);
            let extent = view.extent_at(at, limit, Detail::Owner)?;
            answer.is_missing |= extent.kind == ExtentKind::NotMine;
            answer.length = extent.length;
        }
        Ok(answer)
    }

    fn has_zero_clusters(&self) -> bool {
        self.header().version >= 3
    }

    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<Filled> {
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
            return Err(Error::unsupported(what).path(self.file.path()));
        }
        swap::check(&*self.file, backing)
    }

    fn set_backing(&self, backing: Option<&Reference>) -> Result<()> {
        self.check_backing(backing)?;
        swap::swap(&*self.file, backing)
    }
}

fn view(l1_at: HostOffset, image: &Qcow2) -> View {
    View { l1_at, l1: image.l1().clone(), size: image.virtual_size() }
}

fn refuse_corrupt(header: &Header) -> Result<()> {
    match header.incompatible & incompatible::CORRUPT {
        0 => Ok(()),
        _ => Err(Error::corrupt("the image is marked as corrupt and must not be written").hint(REPAIR)),
    }
}
