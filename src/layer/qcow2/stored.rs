//! The refcounts that an image stores, read where they are needed.
//!
//! Reading only; whether they are right is judged elsewhere.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::header::Header;
use super::refcount::{max_refcount, read_refcount};
use super::table::read_words;
use crate::error::Result;
use crate::file::{HostFile, HostOffset};

/// Blocks are read and remembered in pieces of at most this many bytes.
const PIECE: u64 = 4096;
/// Bits of a refcount table entry that are not offset.
const RESERVED: u64 = 0x1ff;
/// So many pieces are remembered.
const PIECES: usize = 1024;

/// The refcount table of an image, and pieces of its blocks.
pub struct StoredRefcounts<'a> {
    file: &'a dyn HostFile,
    header: &'a Header,
    table: Box<[u64]>,
    pieces: Mutex<HashMap<u64, Arc<[u8]>>>,
}

impl<'a> StoredRefcounts<'a> {
    /// Reads the table.
    pub fn read(file: &'a dyn HostFile, header: &'a Header) -> Result<Self> {
        let words = u64::from(header.refcount_table_clusters) << header.cluster_bits >> 3;
        let table = read_words(file, HostOffset(header.refcount_table_offset), words)?;
        Ok(Self { file, header, table, pieces: Mutex::default() })
    }

    /// The largest refcount that the image can store.
    pub fn max(&self) -> u64 {
        max_refcount(self.header.refcount_order)
    }

    /// How many clusters the refcounts of one block stand for.
    pub fn per_block(&self) -> u64 {
        (self.header.cluster_size() * 8) >> self.header.refcount_order
    }

    /// Index and content of each entry of the table that is not empty.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..).zip(self.table.iter().copied()).filter(|&(_, entry)| entry != 0)
    }

    /// The entry of the table with this index, zero where there is none.
    pub fn entry(&self, index: u64) -> u64 {
        self.table.get(index as usize).copied().unwrap_or(0)
    }

    /// What is wrong with an entry of the table.
    pub fn objection(&self, entry: u64) -> Option<&'static str> {
        if entry & RESERVED != 0 {
            Some("has reserved bits set")
        } else if !entry.is_multiple_of(self.header.cluster_size()) {
            Some("is not aligned to a cluster")
        } else if entry >= self.file.size() {
            Some("lies past the end of the file")
        } else {
            None
        }
    }

    /// The block that an entry points to, `None` where there can be none. Past the end of the
    /// file it reads as zeros.
    pub fn block(&self, entry: u64) -> Option<HostOffset> {
        let block = entry & !RESERVED;
        let end = i64::try_from(block.saturating_add(self.header.cluster_size()));
        (end.is_ok() && block.is_multiple_of(self.header.cluster_size())).then_some(HostOffset(block))
    }

    /// The refcount of a cluster, `None` where its block cannot be read.
    pub fn of(&self, cluster: u64) -> Result<Option<u64>> {
        let entry = self.entry(cluster / self.per_block());
        if entry & !RESERVED == 0 {
            return Ok(Some(0));
        }
        let Some(block) = self.block(entry) else { return Ok(None) };
        let bits = 1 << self.header.refcount_order;
        let bit = cluster % self.per_block() * bits;
        let size = PIECE.min(self.header.cluster_size());
        let piece = self.piece(block.0 + bit / 8 / size * size, size)?;
        Ok(Some(read_refcount(&piece, self.header.refcount_order, bit % (size * 8) / bits)))
    }

    fn piece(&self, at: u64, size: u64) -> Result<Arc<[u8]>> {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(piece) = pieces.get(&at) {
            return Ok(piece.clone());
        }
        let mut bytes = vec![0; size as usize];
        self.file.read_at(HostOffset(at), &mut bytes)?;
        if pieces.len() == PIECES {
            pieces.clear();
        }
        let piece: Arc<[u8]> = bytes.into();
        pieces.insert(at, piece.clone());
        Ok(piece)
    }
}
