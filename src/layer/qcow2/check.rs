//! Whether the refcounts of an image say what its structures say.
//!
//! Changes nothing. What is counted, and under which name, is what `qemu-img check` counts.

use std::collections::{BTreeSet, HashSet};

use super::header::Header;
use super::refcount::read_refcount;
use super::references::{References, Walk};
use super::stored::StoredRefcounts;
use super::{Layer, Qcow2};
use crate::error::{Context, Result};
use crate::file::{HostFile, HostOffset};

/// So many findings are kept as text; all are counted.
const MAX_MESSAGES: usize = 100;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that may damage data, now or with the next write.
    pub corruptions: u64,
    /// Clusters that are allocated but not used: a waste of space, and harmless.
    pub leaks: u64,
    /// What could not be looked at.
    pub check_errors: u64,
    /// The first byte after the last cluster in use.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of these: in the active disk's own clusters.
    pub allocated_clusters: u64,
    /// Of these: not where the cluster before it ends.
    pub fragmented_clusters: u64,
    /// Of these: compressed.
    pub compressed_clusters: u64,
    /// The first findings, a line each.
    pub messages: Vec<String>,
    /// How many more there are.
    pub unlisted: u64,
}

impl CheckReport {
    /// Whether there is nothing to complain of. Leaks do not count: they are harmless.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    pub(super) fn corruption(&mut self, times: u64, text: String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.message(text);
    }

    pub(super) fn check_error(&mut self, times: u64, text: String) {
        self.check_errors = self.check_errors.saturating_add(times);
        self.message(text);
    }

    pub(super) fn message(&mut self, text: String) {
        match self.messages.len() < MAX_MESSAGES {
            true => self.messages.push(text),
            false => self.unlisted += 1,
        }
    }
}

/// What a check found, with what a repair needs to know beyond it.
pub(super) struct Examination {
    pub report: CheckReport,
    pub references: References,
    /// Refcount blocks, by index, with counts that are too low, and with counts that are too high.
    pub low: BTreeSet<u64>,
    pub high: BTreeSet<u64>,
}

/// Counts all references and compares them with the refcounts, for the active disk and all
/// internal snapshots. Fails only where the file cannot be read.
///
/// # Errors
/// The file cannot be read. What is wrong with the image is in the report.
pub fn check(image: &Qcow2) -> Result<CheckReport> {
    examine(image).map(|examination| examination.report)
}

/// The same, with all the particulars.
pub(super) fn examine(image: &Qcow2) -> Result<Examination> {
    examine_unnamed(image).path(image.file().path()).doing(|| "checking the image".to_owned())
}

fn examine_unnamed(image: &Qcow2) -> Result<Examination> {
    let header = image.header();
    let file: &dyn HostFile = &**image.file();
    let mut report =
        CheckReport { total_clusters: header.size.div_ceil(header.cluster_size()), ..CheckReport::default() };
    let stored = StoredRefcounts::read(file, header)?;
    let references = Walk::new(image, &stored, &mut report)?.count()?;
    let found = Examination { report, references, low: BTreeSet::new(), high: BTreeSet::new() };
    let mut comparison = Comparison { header, file, stored: &stored, found, last: 0 };
    comparison.referenced()?;
    comparison.unreferenced()?;
    let Comparison { mut found, last, .. } = comparison;
    found.report.image_end_offset = (last + 1) << header.cluster_bits;
    Ok(found)
}

struct Comparison<'a> {
    header: &'a Header,
    file: &'a dyn HostFile,
    stored: &'a StoredRefcounts<'a>,
    found: Examination,
    /// The last cluster that is in use or said to be.
    last: u64,
}

impl Comparison<'_> {
    fn referenced(&mut self) -> Result<()> {
        let counts = std::mem::take(&mut self.found.references.counts);
        for (cluster, counted) in counts.iter() {
            if let Some(stored) = self.stored.of(cluster)? {
                self.last = self.last.max(cluster);
                self.compare(cluster, stored, counted);
            }
        }
        self.found.references.counts = counts;
        Ok(())
    }

    fn compare(&mut self, cluster: u64, stored: u64, counted: u64) {
        let block = cluster / self.stored.per_block();
        let Examination { report, references, low, high } = &mut self.found;
        if stored < counted {
            report.corruption(1, format!("ERROR cluster {cluster} refcount={stored} reference={counted}"));
            // Without a block there is no place for a count.
            references.has_damaged_refcounts |= self.stored.entry(block) == 0;
            low.insert(block);
        } else if stored > counted {
            report.leaks += 1;
            report.message(format!("Leaked cluster {cluster} refcount={stored} reference={counted}"));
            high.insert(block);
        }
    }

    /// The clusters that no structure points to, whatever their refcounts say.
    fn unreferenced(&mut self) -> Result<()> {
        let clusters = self.file.size().div_ceil(self.header.cluster_size());
        let per_block = self.stored.per_block();
        let mut seen = HashSet::new();
        for (index, entry) in self.stored.entries() {
            let first = index * per_block;
            let end = clusters.min(first.saturating_add(per_block));
            if first >= end {
                break;
            }
            match self.stored.block(entry) {
                // A block that stands for two ranges is an error already, and read only once.
                Some(block) if !seen.insert(block) => {}
                Some(block) => self.unreferenced_in(block, first, end)?,
                None => {
                    let text = format!("Cannot tell the refcounts of clusters {first} to {}", end - 1);
                    self.found.report.check_error(end - first, text);
                }
            }
        }
        Ok(())
    }

    fn unreferenced_in(&mut self, block: HostOffset, first: u64, end: u64) -> Result<()> {
        let size = self.header.cluster_size();
        let run = self.file.run_at(block, size)?;
        if !run.is_data && run.length >= size {
            return Ok(());
        }
        let mut bytes = vec![0; size as usize];
        self.file.read_at(block, &mut bytes)?;
        for cluster in first..end {
            let stored = read_refcount(&bytes, self.header.refcount_order, cluster - first);
            if stored > 0 {
                self.last = self.last.max(cluster);
                if self.found.references.counts.of(cluster) == 0 {
                    self.compare(cluster, stored, 0);
                }
            }
        }
        Ok(())
    }
}
