//! Structures that overlap: what is changed in place must be nothing else besides.
//!
//! The refcounts of a hostile image can say that a cluster is the header, or a table, *and* a piece
//! of the disk. A check counts that as no error; writing the one would change the other.

use std::ops::Range;

use super::{REPAIR, RESCUE, Writer};
use crate::error::{Error, Result};
use crate::file::HostOffset;
use crate::layer::qcow2::header::Header;
use crate::layer::qcow2::snapshot::Snapshot;

/// What an L1 table takes.
fn l1_range(offset: u64, entries: u32) -> Range<u64> {
    offset..offset + u64::from(entries) * 8
}

/// Refuses L1 tables that overlap: thousands of snapshots could share one, and cost memory each.
pub(super) fn refuse_overlapping_l1(header: &Header, snapshots: &[Snapshot]) -> Result<()> {
    let of_snapshots = snapshots.iter().map(|snapshot| l1_range(snapshot.l1_offset, snapshot.l1_entries));
    let active = l1_range(header.l1_offset, header.l1_entries);
    let mut ranges: Vec<_> = of_snapshots.chain([active]).filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    match ranges.windows(2).find(|pair| pair[0].end > pair[1].start) {
        None => Ok(()),
        Some(pair) => Err(Error::corrupt("two L1 tables overlap").offset(pair[1].start)),
    }
}

impl Writer {
    /// Refuses an image in which a structure is used for anything else as well, as the `overlap` that a
    /// check found, or in which clusters of two views share a place that nobody counts.
    pub(super) fn refuse_shared_structures(&self, overlap: Option<(&str, HostOffset)>) -> Result<()> {
        let header = self.header();
        if header.has_data_file() && self.views.len() > 1 {
            let what =
                "an image with an external data file has snapshots, which share its clusters uncounted";
            return Err(Error::unsupported(what).hint(RESCUE));
        }
        if let Some((what, at)) = overlap {
            let what = format!("the {what} is used for something else as well");
            return Err(Error::corrupt(what).offset(at.0).hint(RESCUE));
        }
        let state = &mut *self.state();
        let refcount_table = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let start = header.refcount_table_offset;
        let mut structures = vec![
            ("header", 0..header.cluster_size()),
            ("refcount table", start..start + refcount_table),
            ("L1 table", l1_range(header.l1_offset, header.l1_entries)),
        ];
        let of_snapshots = self.views[0].snapshots()?;
        structures.extend(of_snapshots.iter().map(|s| ("L1 table", l1_range(s.l1_offset, s.l1_entries))));
        for (what, range) in structures {
            for at in range.step_by(header.cluster_size() as usize) {
                let count = state.refcounts.of(HostOffset(at))?;
                if count != 1 {
                    let what = format!("the {what} has a refcount of {count}, which is not 1");
                    return Err(Error::corrupt(what).offset(at).hint(REPAIR));
                }
            }
        }
        Ok(())
    }
}
