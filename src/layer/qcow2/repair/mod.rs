//! Repair: refcounts and flags that say again what the tables say.
//!
//! Owns the order of a repair, which leaves the image no worse at any cut than it was:
//!
//! ```text
//! raise ─ sync ─ lower ─ sync ─ flags ─ sync ─ look again ─ clear the dirty and corrupt bits ─ sync
//! ```
//!
//! or, where the refcount structures themselves are damaged, new ones at the end of the file in the
//! place of the first two steps. Before all that, entries that set a place aside for zeros where no cluster
//! begins lose that place, and a snapshot table with entries that claim too much or too little is written
//! anew elsewhere. No other pointer is ever changed: what is wrong with the tables stays,
//! and is said. While a pointer cannot be followed nothing is freed either, because what seems to
//! be leaked may be what it led to.
//!
//! Whoever calls this holds the image's write lock.

mod flags;
mod rebuild;
mod snapshots;
mod zeros;

use std::collections::BTreeSet;

use super::check::{CheckReport, Examination, examine};
use super::header::{Header, autoclear, field, incompatible};
use super::refcount::{read_refcount, write_refcount};
use super::stored::StoredRefcounts;
use super::{Layer, Qcow2};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, HostFile, HostOffset};

/// What a disk writes as a whole or not at all.
const SECTOR: usize = 512;

/// What is to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts of leaked clusters are lowered; nothing that is in use changes.
    Leaks,
    /// Also refcounts that are too low, flags, and refcount structures that are damaged.
    All,
}

/// What a repair did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// What was found first.
    pub found: CheckReport,
    /// What is left of it.
    pub left: CheckReport,
    /// What could not be repaired and why, a line each.
    pub notes: Vec<String>,
}

impl Repaired {
    /// Leaked clusters that are free now.
    pub fn leaks_fixed(&self) -> u64 {
        self.found.leaks.saturating_sub(self.left.leaks)
    }

    /// Errors that are gone.
    pub fn corruptions_fixed(&self) -> u64 {
        self.found.corruptions.saturating_sub(self.left.corruptions)
    }
}

/// Checks an image that is open for writing, repairs what can be repaired, and checks it again. The
/// image's file must be under a [write lock](crate::file::HostFile::lock).
///
/// # Errors
/// The image was opened for reading only; the file cannot be read or written.
pub fn repair(image: &Qcow2, what: Repair) -> Result<Repaired> {
    if image.file().access() == Access::ReadOnly {
        let what = "was opened for reading only and cannot be repaired";
        return Err(Error::new(ErrorKind::ReadOnly, what).path(image.file().path()));
    }
    repair_unnamed(image, what).path(image.file().path()).doing(|| "repairing the image".to_owned())
}

/// Repairs an image that was not closed properly, as whoever opens it for writing must, and
/// returns it as it is then.
pub(crate) fn recover(image: &Qcow2) -> Result<Qcow2> {
    let repaired = repair(image, Repair::All)?;
    log::info!(
        "{}: was not closed properly; repaired {} leaked clusters and {} errors of its refcounts",
        image.file().path().display(),
        repaired.leaks_fixed(),
        repaired.corruptions_fixed()
    );
    image.reopen()
}

fn repair_unnamed(image: &Qcow2, what: Repair) -> Result<Repaired> {
    let first = examine(image)?;
    let found = first.report.clone();
    match what == Repair::All && mend_tables(image, &first)? {
        true => {
            let image = image.reopen()?;
            settle(&image, &examine(&image)?, found, what)
        }
        false => settle(image, &first, found, what),
    }
}

/// Mends what can be mended of the tables themselves; whether anything was.
fn mend_tables(image: &Qcow2, first: &Examination) -> Result<bool> {
    if first.report.is_sound() || first.has_damage() {
        return Ok(false);
    }
    let are_zeros_mended = zeros::mend(image, &first.references)?;
    if !first.low.is_empty() {
        adjust(image, first, &first.low, u64::max)?;
    }
    Ok(snapshots::mend(image, &first.report)? || are_zeros_mended)
}

/// Lets refcounts and flags say again what the tables say.
fn settle(image: &Qcow2, first: &Examination, found: CheckReport, what: Repair) -> Result<Repaired> {
    let mut notes = Vec::new();
    let has_refcount_errors = !first.low.is_empty() || !first.high.is_empty();
    let left = match what {
        Repair::Leaks if first.high.is_empty() => first.report.clone(),
        Repair::All if !has_refcount_errors && first.report.is_sound() && !first.has_damage() => {
            first.report.clone()
        }
        _ => {
            clear_unknown_autoclear_bits(image)?;
            settle_refcounts(image, first, what, &mut notes)?;
            let image = image.reopen()?;
            flags::mend(&image, &examine(&image)?.references, what)?;
            examine(&image)?.report
        }
    };
    if left.is_sound() {
        clear_bits(&image.reopen()?, what)?;
    } else if what == Repair::All {
        notes.push("What is wrong with the tables themselves cannot be repaired.".to_owned());
    }
    Ok(Repaired { found, left, notes })
}

impl Examination {
    fn has_damage(&self) -> bool {
        self.references.has_damaged_refcounts
    }

    fn is_incomplete(&self) -> bool {
        self.references.is_incomplete
    }
}

fn settle_refcounts(image: &Qcow2, first: &Examination, what: Repair, notes: &mut Vec<String>) -> Result<()> {
    if first.is_incomplete() {
        notes.push("Nothing is freed: there are pointers that lead nowhere or to a structure, and what seems to be leaked may be what they led to.".to_owned());
    }
    match (what, first.has_damage()) {
        (Repair::All, true) if first.is_incomplete() => Ok(()),
        (Repair::All, true) => rebuild::rebuild(image, first.report.image_end_offset),
        (Repair::Leaks, true) => {
            notes.push(
                "Nothing is freed: the refcount structures are damaged. -r all rebuilds them.".to_owned(),
            );
            Ok(())
        }
        (Repair::All, false) => {
            adjust(image, first, &first.low, u64::max)?;
            free(image, first)
        }
        (Repair::Leaks, false) => free(image, first),
    }
}

fn free(image: &Qcow2, first: &Examination) -> Result<()> {
    match first.is_incomplete() {
        true => Ok(()),
        false => adjust(image, first, &first.high, u64::min),
    }
}

/// Stores `wanted(stored, counted)` in the place of each refcount of these blocks, durably. The
/// blocks are known to be nothing else.
fn adjust(
    image: &Qcow2,
    first: &Examination,
    blocks: &BTreeSet<u64>,
    wanted: fn(u64, u64) -> u64,
) -> Result<()> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    let stored = StoredRefcounts::read(file, header)?;
    // Nobody looks at counts beyond the end of the file, and a check does not.
    let end = file.size().div_ceil(header.cluster_size());
    for &index in blocks {
        let Some(at) = stored.block(stored.entry(index)) else { continue };
        let mut before = vec![0; header.cluster_size() as usize];
        file.read_at(at, &mut before)?;
        let mut after = before.clone();
        for slot in 0..stored.per_block() {
            let cluster = index * stored.per_block() + slot;
            let counted = first.references.counts.of(cluster);
            if counted > 0 || cluster < end {
                let count = wanted(read_refcount(&before, header.refcount_order, slot), counted);
                write_refcount(&mut after, header.refcount_order, slot, count);
            }
        }
        write_changes(file, at, &before, &after)?;
    }
    file.sync()
}

/// Writes the sectors that differ.
fn write_changes(file: &dyn HostFile, at: HostOffset, before: &[u8], after: &[u8]) -> Result<()> {
    let sectors = before.chunks(SECTOR).zip(after.chunks(SECTOR)).enumerate();
    for (number, (_, after)) in sectors.filter(|(_, (before, after))| before != after) {
        file.write_at(at + (number * SECTOR) as u64, after)?;
    }
    Ok(())
}

/// A writer clears the autoclear bits that it does not know (qcow2 specification, *Header*).
fn clear_unknown_autoclear_bits(image: &Qcow2) -> Result<()> {
    let known = image.header().autoclear & autoclear::KNOWN;
    if image.header().autoclear == known {
        return Ok(());
    }
    image.file().write_at(HostOffset(field::AUTOCLEAR as u64), &known.to_be_bytes())?;
    image.file().sync()
}

/// The image is sound: lets the header say so.
fn clear_bits(image: &Qcow2, what: Repair) -> Result<()> {
    let cleared = match what {
        Repair::Leaks => incompatible::DIRTY,
        Repair::All => incompatible::DIRTY | incompatible::CORRUPT,
    };
    let bits = image.header().incompatible;
    if bits & cleared == 0 {
        return Ok(());
    }
    image.file().write_at(HostOffset(field::INCOMPATIBLE), &(bits & !cleared).to_be_bytes())?;
    image.file().sync()
}
