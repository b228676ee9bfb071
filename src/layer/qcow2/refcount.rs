//! Refcounts: reading, counting, and growing the structures that hold them.
//!
//! Owns the refcount table and the blocks that were touched. What is written when, and what must
//! be durable before what, is `update`'s business; this module only says what is dirty. Facts from
//! the qcow2 specification, *Host cluster management*.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::header::{Header, field};
use super::room;
use super::table::{encode_words, read_words};
use crate::error::{Error, ErrorKind, Result};
use crate::file::{HostFile, HostOffset};

/// Bytes of clean blocks that are kept in memory.
const CLEAN_BUDGET: usize = 8 << 20;
/// The largest refcount table that QEMU opens.
pub(super) const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Bits of a refcount table entry that hold the offset of a block.
const BLOCK_OFFSET: u64 = !0x1ff;

/// The refcount with this index in a block of refcounts 2^`order` bits wide.
pub fn read_refcount(block: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    if order < 3 {
        // Narrower than a byte: the first in the least significant bits.
        let width = 1 << order;
        let bit = index * width;
        return u64::from(block[bit / 8] >> (bit % 8)) & ((1 << width) - 1);
    }
    let bytes = 1 << (order - 3);
    block[index * bytes..][..bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Stores a refcount; `value` fits into 2^`order` bits.
pub fn write_refcount(block: &mut [u8], order: u32, index: u64, value: u64) {
    let index = index as usize;
    if order < 3 {
        let width = 1 << order;
        let bit = index * width;
        let mask = ((1u8 << width) - 1) << (bit % 8);
        let byte = &mut block[bit / 8];
        *byte = *byte & !mask | (value as u8) << (bit % 8) & mask;
    } else {
        let bytes = 1 << (order - 3);
        block[index * bytes..][..bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}

/// The largest refcount of 2^`order` bits.
pub fn max_refcount(order: u32) -> u64 {
    if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
}

/// A refcount block in memory.
#[derive(Debug)]
struct Block {
    at: HostOffset,
    bytes: Vec<u8>,
    is_dirty: bool,
    /// The host has set space aside for it.
    has_room: bool,
}

/// Something to be written at a place.
pub type Write = (HostOffset, Vec<u8>);

/// The refcounts of an image that is being written.
#[derive(Debug)]
pub struct Refcounts {
    file: Arc<dyn HostFile>,
    cluster_bits: u32,
    order: u32,
    table_at: HostOffset,
    table: Vec<u64>,
    /// Loaded blocks by their index in the table.
    blocks: BTreeMap<u64, Block>,
    /// Entries of the table that are not yet in the file.
    new_entries: Vec<u64>,
    /// The table as it lies in the file, if it has moved in memory only: offset and clusters.
    moved_from: Option<(HostOffset, u64)>,
    /// The header may name the place to which the table has moved: writing that has failed.
    may_be_linked: bool,
    /// No cluster below this one is free.
    first_free: u64,
    /// Where the last allocation of bytes ended, if that cluster has room left.
    byte_end: Option<HostOffset>,
    /// From this cluster on nothing was ever written.
    pristine_from: u64,
}

impl Refcounts {
    /// Reads the table; blocks are read when they are needed.
    pub fn read(file: Arc<dyn HostFile>, header: &Header) -> Result<Self> {
        let table_at = HostOffset(header.refcount_table_offset);
        let entries = (u64::from(header.refcount_table_clusters) << header.cluster_bits) / 8;
        let pristine_from = file.size().div_ceil(header.cluster_size());
        let table = read_words(&*file, table_at, entries)?.into_vec();
        Ok(Self {
            file,
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table_at,
            table,
            blocks: BTreeMap::new(),
            new_entries: Vec::new(),
            moved_from: None,
            may_be_linked: false,
            first_free: 0,
            byte_end: None,
            pristine_from,
        })
    }

    /// The largest count that can be stored.
    pub fn max(&self) -> u64 {
        max_refcount(self.order)
    }

    /// The refcount of the cluster at a host offset.
    pub fn of(&mut self, at: HostOffset) -> Result<u64> {
        self.count(at.0 >> self.cluster_bits)
    }

    /// Takes up to `wanted` (≥ 1) free clusters that follow each other, the first ones there are,
    /// and gives each the refcount `count`.
    pub fn allocate(&mut self, wanted: u64, count: u64) -> Result<(HostOffset, u64)> {
        let mut start = self.first_free;
        while self.count(start)? != 0 {
            start += 1;
        }
        self.first_free = start;
        let mut taken = 0;
        while taken < wanted && self.count(start + taken)? == 0 {
            if !self.is_covered(start + taken) {
                if taken > 0 {
                    break;
                }
                self.cover(start)?;
                // Growing took the first free clusters for itself.
                return self.allocate(wanted, count);
            }
            self.set(start + taken, count)?;
            taken += 1;
        }
        self.first_free = start + taken;
        Ok((HostOffset(start << self.cluster_bits), taken))
    }

    /// The first cluster behind all that were ever in use: what lies there reads as zeros.
    pub fn pristine_from(&self) -> HostOffset {
        HostOffset(self.pristine_from << self.cluster_bits)
    }

    /// The same behind all that was ever in use: also where refcounts may be wrong, nothing lies there.
    pub fn allocate_at_end(&mut self, clusters: u64) -> Result<HostOffset> {
        self.first_free = self.pristine_from;
        self.allocate_together(clusters)
    }

    /// Takes `clusters` free clusters that follow each other.
    pub fn allocate_together(&mut self, clusters: u64) -> Result<HostOffset> {
        let mut too_short = Vec::new();
        let found = loop {
            match self.allocate(clusters, 1)? {
                (at, taken) if taken == clusters => break at,
                piece => too_short.push(piece),
            }
        };
        too_short.into_iter().try_for_each(|(at, taken)| self.release(at, taken, 1))?;
        Ok(found)
    }

    /// Takes `length` bytes, fewer than a cluster has, for a compressed cluster, and raises the
    /// refcount of each host cluster that they touch by `count`: behind the bytes that were taken
    /// last, where there is room, so that several share a host cluster.
    pub fn allocate_bytes(&mut self, length: u64, count: u64) -> Result<HostOffset> {
        let behind = self.byte_end;
        let at = match behind {
            Some(end) if self.extend(end, length, count)? => end,
            _ => self.allocate(1, count)?.0,
        };
        let end = at + length;
        self.byte_end = (!end.0.is_multiple_of(1 << self.cluster_bits)).then_some(end);
        Ok(at)
    }

    /// Counts `length` bytes from `end` on, if they fit into that cluster and, where one is needed,
    /// a free one behind it.
    fn extend(&mut self, end: HostOffset, length: u64, count: u64) -> Result<bool> {
        let (cluster, last) = self.touched(end, length);
        let shared = self.count(cluster)?;
        if shared.checked_add(count).is_none_or(|sum| sum > self.max()) {
            return Ok(false);
        }
        if last > cluster {
            if !self.is_covered(last) || self.count(last)? != 0 {
                return Ok(false);
            }
            self.set(last, count)?;
        }
        self.set(cluster, shared + count)?;
        Ok(true)
    }

    /// Gives back what [`allocate_bytes`](Self::allocate_bytes) took.
    pub fn release_bytes(&mut self, at: HostOffset, length: u64, count: u64) -> Result<()> {
        let (first, last) = self.touched(at, length);
        self.release(HostOffset(first << self.cluster_bits), last - first + 1, count)
    }

    /// The first and the last cluster of so many bytes.
    fn touched(&self, at: HostOffset, length: u64) -> (u64, u64) {
        (at.0 >> self.cluster_bits, (at.0 + length - 1) >> self.cluster_bits)
    }

    /// Lowers the refcount of the clusters at `at` by `count`. To be called only once no durable
    /// pointer needs them any more (invariants I2 and I4), or if none ever pointed to them.
    pub fn release(&mut self, at: HostOffset, clusters: u64, count: u64) -> Result<()> {
        let first = at.0 >> self.cluster_bits;
        for cluster in first..first + clusters {
            let before = self.count(cluster)?;
            let after = before.checked_sub(count).ok_or_else(|| {
                Error::corrupt("the refcount of a cluster in use is too low")
                    .path(self.file.path())
                    .offset(cluster << self.cluster_bits)
            })?;
            self.set(cluster, after)?;
            if after == 0 {
                self.first_free = self.first_free.min(cluster);
                // Whoever gets it next has it alone.
                self.byte_end = self.byte_end.filter(|end| end.0 >> self.cluster_bits != cluster);
            }
        }
        Ok(())
    }

    /// What must be durable before [`links`](Self::links) are written: blocks, and a
    /// table that has moved.
    pub fn take_dirty(&mut self) -> Vec<Write> {
        let mut writes: Vec<Write> = Vec::new();
        for block in self.blocks.values_mut().filter(|block| block.is_dirty) {
            writes.push((block.at, block.bytes.clone()));
            block.is_dirty = false;
        }
        if self.moved_from.is_some() {
            writes.push((self.table_at, encode_words(&self.table)));
        }
        writes
    }

    /// What [`take_dirty`](Self::take_dirty) gave away could not be written, and waits again.
    pub fn put_back(&mut self, writes: &[Write]) {
        for block in self.blocks.values_mut() {
            block.is_dirty |= writes.iter().any(|(at, _)| *at == block.at);
        }
    }

    /// The pointers to what is new: table entries, or the header's pointer to a table that has
    /// moved. Empty where nothing grew.
    pub fn links(&self) -> Vec<Write> {
        if self.moved_from.is_some() {
            let clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
            let mut pointer = self.table_at.0.to_be_bytes().to_vec();
            // At most MAX_TABLE_BYTES.
            pointer.extend((clusters as u32).to_be_bytes());
            return vec![(HostOffset(field::REFCOUNT_TABLE), pointer)];
        }
        let entry = |index: &u64| {
            let bytes = self.table[*index as usize].to_be_bytes().to_vec();
            (self.table_at + index * 8, bytes)
        };
        self.new_entries.iter().map(entry).collect()
    }

    /// [`links`](Self::links) are durable. Returns the table that they have replaced, as offset and
    /// clusters: it may be released now.
    pub fn are_linked(&mut self) -> Option<(HostOffset, u64)> {
        self.new_entries.clear();
        self.may_be_linked = false;
        self.moved_from.take()
    }

    /// Writing [`links`](Self::links) has failed: whether the file has them is not known.
    pub fn are_not_linked(&mut self) {
        self.may_be_linked = self.moved_from.is_some();
    }

    /// Whether pointers to what is new wait to be written.
    pub fn has_links(&self) -> bool {
        !self.new_entries.is_empty() || self.moved_from.is_some()
    }

    /// Bytes of memory that wait to be written.
    pub fn dirty_bytes(&self) -> usize {
        self.blocks.values().filter(|block| block.is_dirty).map(|block| block.bytes.len()).sum()
    }

    fn per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    fn is_covered(&self, cluster: u64) -> bool {
        self.block_offset(cluster / self.per_block()) != 0
    }

    fn block_offset(&self, index: u64) -> u64 {
        self.table.get(index as usize).map_or(0, |entry| entry & BLOCK_OFFSET)
    }

    fn count(&mut self, cluster: u64) -> Result<u64> {
        if !self.is_covered(cluster) {
            return Ok(0);
        }
        let (order, index) = (self.order, cluster % self.per_block());
        Ok(read_refcount(&self.block(cluster / self.per_block())?.bytes, order, index))
    }

    fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (order, index) = (self.order, cluster % self.per_block());
        let file = self.file.clone();
        let block = self.block(cluster / self.per_block())?;
        if !block.has_room {
            room::keep(&*file, block.at, &block.bytes)?;
            block.has_room = true;
        }
        write_refcount(&mut block.bytes, order, index, count);
        block.is_dirty = true;
        self.pristine_from = self.pristine_from.max(cluster + 1);
        Ok(())
    }

    /// The block with this index, which exists.
    fn block(&mut self, index: u64) -> Result<&mut Block> {
        if !self.blocks.contains_key(&index) {
            self.forget_clean_blocks();
            let block = self.load(index)?;
            self.blocks.insert(index, block);
        }
        Ok(self.blocks.get_mut(&index).expect("it was there, or has just been inserted"))
    }

    fn load(&self, index: u64) -> Result<Block> {
        let at = self.block_offset(index);
        let size = 1u64 << self.cluster_bits;
        if !at.is_multiple_of(size) || at >= self.file.size() {
            let what = format!("refcount block {index} is not aligned or lies past the end of the file");
            return Err(Error::corrupt(what).path(self.file.path()).offset(at));
        }
        let mut bytes = vec![0; size as usize];
        self.file.read_at(HostOffset(at), &mut bytes)?;
        Ok(Block { at: HostOffset(at), bytes, is_dirty: false, has_room: false })
    }

    fn forget_clean_blocks(&mut self) {
        if self.blocks.len() << self.cluster_bits > CLEAN_BUDGET {
            self.blocks.retain(|_, block| block.is_dirty);
        }
    }

    /// Makes a block for `cluster`, which is free, as all are that this block stands for: the
    /// block takes that very cluster for itself. On an error all is as it was.
    fn cover(&mut self, cluster: u64) -> Result<()> {
        let index = cluster / self.per_block();
        if index >= self.table.len() as u64 {
            return self.move_table(cluster);
        }
        if self.moved_from.is_none() {
            room::keep(&*self.file, self.table_at + index * 8, &[0; 8])?;
        }
        room::take(&*self.file, HostOffset(cluster << self.cluster_bits), 1 << self.cluster_bits)?;
        self.insert_block(index, cluster)?;
        self.new_entries.push(index);
        self.set(cluster, 1)
    }

    fn insert_block(&mut self, index: u64, cluster: u64) -> Result<()> {
        let at = cluster << self.cluster_bits;
        let entry = self.table.get_mut(index as usize);
        let entry = entry.ok_or_else(|| Error::invalid("a refcount block outside of the refcount table"))?;
        *entry = at;
        let bytes = vec![0; 1 << self.cluster_bits];
        self.blocks.insert(index, Block { at: HostOffset(at), bytes, is_dirty: true, has_room: true });
        Ok(())
    }

    /// Lays out a larger table, and the blocks that count it and themselves, from `start` on,
    /// where everything is free and nothing is covered. Takes the space before anything is changed.
    fn move_table(&mut self, start: u64) -> Result<()> {
        let per_block = self.per_block();
        let first_index = start / per_block;
        let (blocks, table_clusters) = self.layout_of_growth(start);
        if table_clusters << self.cluster_bits > MAX_TABLE_BYTES {
            let what =
                "the refcount table cannot grow any further: the file is too large for its cluster size";
            return Err(Error::new(ErrorKind::NoSpace, what).path(self.file.path()));
        }
        let place = HostOffset(start << self.cluster_bits);
        room::take(&*self.file, place, (blocks + table_clusters) << self.cluster_bits)?;
        let old_clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
        if self.moved_from.is_none() {
            self.moved_from = Some((self.table_at, old_clusters));
        } else if !self.may_be_linked {
            // Moved twice before it was written: nobody will ever point to the place in between.
            self.release(self.table_at, old_clusters, 1)?;
        }
        self.table.resize(((table_clusters << self.cluster_bits) / 8) as usize, 0);
        self.table_at = HostOffset((start + blocks) << self.cluster_bits);
        for number in 0..blocks {
            self.insert_block(first_index + number, start + number)?;
        }
        (start..start + blocks + table_clusters).try_for_each(|cluster| self.set(cluster, 1))
    }

    /// How many blocks and clusters of table are needed from `start` on, so that the blocks count
    /// all of them. The table gets half as much again, so that it does not move often.
    fn layout_of_growth(&self, start: u64) -> (u64, u64) {
        let per_block = self.per_block();
        let entries_per_cluster = (1u64 << self.cluster_bits) / 8;
        let mut blocks = 1;
        loop {
            let entries = (start / per_block + blocks).max(self.table.len() as u64 * 3 / 2);
            let table_clusters = entries.div_ceil(entries_per_cluster);
            let last = start + blocks + table_clusters - 1;
            let needed = last / per_block - start / per_block + 1;
            if needed <= blocks {
                return (blocks, table_clusters);
            }
            blocks = needed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_stored_side_by_side() {
        for order in 0..=6 {
            let mut block = vec![0; 64];
            let count = 512 >> order;
            let value = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max_refcount(order);
            (0..count).for_each(|i| write_refcount(&mut block, order, i, value(i)));
            (0..count).for_each(|i| assert_eq!(read_refcount(&block, order, i), value(i), "order {order}"));
        }
    }

    #[test]
    fn narrow_refcounts_start_at_the_least_significant_bit() {
        let mut block = [0; 2];
        write_refcount(&mut block, 0, 1, 1);
        write_refcount(&mut block, 2, 3, 0xa);
        assert_eq!(block, [0b10, 0xa0]);
    }
}
