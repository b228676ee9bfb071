//! L1 and L2 tables as they will be: changed in memory, written by the writer when what they point
//! to is durable.
//!
//! A *view* is the active disk or an internal snapshot; each has an L1 table. Views share L2
//! tables and clusters; what is added to a shared L2 table belongs to all its owners, which is
//! right for what a rebase adds: all of them saw the same backing file there. What a guest writes
//! belongs to the active disk alone, which gets a table of its own first.
//!
//! Readers of an image that is being written look in here while the writer changes it: no method
//! holds the lock longer than it takes to read one piece of a table.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Context, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::GuestOffset;
use crate::layer::qcow2::entry::{self, COPIED, L2Entry};
use crate::layer::qcow2::header::Header;
use crate::layer::qcow2::l1::L1Table;
use crate::layer::qcow2::refcount::Write;
use crate::layer::qcow2::room;
use crate::layer::qcow2::table::{L2Slice, TableCache, encode_words, read_words};

/// L2 tables are changed and written in pieces of at most this many bytes.
const SLICE_BYTES: u64 = 4096;
/// Bytes of pieces that are kept although they are in the file.
const CLEAN_BUDGET: u64 = 8 << 20;

/// The L1 table of a view.
#[derive(Debug)]
pub struct View {
    /// Where the table lies.
    pub l1_at: HostOffset,
    /// For how many entries it has room.
    pub entries: u64,
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
    words: Arc<L2Slice>,
    is_dirty: bool,
    /// The host has set space aside for it.
    has_room: bool,
}

/// The tables of all views. Clones are the same tables.
#[derive(Clone, Debug)]
pub struct Staged {
    file: Arc<dyn HostFile>,
    header: Arc<Header>,
    tables: Arc<RwLock<Tables>>,
}

#[derive(Debug)]
struct Tables {
    views: Vec<View>,
    /// L1 entries that are not yet in the file: view and index.
    dirty_l1: BTreeSet<(usize, u64)>,
    slices: BTreeMap<HostOffset, Slice>,
    dirty_slices: usize,
    /// Tables that no L1 entry in the file points to yet, and that may not be in the file.
    new_tables: BTreeSet<HostOffset>,
    /// Names the compressed clusters of the image in a cache; another one when some were freed.
    cluster_number: u64,
}

impl Staged {
    /// Nothing staged yet. The active disk is the first view.
    pub fn new(file: Arc<dyn HostFile>, header: Header, views: Vec<View>) -> Self {
        let tables = Tables {
            views,
            dirty_l1: BTreeSet::new(),
            slices: BTreeMap::new(),
            dirty_slices: 0,
            new_tables: BTreeSet::new(),
            cluster_number: TableCache::next_layer_number(),
        };
        Self { file, header: Arc::new(header), tables: Arc::new(RwLock::new(tables)) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The L1 entry of a view with that index.
    pub fn l1_entry(&self, view: usize, index: u64) -> u64 {
        self.read().views[view].l1.entry(index)
    }

    /// The first index from `from` on whose L1 entry is not empty.
    pub fn next_used(&self, view: usize, from: u64) -> Option<u64> {
        self.read().views[view].l1.next_used(from)
    }

    /// Where the L1 table of the active disk lies, and for how many entries it has room.
    pub fn l1_place(&self) -> (HostOffset, u64) {
        let tables = self.read();
        (tables.views[0].l1_at, tables.views[0].entries)
    }

    /// The L1 table of the active disk, none of which waits to be written, lies elsewhere now.
    pub fn move_l1(&self, at: HostOffset, entries: u64) {
        let tables = &mut *self.write();
        (tables.views[0].l1_at, tables.views[0].entries) = (at, entries);
    }

    /// The active disk has so many bytes.
    pub fn set_size(&self, size: u64) {
        self.write().views[0].size = size;
    }

    /// The virtual size of a view in bytes.
    pub fn size(&self, view: usize) -> u64 {
        self.read().views[view].size
    }

    /// The largest virtual size of a view in bytes.
    pub fn end(&self) -> u64 {
        self.read().views.iter().map(|view| view.size).max().unwrap_or(0)
    }

    /// The distinct L2 tables for the cluster at `at`, each with all views that use it. Views that
    /// have no table are listed only if `at` lies in their disk.
    pub fn tables_at(&self, at: GuestOffset) -> Result<Vec<Shared>> {
        let index = at.0 / self.header.l2_coverage();
        let mut found: Vec<Shared> = Vec::new();
        // An image can have 65,536 snapshots, each with tables of its own.
        let mut places: HashMap<Option<HostOffset>, usize> = HashMap::new();
        for (number, view) in self.read().views.iter().enumerate() {
            let word = view.l1.entry(index);
            let table = entry::l2_table(word, &self.header).path(self.file.path())?;
            if table.is_none() && at.0 >= view.size {
                continue;
            }
            let place = *places.entry(table).or_insert_with(|| {
                found.push(Shared { table, views: Vec::new() });
                found.len() - 1
            });
            found[place].views.push(number);
        }
        Ok(found)
    }

    /// The entry for the cluster at `at` in that table.
    pub fn entry(&self, table: HostOffset, at: GuestOffset) -> Result<L2Entry> {
        let (slice, index) = self.slice_with(table, at)?;
        Ok(slice.entry(index, self.header.l2_entry_size()))
    }

    /// The piece of that table with the entry for the cluster at `at`, and which it is there.
    pub fn slice_with(&self, table: HostOffset, at: GuestOffset) -> Result<(Arc<L2Slice>, u64)> {
        let (slice_at, words) = self.place(table, at);
        let index = (words.start * 8) as u64 / self.header.l2_entry_size();
        Ok((self.slice(table, slice_at)?, index))
    }

    /// Stages another entry there.
    ///
    /// # Errors
    /// The table cannot be read, or lies in a hole of a file that has no room for it.
    pub fn set_entry(&self, table: HostOffset, at: GuestOffset, entry: L2Entry) -> Result<()> {
        let (slice_at, words) = self.place(table, at);
        let slice = self.slice(table, slice_at)?;
        if !self.has_room(table, slice_at) {
            room::keep(&*self.file, slice_at, &encode_words(slice.words()))?;
        }
        let changed = slice.with(words.start, &[entry.word, entry.bitmap][..words.len()]);
        self.write().put(slice_at, changed.into());
        Ok(())
    }

    fn has_room(&self, table: HostOffset, slice_at: HostOffset) -> bool {
        let tables = self.read();
        tables.new_tables.contains(&table) || tables.slices.get(&slice_at).is_some_and(|slice| slice.has_room)
    }

    /// Lets views use the new, empty L2 table at `table`, which has its room, for the cluster at `at`.
    ///
    /// # Errors
    /// An L1 table lies in a hole of a file that has no room for it.
    pub fn link(&self, views: &[usize], at: GuestOffset, table: HostOffset) -> Result<()> {
        let index = at.0 / self.header.l2_coverage();
        views.iter().try_for_each(|view| self.keep_l1_room(*view, index))?;
        let copied = if views.len() == 1 { COPIED } else { 0 };
        let tables = &mut *self.write();
        for &view in views {
            tables.views[view].l1.set_entry(index, table.0 | copied);
            tables.dirty_l1.insert((view, index));
        }
        tables.new_tables.insert(table);
        Ok(())
    }

    fn keep_l1_room(&self, view: usize, index: u64) -> Result<()> {
        let (at, entry) = {
            let View { l1_at, l1, .. } = &self.read().views[view];
            (*l1_at + index * 8, l1.entry(index))
        };
        room::keep(&*self.file, at, &entry.to_be_bytes())
    }

    /// Lets the active disk use the new L2 table at `copy`, which has its room, in the place of the one at
    /// `table`, with the same entries.
    ///
    /// # Errors
    /// As [`link`](Self::link); the table cannot be read.
    pub fn link_copy(&self, at: GuestOffset, table: HostOffset, copy: HostOffset) -> Result<()> {
        let step = self.slice_bytes();
        let starts = || (0..self.header.cluster_size()).step_by(step as usize);
        let slices = starts().map(|start| self.slice(table, table + start)).collect::<Result<Vec<_>>>()?;
        let index = at.0 / self.header.l2_coverage();
        self.keep_l1_room(0, index)?;
        let tables = &mut *self.write();
        starts().zip(slices).for_each(|(start, slice)| tables.put(copy + start, slice));
        tables.views[0].l1.set_entry(index, copy.0 | COPIED);
        tables.dirty_l1.insert((0, index));
        tables.new_tables.insert(copy);
        Ok(())
    }

    /// New tables, whole: to be durable before the L1 entries that point to them.
    pub fn new_table_writes(&self) -> Vec<Write> {
        let size = self.header.cluster_size();
        let tables = &*self.read();
        let whole = |&table: &HostOffset| {
            let mut bytes = vec![0; size as usize];
            for (at, slice) in tables.slices.range(table..table + size) {
                let start = (at.0 - table.0) as usize;
                let words = slice.words.words();
                bytes[start..start + words.len() * 8].copy_from_slice(&encode_words(words));
            }
            (table, bytes)
        };
        tables.new_tables.iter().map(whole).collect()
    }

    /// All other changes, which let guest offsets lead elsewhere: L2 slices and L1 entries.
    pub fn links(&self) -> Vec<Write> {
        let size = self.header.cluster_size();
        let tables = &*self.read();
        let is_new = |at: HostOffset| tables.new_tables.contains(&HostOffset(at.0 / size * size));
        let slices = tables.slices.iter().filter(|(at, slice)| slice.is_dirty && !is_new(**at));
        let mut writes: Vec<Write> =
            slices.map(|(at, slice)| (*at, encode_words(slice.words.words()))).collect();
        writes.extend(tables.dirty_l1.iter().map(|(view, index)| {
            let View { l1_at, l1, .. } = &tables.views[*view];
            (*l1_at + index * 8, l1.entry(*index).to_be_bytes().to_vec())
        }));
        writes
    }

    /// All that [`new_table_writes`](Self::new_table_writes) and [`links`](Self::links) have returned is
    /// in the file.
    pub fn are_written(&self) {
        let tables = &mut *self.write();
        tables.slices.values_mut().for_each(|slice| slice.is_dirty = false);
        tables.dirty_slices = 0;
        tables.dirty_l1.clear();
        tables.new_tables.clear();
        tables.drop_clean(CLEAN_BUDGET / self.slice_bytes());
    }

    /// Bytes of memory that wait to be written.
    pub fn bytes(&self) -> usize {
        let tables = self.read();
        tables.dirty_slices * self.slice_bytes() as usize
            + (tables.new_tables.len() << self.header.cluster_bits)
            + tables.dirty_l1.len() * 8
    }

    /// By which number compressed clusters are remembered.
    pub fn cluster_number(&self) -> u64 {
        self.read().cluster_number
    }

    /// Lets what is remembered of compressed clusters be forgotten: their place is free.
    pub fn forget_clusters(&self) {
        self.write().cluster_number = TableCache::next_layer_number();
    }

    fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.header.cluster_size())
    }

    fn place(&self, table: HostOffset, at: GuestOffset) -> (HostOffset, Range<usize>) {
        let index = (at.0 >> self.header.cluster_bits) % self.header.l2_entries();
        let byte = index * self.header.l2_entry_size();
        let slice = self.slice_bytes();
        let start = (byte % slice / 8) as usize;
        (table + byte / slice * slice, start..start + (self.header.l2_entry_size() / 8) as usize)
    }

    fn slice(&self, table: HostOffset, at: HostOffset) -> Result<Arc<L2Slice>> {
        if let Some(slice) = self.read().slices.get(&at) {
            return Ok(slice.words.clone());
        }
        // Read under the lock: what is read must not be written at the same time.
        let tables = &mut *self.write();
        if let Some(slice) = tables.slices.get(&at) {
            return Ok(slice.words.clone());
        }
        let words = self.slice_bytes() / 8;
        let words = match tables.new_tables.contains(&table) {
            true => vec![0; words as usize].into(),
            false => read_words(&*self.file, at, words)?,
        };
        let words = Arc::new(L2Slice::new(words));
        tables.drop_clean(2 * CLEAN_BUDGET / self.slice_bytes());
        tables.slices.insert(at, Slice { words: words.clone(), is_dirty: false, has_room: false });
        Ok(words)
    }
}

impl Tables {
    fn put(&mut self, at: HostOffset, words: Arc<L2Slice>) {
        let before = self.slices.insert(at, Slice { words, is_dirty: true, has_room: true });
        self.dirty_slices += usize::from(!before.is_some_and(|slice| slice.is_dirty));
    }

    /// Drops what is in the file, if there are more pieces than `limit` of all kinds.
    fn drop_clean(&mut self, limit: u64) {
        if self.slices.len() as u64 > limit {
            self.slices.retain(|_, slice| slice.is_dirty);
        }
    }
}
