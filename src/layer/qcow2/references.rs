//! Who points where: every reference from the image's own structures to its host clusters,
//! counted.
//!
//! Reads metadata only and judges what it reads; [`check`](super::check) compares the counts with
//! the refcounts that the image stores. Works on hostile images too: a table is read once however
//! many tables point to it, and the tables may not take much more room than the file does on its
//! disk, so that time and memory follow the bytes that are really there. No structure points
//! upwards, so that there are no loops.

use std::collections::{BTreeMap, HashSet};

use super::bitmap::{Bitmap, Directory, data_cluster};
use super::check::CheckReport;
use super::counts::Counts;
use super::entry::{COMPRESSED, COPIED, Cluster, L1_RESERVED, L2_RESERVED, L2Entry, OFFSET, Standard, ZERO};
use super::extension::kind;
use super::header::{Header, autoclear};
use super::l1::L1Table;
use super::snapshot::{Fault, Snapshot, SnapshotTable};
use super::stored::StoredRefcounts;
use super::table::read_words;
use super::{Layer, Qcow2};
use crate::error::Result;
use crate::file::{HostFile, HostOffset};

/// What L1 and bitmap tables may take together beyond eight times the space of the file on its
/// disk. Tables of a valid image do not overlap; those of a hostile one could be read for ever.
const TABLE_ALLOWANCE: u64 = 1 << 30;
/// A table that is a hole of the file is not read: it costs this much less.
const HOLE_DISCOUNT: u64 = 16;

/// How many L1 entries point to an L2 table.
#[derive(Clone, Copy, Default)]
pub(super) struct Uses {
    pub by_active: u64,
    pub by_all: u64,
    /// Whether anything in the table is wrong that is not a refcount or a flag.
    pub is_damaged: bool,
}

/// All that the walk brought home.
#[derive(Default)]
pub(super) struct References {
    /// How often each cluster is pointed to.
    pub counts: Counts,
    /// The L2 tables by host offset.
    pub l2_tables: BTreeMap<u64, Uses>,
    /// Whether there are pointers that could not be followed: what they lead to looks unused.
    pub is_incomplete: bool,
    /// Whether refcount table or blocks cannot be trusted to be what they are.
    pub has_damaged_refcounts: bool,
    /// The first structure that is used for anything else as well: which, and its host offset.
    pub overlap: Option<(&'static str, HostOffset)>,
    /// The structures but for L2 tables: by cluster the place in [`STRUCTURES`], from 1 on.
    structures: Counts,
}

/// What has its clusters alone in every valid image.
const STRUCTURES: [&str; 8] = [
    "header",
    "L1 table",
    "L1 table of a snapshot",
    "snapshot table",
    "bitmap directory",
    "bitmap table",
    "refcount table",
    "refcount block",
];

/// The walk through all structures of one image.
pub(super) struct Walk<'a> {
    image: &'a Qcow2,
    header: &'a Header,
    file: &'a dyn HostFile,
    stored: &'a StoredRefcounts<'a>,
    report: &'a mut CheckReport,
    found: References,
    /// What was found that is neither a refcount nor a flag.
    objections: u64,
    /// References beyond what a refcount can say.
    excess: u64,
    table_bytes_left: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        image: &'a Qcow2,
        stored: &'a StoredRefcounts<'a>,
        report: &'a mut CheckReport,
    ) -> Result<Self> {
        let file: &dyn HostFile = &**image.file();
        Ok(Self {
            image,
            header: image.header(),
            file,
            stored,
            report,
            found: References::default(),
            objections: 0,
            excess: 0,
            table_bytes_left: TABLE_ALLOWANCE + file.allocated_bytes()?.saturating_mul(8),
        })
    }

    /// Counts everything. The refcount structures come last: it is an error if anything else
    /// points to them.
    pub(super) fn count(mut self) -> Result<References> {
        self.guest_structures()?;
        self.overlaps();
        // What should lie in the place of the structure looks unused: it is lost, not leaked.
        self.found.is_incomplete |= self.found.overlap.is_some();
        // Nothing is lost if one of these leads to a structure: new ones can be made.
        self.refcount_structures()?;
        self.overlaps();
        Ok(self.found)
    }

    /// Counts everything but the refcount structures.
    pub(super) fn count_without_refcounts(mut self) -> Result<Counts> {
        self.guest_structures()?;
        Ok(self.found.counts)
    }

    fn guest_structures(&mut self) -> Result<()> {
        self.add("header", 0, self.header.cluster_size(), 1);
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries);
        self.l1_table("L1 table", offset, entries, Uses { by_active: 1, by_all: 1, ..Uses::default() })?;
        self.snapshots()?;
        let mut tables = std::mem::take(&mut self.found.l2_tables);
        for (offset, uses) in &mut tables {
            let before = self.objections;
            self.l2_table(*offset, *uses)?;
            uses.is_damaged = self.objections > before;
        }
        self.found.l2_tables = tables;
        self.bitmaps()
    }

    /// Looks for structures that something else leads to.
    fn overlaps(&mut self) {
        if self.found.overlap.is_some() {
            return;
        }
        let References { counts, structures, l2_tables, .. } = &self.found;
        let bits = self.header.cluster_bits;
        let other = structures.iter().find(|&(cluster, _)| counts.of(cluster) > 1);
        let other = other.map(|(cluster, number)| (STRUCTURES[number as usize - 1], cluster << bits));
        let table = || l2_tables.iter().find(|(at, uses)| counts.of(*at >> bits) > uses.by_all);
        let Some((what, at)) = other.or_else(|| table().map(|(at, _)| ("L2 table", *at))) else { return };
        self.found.overlap = Some((what, HostOffset(at)));
        self.report.message(format!("The {what} at {at:#x} is used for something else as well"));
    }

    /// Something is wrong with a structure, but what it points to is clear.
    fn object(&mut self, times: u64, text: String) {
        self.objections += 1;
        self.report.corruption(times, text);
    }

    /// Something points nobody knows where.
    fn lose(&mut self, times: u64, text: String) {
        self.found.is_incomplete = true;
        self.object(times, text);
    }

    /// Counts `times` references to each cluster of a range. A range that leaves the file is an
    /// error and not counted; returns false.
    fn add(&mut self, what: &str, offset: u64, size: u64, times: u64) -> bool {
        let is_inside = self.add_structure(what, offset, size, times);
        if !is_inside {
            self.objections += 1;
            self.found.is_incomplete = true;
        }
        is_inside
    }

    /// The same for what is not missed if it is lost.
    fn add_structure(&mut self, what: &str, offset: u64, size: u64, times: u64) -> bool {
        let end = offset.saturating_add(size);
        // The last cluster of a file need not be there, not even in part: it may never have been written.
        if end >= self.file.size().saturating_add(self.header.cluster_size()) {
            let text = format!("ERROR {what} at {offset:#x}, {size} bytes: lies past the end of the file");
            self.report.corruption(times, text);
            return false;
        }
        let kind = STRUCTURES.iter().position(|structure| *structure == what).map(|place| place as u64 + 1);
        for cluster in offset >> self.header.cluster_bits..end.div_ceil(self.header.cluster_size()) {
            if let Some(kind) = kind.filter(|_| self.found.structures.of(cluster) == 0) {
                self.found.structures.add(cluster, kind, u64::MAX);
            }
            let excess = self.found.counts.add(cluster, times, self.stored.max());
            if excess > 0 {
                self.excess += excess;
                let text = format!("ERROR cluster {cluster} is used more often than a refcount can say");
                self.report.corruption(excess, text);
            }
        }
        true
    }

    /// Whether a range of the file is zeros without being read; past the end it is.
    fn is_hole(&self, offset: u64, size: u64) -> Result<bool> {
        if size == 0 {
            return Ok(true);
        }
        let run = self.file.run_at(HostOffset(offset), size)?;
        Ok(!run.is_data && run.length >= size)
    }

    fn affords(&mut self, what: &str, bytes: u64) -> bool {
        let left = self.table_bytes_left.checked_sub(bytes);
        self.table_bytes_left = left.unwrap_or(0);
        if left.is_none() {
            self.found.is_incomplete = true;
            let text =
                format!("ERROR {what} not looked at: the tables claim far more room than the file takes");
            self.report.check_error(1, text);
        }
        left.is_some()
    }

    fn l1_table(&mut self, what: &str, offset: u64, entries: u32, uses: Uses) -> Result<()> {
        let bytes = u64::from(entries) * 8;
        let is_hole = self.is_hole(offset, bytes)?;
        if !self.affords(what, if is_hole { bytes / HOLE_DISCOUNT } else { bytes }) {
            return Ok(());
        }
        self.add(what, offset, bytes, uses.by_all);
        let table = L1Table::read_cut(self.file, offset, entries)?;
        table.used().try_for_each(|(index, entry)| self.l1_entry(what, index, entry, uses))
    }

    fn l1_entry(&mut self, what: &str, index: u64, entry: u64, uses: Uses) -> Result<()> {
        if entry & L1_RESERVED != 0 {
            let text = format!("ERROR {what}, entry {index}: {entry:#018x} has reserved bits set");
            self.lose(uses.by_all, text);
        }
        let table = entry & OFFSET;
        self.add("L2 table", table, self.header.cluster_size(), uses.by_all);
        if !table.is_multiple_of(self.header.cluster_size()) {
            let text = format!("ERROR {what}, entry {index}: {entry:#018x} is not aligned to a cluster");
            self.lose(uses.by_all, text);
        }
        if uses.by_active > 0 && table != 0 {
            let refcount = self.stored.of(table >> self.header.cluster_bits)?;
            self.copied_flag("L1 entry", index, entry, refcount, uses.by_active);
        }
        if table < self.file.size() {
            let so_far = self.found.l2_tables.entry(table).or_default();
            so_far.by_active += uses.by_active;
            so_far.by_all += uses.by_all;
        }
        Ok(())
    }

    /// The flag promises that a refcount is exactly one. Only the active tables keep it up to date.
    /// `refcount` is `None` where it cannot be told.
    fn copied_flag(&mut self, what: &str, index: u64, entry: u64, refcount: Option<u64>, times: u64) {
        let Some(refcount) = refcount else { return };
        if (refcount == 1) != (entry & COPIED != 0) {
            let text =
                format!("ERROR {what} {index}: {entry:#018x} and refcount {refcount} contradict each other");
            self.report.corruption(times, text);
        }
    }

    fn snapshots(&mut self) -> Result<()> {
        if self.header.snapshot_count == 0 {
            return Ok(());
        }
        let table = match SnapshotTable::read_as_it_is(self.file, self.header) {
            Ok(table) => table,
            Err(e) => {
                self.lose(1, format!("ERROR {e}"));
                return Ok(());
            }
        };
        self.add("snapshot table", self.header.snapshots_offset, table.bytes, 1);
        // Snapshots that share an L1 table, which no writer makes, must not cost its length each.
        let mut tables: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for (number, entry) in table.entries.into_iter().enumerate() {
            if entry.is_incomplete {
                self.object(1, format!("ERROR snapshot table entry {number} is incomplete"));
            }
            if self.can_follow(number, entry.fault) {
                let Snapshot { l1_offset, l1_entries, .. } = entry.snapshot;
                *tables.entry((l1_offset, l1_entries)).or_default() += 1;
            }
        }
        for ((offset, entries), by_all) in tables {
            self.l1_table("L1 table of a snapshot", offset, entries, Uses { by_all, ..Uses::default() })?;
        }
        Ok(())
    }

    /// Whether the L1 table of a snapshot can be looked at, with this fault of its entry. With any fault it is
    /// not known what is in use.
    fn can_follow(&mut self, number: usize, fault: Option<Fault>) -> bool {
        self.found.is_incomplete |= fault.is_some();
        match fault {
            None => true,
            Some(Fault::Misplaced(e)) => {
                self.object(1, format!("ERROR snapshot table entry {number}: {e}"));
                false
            }
            Some(Fault::TooMuchExtra(e)) => {
                self.report.check_error(1, format!("ERROR snapshot table entry {number}: {e}"));
                true
            }
            // That the table leaves the file was counted with it.
            Some(Fault::Cut(e) | Fault::Short(e)) => {
                self.report.message(format!("Snapshot table entry {number}: {e}"));
                true
            }
        }
    }

    fn l2_table(&mut self, offset: u64, uses: Uses) -> Result<()> {
        let size = self.header.cluster_size();
        if self.is_hole(offset, size)? {
            return Ok(());
        }
        let words = read_words(self.file, HostOffset(offset), size / 8)?;
        let per_entry = (self.header.l2_entry_size() / 8) as usize;
        let mut expected = None;
        for (index, words) in words.chunks_exact(per_entry).enumerate() {
            let entry = L2Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
            if entry != L2Entry::default() {
                self.l2_entry(index as u64, entry, uses, &mut expected)?;
            }
        }
        Ok(())
    }

    /// `expected` is where the next cluster of the table lies if it is not fragmented.
    fn l2_entry(&mut self, index: u64, found: L2Entry, uses: Uses, expected: &mut Option<u64>) -> Result<()> {
        let (entry, objections) = self.without_what_does_not_matter(found);
        for what in objections {
            let text = format!("ERROR L2 entry {:#018x} {what}", found.word);
            match found.word & COMPRESSED {
                0 => self.object(uses.by_all, text),
                // The flag: what it should be is clear.
                _ => self.report.corruption(uses.by_all, text),
            }
        }
        if entry.word & COMPRESSED != 0 {
            self.compressed_cluster(entry, uses);
            return Ok(());
        }
        match entry.decode(self.header) {
            Ok(Cluster::Standard(Standard { host: Some(host), .. })) => {
                self.standard_cluster(index, entry, host.0, uses, expected)
            }
            Ok(_) => Ok(()),
            Err(e) => {
                self.lose(uses.by_all, format!("ERROR {e}"));
                // It is not to be used, but it keeps the clusters in use that it touches.
                let touched = entry.word & OFFSET;
                if touched.is_multiple_of(self.header.cluster_size()) {
                    return Ok(());
                }
                self.standard_cluster(index, entry, touched, uses, expected)
            }
        }
    }

    fn compressed_cluster(&mut self, entry: L2Entry, uses: Uses) {
        if !self.header.has_data_file() && entry.bitmap == 0 {
            self.report.allocated_clusters += uses.by_active;
            self.report.compressed_clusters += uses.by_active;
            // By nature: they do not begin where clusters do.
            self.report.fragmented_clusters += uses.by_active;
        }
        match entry.decode(self.header) {
            Ok(Cluster::Compressed { at, size }) => {
                let is_near = self.add("compressed cluster", at.0, u64::from(size), uses.by_all);
                // Unlike other clusters it cannot be there without having been written.
                if is_near && at.0 >= self.file.size() {
                    let text = format!("ERROR compressed cluster at {at:#x}: lies past the end of the file");
                    self.lose(uses.by_all, text);
                }
            }
            Ok(Cluster::Standard(_)) => {}
            Err(e) => self.lose(uses.by_all, format!("ERROR {e}")),
        }
    }

    fn standard_cluster(
        &mut self,
        index: u64,
        entry: L2Entry,
        host: u64,
        uses: Uses,
        expected: &mut Option<u64>,
    ) -> Result<()> {
        self.report.allocated_clusters += uses.by_active;
        if expected.is_some_and(|expected| expected != host) {
            self.report.fragmented_clusters += uses.by_active;
        }
        *expected = Some(host + self.header.cluster_size());
        if !self.header.has_data_file() {
            self.add("cluster", host, self.header.cluster_size(), uses.by_all);
        }
        if uses.by_active > 0 {
            // The clusters of an external data file have no refcounts: they count as one.
            let refcount = match self.header.has_data_file() {
                true => Some(1),
                false => self.stored.of(host >> self.header.cluster_bits)?,
            };
            self.copied_flag("L2 entry", index, entry.word, refcount, uses.by_active);
        }
        Ok(())
    }

    /// Bitmaps count only while the autoclear bit says that they are consistent with the image.
    fn bitmaps(&mut self) -> Result<()> {
        let extension = self.image.preamble().extensions.find(kind::BITMAPS);
        let Some(extension) = extension.filter(|_| self.header.autoclear & autoclear::BITMAPS != 0) else {
            return Ok(());
        };
        let directory = match Directory::decode(extension, self.header) {
            Ok(directory) => directory,
            Err(e) => {
                self.lose(1, format!("ERROR {e}"));
                return Ok(());
            }
        };
        if !self.add("bitmap directory", directory.offset, directory.size, 1) {
            return Ok(());
        }
        match directory.read(self.file, self.header) {
            Ok(bitmaps) => bitmaps.iter().try_for_each(|bitmap| self.bitmap(bitmap)),
            Err(e) => {
                self.lose(1, format!("ERROR {e}"));
                Ok(())
            }
        }
    }

    fn bitmap(&mut self, bitmap: &Bitmap) -> Result<()> {
        let bytes = u64::from(bitmap.table_entries) * 8;
        let is_hole = self.is_hole(bitmap.table_offset, bytes)?;
        if !self.affords("a bitmap table", if is_hole { bytes / HOLE_DISCOUNT } else { bytes }) {
            return Ok(());
        }
        self.add("bitmap table", bitmap.table_offset, bytes, 1);
        if is_hole {
            return Ok(());
        }
        let entries = u64::from(bitmap.table_entries);
        for entry in read_words(self.file, HostOffset(bitmap.table_offset), entries)? {
            match data_cluster(entry, self.header) {
                Ok(None) => {}
                Ok(Some(offset)) => {
                    self.add("bitmap data", offset, self.header.cluster_size(), 1);
                }
                Err(e) => self.lose(1, format!("ERROR bitmap '{}': {e}", bitmap.name)),
            }
        }
        Ok(())
    }

    fn refcount_structures(&mut self) -> Result<()> {
        let excess_before = self.excess;
        let bytes = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        let table = self.header.refcount_table_offset;
        let is_inside = self.add_structure("refcount table", table, bytes, 1);
        self.found.has_damaged_refcounts |= !is_inside;
        let mut seen = HashSet::new();
        for (index, block) in self.stored.entries() {
            if let Some(objection) = self.stored.objection(block) {
                self.found.has_damaged_refcounts = true;
                self.report.corruption(1, format!("ERROR refcount block {index} {objection}"));
                continue;
            }
            self.add_structure("refcount block", block, self.header.cluster_size(), 1);
            let uses = self.found.counts.of(block >> self.header.cluster_bits);
            if uses != 1 || !seen.insert(block) {
                self.found.has_damaged_refcounts = true;
                let text = format!("ERROR refcount block {index} is used {uses} times");
                self.report.corruption(1, text);
            }
        }
        let mut clusters = table >> self.header.cluster_bits..(table + bytes) >> self.header.cluster_bits;
        let is_shared = clusters.any(|cluster| self.found.counts.of(cluster) > 1);
        self.found.has_damaged_refcounts |= is_shared || self.excess > excess_before;
        Ok(())
    }

    /// Takes out of an entry what is wrong in it but does not change what it points to, with the
    /// reasons.
    fn without_what_does_not_matter(&self, entry: L2Entry) -> (L2Entry, Vec<&'static str>) {
        let mut objections = Vec::new();
        let L2Entry { mut word, mut bitmap } = entry;
        if word & COMPRESSED != 0 {
            if word & COPIED != 0 {
                objections.push("is compressed but marked as writable in place");
                word &= !COPIED;
            }
            return (L2Entry { word, bitmap }, objections);
        }
        let reserved = L2_RESERVED | if self.header.has_zero_flag() { 0 } else { ZERO };
        if word & reserved != 0 {
            objections.push("has reserved bits set");
            word &= !reserved;
        }
        // Without a host cluster, allocated subclusters are an error of their own.
        if word & (OFFSET | COPIED) != 0 && bitmap & bitmap >> 32 & u64::from(u32::MAX) != 0 {
            objections.push("calls a subcluster both allocated and zero");
            bitmap &= u64::from(u32::MAX);
        }
        (L2Entry { word, bitmap }, objections)
    }
}
