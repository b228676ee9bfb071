//! L1 and L2 tables as they will be: changed in memory, written by `update` when what they point
//! to is durable.
//!
//! A *view* is the active disk or an internal snapshot; each has an L1 table. Views share L2
//! tables and clusters; what is added to a shared L2 table belongs to all its owners, which is
//! right for what a rebase adds: all of them saw the same backing file there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Context, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::GuestOffset;
use crate::layer::qcow2::entry::{self, COPIED, L2Entry};
use crate::layer::qcow2::header::Header;
use crate::layer::qcow2::l1::L1Table;
use crate::layer::qcow2::refcount::Write;
use crate::layer::qcow2::table::{encode_words, read_words};

/// L2 tables are changed and written in pieces of at most this many bytes.
const SLICE_BYTES: u64 = 4096;

/// The L1 table of a view.
#[derive(Debug)]
pub struct View {
    /// Where the table lies.
    pub l1_at: HostOffset,
    /// Its entries.
    pub l1: L1Table,
    /// Virtual size of the view in bytes.
    pub size: u64,
}

/// An L2 table that one or more views use at the same place, or the place where they have none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The table, `None` if these views have none.
    pub table: Option<HostOffset>,
    /// The views, by index.
    pub views: Vec<usize>,
}

#[derive(Debug)]
struct Slice {
    words: Vec<u64>,
    is_dirty: bool,
}

/// The tables of all views.
#[derive(Debug)]
pub struct Staged {
    file: Arc<dyn HostFile>,
    header: Header,
    views: Vec<View>,
    /// L1 entries that are not yet in the file: view and index.
    dirty_l1: BTreeSet<(usize, u64)>,
    slices: BTreeMap<HostOffset, Slice>,
    /// Tables that no L1 entry in the file points to yet.
    new_tables: BTreeSet<HostOffset>,
}

impl Staged {
    /// Nothing staged yet. The active disk is the first view.
    pub fn new(file: Arc<dyn HostFile>, header: Header, views: Vec<View>) -> Self {
        Self {
            file,
            header,
            views,
            dirty_l1: BTreeSet::new(),
            slices: BTreeMap::new(),
            new_tables: BTreeSet::new(),
        }
    }

    /// The distinct L2 tables for the cluster at `at`, each with all views that use it. Views that
    /// have no table are listed only if `at` lies in their disk.
    pub fn tables_at(&self, at: GuestOffset) -> Result<Vec<Shared>> {
        let index = at.0 / self.header.l2_coverage();
        let mut found: Vec<Shared> = Vec::new();
        for (number, view) in self.views.iter().enumerate() {
            let word = view.l1.entry(index);
            let table = entry::l2_table(word, &self.header).path(self.file.path())?;
            if table.is_none() && at.0 >= view.size {
                continue;
            }
            match found.iter_mut().find(|shared| shared.table == table) {
                Some(shared) => shared.views.push(number),
                None => found.push(Shared { table, views: vec![number] }),
            }
        }
        Ok(found)
    }

    /// The entry for the cluster at `at` in that table.
    pub fn entry(&mut self, table: HostOffset, at: GuestOffset) -> Result<L2Entry> {
        let (slice_at, words) = self.place(table, at);
        let words = &self.slice(table, slice_at)?.words[words];
        Ok(L2Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) })
    }

    /// Stages another entry there.
    pub fn set_entry(&mut self, table: HostOffset, at: GuestOffset, entry: L2Entry) -> Result<()> {
        let (slice_at, words) = self.place(table, at);
        let slice = self.slice(table, slice_at)?;
        let length = words.len();
        slice.words[words].copy_from_slice(&[entry.word, entry.bitmap][..length]);
        slice.is_dirty = true;
        Ok(())
    }

    /// Lets views that had none use the new, empty L2 table at `table` for the cluster at `at`.
    pub fn link(&mut self, views: &[usize], at: GuestOffset, table: HostOffset) {
        let index = at.0 / self.header.l2_coverage();
        let copied = if views.len() == 1 { COPIED } else { 0 };
        for &view in views {
            self.views[view].l1.set_entry(index, table.0 | copied);
            self.dirty_l1.insert((view, index));
        }
        self.new_tables.insert(table);
    }

    /// New tables, whole: to be durable before the L1 entries that point to them.
    pub fn take_new_tables(&mut self) -> Vec<Write> {
        let size = self.header.cluster_size();
        let mut writes = Vec::new();
        for table in std::mem::take(&mut self.new_tables) {
            let mut bytes = vec![0; size as usize];
            for (at, slice) in self.slices.range_mut(table..table + size) {
                let start = (at.0 - table.0) as usize;
                bytes[start..start + slice.words.len() * 8].copy_from_slice(&encode_words(&slice.words));
                slice.is_dirty = false;
            }
            writes.push((table, bytes));
        }
        writes
    }

    /// All other changes, which let guest offsets lead elsewhere: L2 slices and L1 entries. What
    /// was staged is forgotten.
    pub fn take_links(&mut self) -> Vec<Write> {
        let slices = std::mem::take(&mut self.slices);
        let dirty = slices.into_iter().filter(|(_, slice)| slice.is_dirty);
        let mut writes: Vec<Write> = dirty.map(|(at, slice)| (at, encode_words(&slice.words))).collect();
        for (view, index) in std::mem::take(&mut self.dirty_l1) {
            let View { l1_at, l1, .. } = &self.views[view];
            writes.push((*l1_at + index * 8, l1.entry(index).to_be_bytes().to_vec()));
        }
        writes
    }

    /// Bytes of memory that staging takes, and so many bytes of new tables.
    pub fn bytes(&self) -> usize {
        let slice = SLICE_BYTES.min(self.header.cluster_size()) as usize;
        self.slices.len() * slice + (self.new_tables.len() << self.header.cluster_bits)
    }

    fn place(&self, table: HostOffset, at: GuestOffset) -> (HostOffset, Range<usize>) {
        let index = (at.0 >> self.header.cluster_bits) % self.header.l2_entries();
        let byte = index * self.header.l2_entry_size();
        let slice = SLICE_BYTES.min(self.header.cluster_size());
        let start = (byte % slice / 8) as usize;
        (table + byte / slice * slice, start..start + (self.header.l2_entry_size() / 8) as usize)
    }

    fn slice(&mut self, table: HostOffset, at: HostOffset) -> Result<&mut Slice> {
        let words = SLICE_BYTES.min(self.header.cluster_size()) / 8;
        if !self.slices.contains_key(&at) {
            let words = match self.new_tables.contains(&table) {
                true => vec![0; words as usize],
                false => read_words(&*self.file, at, words)?.into_vec(),
            };
            self.slices.insert(at, Slice { words, is_dirty: false });
        }
        Ok(self.slices.get_mut(&at).expect("it was there, or has just been inserted"))
    }
}
