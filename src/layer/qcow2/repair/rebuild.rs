//! New refcount structures at the end of the file, in the place of damaged ones.
//!
//! Nothing that is in use is touched until the header points to the new table, in one write of
//! one sector.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::Layer;
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::check::CheckReport;
use crate::layer::qcow2::counts::Counts;
use crate::layer::qcow2::header::{Header, field};
use crate::layer::qcow2::refcount::{MAX_TABLE_BYTES, write_refcount};
use crate::layer::qcow2::references::Walk;
use crate::layer::qcow2::stored::StoredRefcounts;
use crate::layer::qcow2::table::encode_words;

/// Where the new structures lie, in clusters: first the blocks, then the table.
struct Layout {
    start: u64,
    /// Which blocks there are, by their index in the table.
    blocks: BTreeSet<u64>,
    table_clusters: u64,
}

impl Layout {
    /// Blocks for all that is counted and for the new structures themselves, from `start` on.
    fn new(header: &Header, counts: &Counts, start: u64) -> Self {
        let per_block = per_block(header);
        let blocks = counts.iter().map(|(cluster, _)| cluster / per_block).collect();
        let mut layout = Self { start, blocks, table_clusters: 1 };
        loop {
            let before = (layout.blocks.len(), layout.table_clusters);
            layout.blocks.extend(start / per_block..=(layout.end() - 1) / per_block);
            let entries = layout.blocks.last().map_or(1, |last| last + 1);
            layout.table_clusters = (entries * 8).div_ceil(header.cluster_size());
            if before == (layout.blocks.len(), layout.table_clusters) {
                return layout;
            }
        }
    }

    fn table(&self) -> u64 {
        self.start + self.blocks.len() as u64
    }

    fn end(&self) -> u64 {
        self.table() + self.table_clusters
    }

    fn clusters(&self) -> Range<u64> {
        self.start..self.end()
    }
}

fn per_block(header: &Header) -> u64 {
    (header.cluster_size() * 8) >> header.refcount_order
}

/// Writes new refcount structures and lets the header point to them. `end_of_use` is the host
/// offset where the last cluster that is in use ends.
pub(super) fn rebuild(image: &Qcow2, end_of_use: u64) -> Result<()> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    let stored = StoredRefcounts::read(file, header)?;
    // All findings have been told already.
    let counts = Walk::new(image, &stored, &mut CheckReport::default())?.count_without_refcounts()?;
    let end = match file.identity().is_block_device() {
        true => end_of_use,
        false => end_of_use.max(file.size()),
    };
    let layout = Layout::new(header, &counts, end.div_ceil(header.cluster_size()));
    if layout.table_clusters << header.cluster_bits > MAX_TABLE_BYTES {
        let what = "the refcount table would be too large: the file is too large for its cluster size";
        return Err(Error::new(ErrorKind::NoSpace, what));
    }
    write_blocks(file, header, &layout, &counts)?;
    write_table(file, header, &layout)?;
    file.sync()?;
    let mut pointer = (layout.table() << header.cluster_bits).to_be_bytes().to_vec();
    // At most MAX_TABLE_BYTES.
    pointer.extend((layout.table_clusters as u32).to_be_bytes());
    file.write_at(HostOffset(field::REFCOUNT_TABLE), &pointer)?;
    file.sync()
}

fn write_blocks(file: &dyn HostFile, header: &Header, layout: &Layout, counts: &Counts) -> Result<()> {
    for (at, index) in (layout.start..).zip(&layout.blocks) {
        let mut bytes = vec![0; header.cluster_size() as usize];
        for slot in 0..per_block(header) {
            let cluster = index * per_block(header) + slot;
            let count = if layout.clusters().contains(&cluster) { 1 } else { counts.of(cluster) };
            if count > 0 {
                write_refcount(&mut bytes, header.refcount_order, slot, count);
            }
        }
        file.write_at(HostOffset(at << header.cluster_bits), &bytes)?;
    }
    Ok(())
}

fn write_table(file: &dyn HostFile, header: &Header, layout: &Layout) -> Result<()> {
    let mut table = vec![0; (layout.table_clusters << header.cluster_bits) as usize / 8];
    for (at, &index) in (layout.start..).zip(&layout.blocks) {
        table[index as usize] = at << header.cluster_bits;
    }
    file.write_at(HostOffset(layout.table() << header.cluster_bits), &encode_words(&table))
}
