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
    /// What it would copy, in order: the first [`MAX_RANGES`](Self::MAX_RANGES) ranges.
    pub ranges: Vec<Copied>,
    /// What it would compare, in order: first byte and length in bytes; as many.
    pub compared: Vec<(GuestOffset, u64)>,
    /// Whether there are more ranges than are listed. The figures count all of them.
    pub is_cut: bool,
}

impl Rehearsal {
    /// More ranges are not listed: a small file can claim any number of them.
    pub const MAX_RANGES: usize = 1 << 17;
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
    Ok(notes.finish(report))
}

/// An overlay that notes what it is asked to hold.
struct Notes<'a> {
    overlay: &'a Writer,
    ranges: Mutex<Noted<Copied>>,
    compared: Mutex<Noted<(GuestOffset, u64)>>,
}

impl Notes<'_> {
    fn finish(self, report: Report) -> Rehearsal {
        let (ranges, are_ranges_cut) = finished(self.ranges);
        let (compared, are_compared_cut) = finished(self.compared);
        Rehearsal { report, ranges, compared, is_cut: are_ranges_cut || are_compared_cut }
    }
}

fn finished<T: Run>(noted: Mutex<Noted<T>>) -> (Vec<T>, bool) {
    let mut noted = noted.into_inner().unwrap_or_else(PoisonError::into_inner);
    noted.settle();
    (noted.runs, noted.is_cut)
}

/// A run of bytes that can be joined with the one behind it.
trait Run: Copy + Ord {
    /// Takes in `next` if that goes on in the same way right behind.
    fn join(&mut self, next: &Self) -> bool;
}

impl Run for Copied {
    fn join(&mut self, next: &Self) -> bool {
        let joins = self.start + self.length == next.start && self.is_zero == next.is_zero;
        self.length += if joins { next.length } else { 0 };
        joins
    }
}

impl Run for (GuestOffset, u64) {
    fn join(&mut self, next: &Self) -> bool {
        let joins = self.0 + self.1 == next.0;
        self.1 += if joins { next.1 } else { 0 };
        joins
    }
}

/// Runs as they come: workers come when they come. Keeps the first ones, of those that were joined.
#[derive(Debug)]
struct Noted<T> {
    runs: Vec<T>,
    is_cut: bool,
}

impl<T> Default for Noted<T> {
    fn default() -> Self {
        Self { runs: Vec::new(), is_cut: false }
    }
}

impl<T: Run> Noted<T> {
    fn push(&mut self, run: T) {
        if self.runs.last_mut().is_some_and(|last| last.join(&run)) {
            return;
        }
        self.runs.push(run);
        if self.runs.len() >= 2 * Rehearsal::MAX_RANGES {
            self.settle();
        }
    }

    /// Puts them in order, neighbours joined.
    fn settle(&mut self) {
        self.runs.sort_unstable();
        self.runs.dedup_by(|next, last| last.join(next));
        self.is_cut |= self.runs.len() > Rehearsal::MAX_RANGES;
        self.runs.truncate(Rehearsal::MAX_RANGES);
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
        self.compared.lock().unwrap_or_else(PoisonError::into_inner).push((at, length));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_runs_are_kept_whatever_comes_and_in_which_order() {
        let most = Rehearsal::MAX_RANGES as u64;
        let mut noted = Noted::default();
        // Backwards, with a gap behind each.
        (0..5 * most).rev().for_each(|number| noted.push((GuestOffset(number * 1024), 512)));
        assert!(noted.runs.len() < 2 * Rehearsal::MAX_RANGES);
        noted.settle();
        assert!(noted.is_cut && noted.runs.len() as u64 == most);
        assert!((0..).zip(&noted.runs).all(|(number, run)| *run == (GuestOffset(number * 1024), 512)));
        // What fills the gaps is joined with both.
        let mut joined = Noted::default();
        (0..most).for_each(|number| joined.push((GuestOffset(number * 1024), 512)));
        (0..most).for_each(|number| joined.push((GuestOffset(number * 1024 + 512), 512)));
        joined.settle();
        assert_eq!((joined.runs, joined.is_cut), (vec![(GuestOffset(0), most * 1024)], false));
    }
}
