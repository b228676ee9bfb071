//! A rebase that writes nothing: what would be read, compared, copied.
//!
//! Runs the engine on an overlay that only takes notes.

use std::sync::{Mutex, PoisonError};

use super::open_for_writing::as_it_is_now;
use super::target::refuse_shared_files;
use super::unchanged::Bases;
use super::{Below, Later, Progress, Report, Request, Target, copy};
use crate::chain::{Chain, Opener};
use crate::error::{Error, Result};
use crate::layer::qcow2::Writer;
use crate::layer::{Content, Filled, GuestOffset, Missing, Overlay, Reference};

/// A run of guest bytes that a rebase would let the overlay hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Copied {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes.
    pub length: u64,
    /// Whether it would become zero clusters, not data.
    pub is_zero: bool,
}

/// What a rebase would do, see [`SafeRebase::plan`](super::SafeRebase::plan).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rehearsal {
    /// The figures that the rebase would report.
    pub report: Report,
    /// What it would copy, in order.
    pub ranges: Vec<Copied>,
    /// What it would compare, in order: first byte and length in bytes.
    pub compared: Vec<(GuestOffset, u64)>,
}

/// Finds out what [`rebase`](super::rebase) would do for a safe request, without writing. The
/// overlay may be open for reading only. Refuses what the rebase would refuse, as far as that can be
/// told before an image that was not closed properly is repaired.
pub(crate) fn rehearse(
    chain: &Chain,
    opener: &Opener,
    request: &Request,
    progress: &Progress,
) -> Result<Rehearsal> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image to rebase"))?;
    // As it is now: an earlier rebase of this chain that was stopped has written to it.
    let (image, old) = as_it_is_now(chain, opener, Below::Matters)?;
    let target = Target::open(top, opener, request)?;
    let writer = super::writer_of(top, &image, request)?;
    writer.check_backing(target.backing.as_ref())?;
    match image.is_dirty() {
        false => writer.check_tables()?,
        // The rebase repairs its refcounts first, and what is copied does not depend on them.
        true => log::warn!(
            "{}: was not closed properly; the rebase will repair its refcounts first, and refuse it if it is \
             damaged otherwise",
            top.file().path().display()
        ),
    }
    let notes = Notes { overlay: &writer, ranges: Mutex::default(), compared: Mutex::default() };
    refuse_shared_files(top, &old)?;
    let bases = Bases::new(&old, &target.chain, progress)?;
    let known = request.difference(&old, &target.chain)?;
    let chains = (&old, &target.chain);
    let report = copy::copy_differences(&notes, chains, known.as_deref(), progress, Later::default())?;
    bases.refuse_touched()?;
    let (ranges, compared) = notes.in_order();
    Ok(Rehearsal { report, ranges, compared })
}

/// An overlay that notes what it is asked to hold.
struct Notes<'a> {
    overlay: &'a Writer,
    ranges: Mutex<Vec<Copied>>,
    compared: Mutex<Vec<(GuestOffset, u64)>>,
}

impl Notes<'_> {
    /// In order, neighbours joined: workers come when they come.
    fn in_order(self) -> (Vec<Copied>, Vec<(GuestOffset, u64)>) {
        let mut ranges = self.ranges.into_inner().unwrap_or_else(PoisonError::into_inner);
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let joins = last.start + last.length == next.start && last.is_zero == next.is_zero;
            last.length += if joins { next.length } else { 0 };
            joins
        });
        let mut compared = self.compared.into_inner().unwrap_or_else(PoisonError::into_inner);
        compared.sort_unstable();
        compared.dedup_by(|next, last| {
            let joins = last.0 + last.1 == next.0;
            last.1 += if joins { next.1 } else { 0 };
            joins
        });
        (ranges, compared)
    }
}

impl Overlay for Notes<'_> {
    fn unit(&self) -> u64 {
        self.overlay.unit()
    }

    fn whole(&self) -> u64 {
        self.overlay.whole()
    }

    fn end(&self) -> u64 {
        self.overlay.end()
    }

    fn check_tables(&self) -> Result<()> {
        self.overlay.check_tables()
    }

    fn missing_at(&self, at: GuestOffset, length: u64) -> Result<Missing> {
        self.overlay.missing_at(at, length)
    }

    fn has_zero_clusters(&self) -> bool {
        self.overlay.has_zero_clusters()
    }

    fn is_compared(&self, at: GuestOffset, length: u64) {
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        match compared.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += length,
            _ => compared.push((at, length)),
        }
    }

    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<Filled> {
        let length = content.length();
        let is_zero = matches!(content, Content::Zero(_)) && self.has_zero_clusters();
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.push(Copied { start: at, length, is_zero });
        Ok(if is_zero { Filled { copied: 0, zeroed: length } } else { Filled { copied: length, zeroed: 0 } })
    }

    /// Not part of a rehearsal.
    fn forget(&self, _: GuestOffset, _: u64) -> Result<u64> {
        Ok(0)
    }

    /// Not part of a rehearsal.
    fn free_forgotten(&self) -> Result<()> {
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn check_backing(&self, backing: Option<&Reference>) -> Result<()> {
        self.overlay.check_backing(backing)
    }

    /// Not part of a rehearsal.
    fn set_backing(&self, backing: Option<&Reference>) -> Result<()> {
        self.check_backing(backing)
    }
}
