//! Whether the refcounts of an image say what its structures say.
//!
//! Changes nothing. What is counted, and under which name, is what `qemu-img check` counts.

use std::collections::HashSet;

use super::counts::Counts;
use super::header::Header;
use super::refcount::read_refcount;
use super::references::Walk;
use super::stored::StoredRefcounts;
use super::{Layer, Qcow2};
use crate::error::{Context, Result};
use crate::file::{HostFile, HostOffset};

/// So many findings are kept as text; all are counted.
const MAX_MESSAGES: usize = 100;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

    fn message(&mut self, text: String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(text);
        }
    }

    fn compare(&mut self, cluster: u64, stored: u64, counted: u64) {
        if stored < counted {
            self.corruption(1, format!("ERROR cluster {cluster} refcount={stored} reference={counted}"));
        } else if stored > counted {
            self.leaks += 1;
            self.message(format!("Leaked cluster {cluster} refcount={stored} reference={counted}"));
        }
    }
}

/// Counts all references and compares them with the refcounts, for the active disk and all
/// internal snapshots. Fails only where the file cannot be read.
pub fn check(image: &Qcow2) -> Result<CheckReport> {
    check_unnamed(image).path(image.file().path()).doing(|| "checking the image".to_owned())
}

fn check_unnamed(image: &Qcow2) -> Result<CheckReport> {
    let header = image.header();
    let file: &dyn HostFile = &**image.file();
    let mut report =
        CheckReport { total_clusters: header.size.div_ceil(header.cluster_size()), ..CheckReport::default() };
    let stored = StoredRefcounts::read(file, header)?;
    let counts = Walk::new(image, &stored, &mut report)?.count()?;
    let mut comparison = Comparison { header, file, stored: &stored, counts: &counts, report, last: 0 };
    comparison.referenced()?;
    comparison.unreferenced()?;
    let Comparison { report, last, .. } = comparison;
    Ok(CheckReport { image_end_offset: (last + 1) << header.cluster_bits, ..report })
}

struct Comparison<'a> {
    header: &'a Header,
    file: &'a dyn HostFile,
    stored: &'a StoredRefcounts<'a>,
    counts: &'a Counts,
    report: CheckReport,
    /// The last cluster that is in use or said to be.
    last: u64,
}

impl Comparison<'_> {
    fn referenced(&mut self) -> Result<()> {
        for (cluster, counted) in self.counts.iter() {
            if let Some(stored) = self.stored.of(cluster)? {
                self.last = self.last.max(cluster);
                self.report.compare(cluster, stored, counted);
            }
        }
        Ok(())
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
                    self.report.check_error(end - first, text);
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
                if self.counts.of(cluster) == 0 {
                    self.report.compare(cluster, stored, 0);
                }
            }
        }
        Ok(())
    }
}
