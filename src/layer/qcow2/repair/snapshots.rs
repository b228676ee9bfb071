//! A snapshot table some entries of which claim too much or too little: a new one in its place.
//!
//! Nothing that is in use is touched until the header points to the new table, in one write of one sector.
//! Extra data that has to be there is added, what is more than the format allows is dropped, and so are
//! entries that say nothing. What a snapshot's L1 table leads to stays as it is.

use crate::error::Result;
use crate::file::{HostFile, HostOffset};
use crate::layer::Layer;
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::header::{Header, field};
use crate::layer::qcow2::refcount::Refcounts;
use crate::layer::qcow2::snapshot::{Fault, SnapshotTable};

/// Writes the table anew if that mends it, durably; whether it did. Refcounts are not too low.
pub(super) fn mend(image: &Qcow2) -> Result<bool> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    let Ok(table) = SnapshotTable::read_as_it_is(file, header) else { return Ok(false) };
    // What such an entry was is not known: it stays, to be looked at.
    let is_lost = table.entries.iter().any(|entry| matches!(entry.fault, Some(Fault::Misplaced(_))));
    if is_lost || table.is_cut || !table.entries.iter().any(|entry| entry.is_to_be_mended) {
        return Ok(false);
    }
    let entries: Vec<Vec<u8>> = table.entries.into_iter().filter_map(|entry| entry.mended).collect();
    let bytes = entries.concat();
    let at = match bytes.is_empty() {
        true => HostOffset(0),
        false => put(image, &bytes)?,
    };
    // The count, at most as large as before, and the offset behind it.
    let pointer = [&(entries.len() as u32).to_be_bytes()[..], &at.0.to_be_bytes()].concat();
    file.write_at(HostOffset(field::SNAPSHOTS), &pointer)?;
    file.sync()?;
    Ok(true)
}

/// Writes the table where nothing lies, with its refcounts, durably.
fn put(image: &Qcow2, bytes: &[u8]) -> Result<HostOffset> {
    let (file, header) = (image.file(), image.header());
    let mut refcounts = Refcounts::read(file.clone(), header)?;
    let at = refcounts.allocate_at_end((bytes.len() as u64).div_ceil(header.cluster_size()))?;
    file.write_at(at, bytes)?;
    let write = |writes: Vec<(HostOffset, Vec<u8>)>| -> Result<()> {
        writes.iter().try_for_each(|(at, bytes)| file.write_at(*at, bytes))
    };
    write(refcounts.take_dirty())?;
    file.sync()?;
    write(refcounts.links())?;
    file.sync()?;
    Ok(at)
}
