//! A snapshot table with entries that claim too much or too little: a new one in its place.
//!
//! Nothing that is in use is touched until the header points to the new table, in one write of one sector.
//! Extra data that has to be there is added, what is more than the format allows is dropped, and so are
//! entries that say nothing. What a snapshot's L1 table leads to stays as it is.
//!
//! A damaged offset or length looks the same as entries that say nothing, and hides snapshots that are there.
//! Their clusters seem to be leaked then: so nothing is dropped while anything seems to be.

use crate::error::Result;
use crate::file::{HostFile, HostOffset};
use crate::layer::Layer;
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::check::CheckReport;
use crate::layer::qcow2::header::{Header, field};
use crate::layer::qcow2::refcount::Refcounts;
use crate::layer::qcow2::snapshot::{Fault, SnapshotTable};

/// Writes the table anew if that mends it, durably; whether it did. Refcounts are not too low; `report` is
/// what was found.
pub(super) fn mend(image: &Qcow2, report: &CheckReport) -> Result<bool> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    let Ok(table) = SnapshotTable::read_as_it_is(file, header) else { return Ok(false) };
    let entries = &table.entries;
    // What an entry with a misplaced L1 table was is not known: it stays, to be looked at.
    let is_lost = entries.iter().any(|entry| matches!(entry.fault, Some(Fault::Misplaced(_))));
    if is_lost || table.is_cut || !entries.iter().any(|entry| entry.is_to_be_mended) {
        return Ok(false);
    }
    let mended: Vec<&[u8]> = entries.iter().filter_map(|entry| entry.mended.as_deref()).collect();
    let (count, bytes) = (mended.len() as u32, mended.concat());
    let left_over = left_over(image, report, &bytes)?;
    let hides_nothing = report.leaks == 0 || left_over.is_some();
    if entries.iter().any(|entry| entry.fault.is_some()) && !hides_nothing {
        return Ok(false);
    }
    let is_as_it_was = entries[..count as usize].iter().all(|entry| !entry.is_to_be_mended);
    let at = match left_over {
        // All that is to be dropped comes last.
        _ if is_as_it_was => HostOffset(header.snapshots_offset),
        Some(at) => at,
        None => put(image, &bytes)?,
    };
    // The count, at most as large as before, and the offset behind it.
    let pointer = [&count.to_be_bytes()[..], &at.0.to_be_bytes()].concat();
    file.write_at(HostOffset(field::SNAPSHOTS), &pointer)?;
    file.sync()?;
    Ok(true)
}

/// Where an earlier repair that was cut short has put the same table: the last clusters in use, and the only
/// ones that seem to be leaked.
fn left_over(image: &Qcow2, report: &CheckReport, bytes: &[u8]) -> Result<Option<HostOffset>> {
    let size = image.header().cluster_size();
    let clusters = (bytes.len() as u64).div_ceil(size);
    let Some(at) = report.image_end_offset.checked_sub(clusters * size) else { return Ok(None) };
    if report.leaks != clusters || clusters == 0 {
        return Ok(None);
    }
    let mut there = vec![0; bytes.len()];
    image.file().read_at(HostOffset(at), &mut there)?;
    Ok((there == bytes).then_some(HostOffset(at)))
}

/// Writes the table where nothing lies, and then its refcounts, durably.
fn put(image: &Qcow2, bytes: &[u8]) -> Result<HostOffset> {
    let (file, header) = (image.file(), image.header());
    let mut refcounts = Refcounts::read(file.clone(), header)?;
    let at = refcounts.allocate_at_end((bytes.len() as u64).div_ceil(header.cluster_size()))?;
    file.write_at(at, bytes)?;
    file.sync()?;
    let write = |writes: Vec<(HostOffset, Vec<u8>)>| -> Result<()> {
        writes.iter().try_for_each(|(at, bytes)| file.write_at(*at, bytes))?;
        file.sync()
    };
    write(refcounts.take_dirty())?;
    write(refcounts.links())?;
    Ok(at)
}
