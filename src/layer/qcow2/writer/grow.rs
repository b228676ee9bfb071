//! A larger disk: a larger L1 table where the old one is too short, then the size in the header.
//!
//! In an order that leaves a valid image at any cut: the new L1 table and its refcounts are durable before
//! the header names it, and what lies behind the old end reads as zeros before the header says that it is
//! part of the disk.

use super::Writer;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::HostOffset;
use crate::layer::qcow2::header::{MAX_L1_BYTES, field};
use crate::layer::qcow2::table::encode_words;

impl Writer {
    /// Refuses what cannot grow to so many bytes.
    pub(in crate::layer::qcow2) fn refuse_growth(&self, size: u64) -> Result<()> {
        let refused = |what: &str| Err(Error::unsupported(what).path(self.file.path()));
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("the size of a disk is a multiple of 512").path(self.file.path()));
        }
        if size.div_ceil(self.header().l2_coverage()) * 8 > MAX_L1_BYTES || i64::try_from(size).is_err() {
            let what = "the disk cannot have so many bytes with clusters of this size";
            return Err(Error::new(ErrorKind::NoSpace, what).path(self.file.path()));
        }
        if self.header().version == 2 && self.views.len() > 1 {
            return refused("a version 2 image does not record the size of its snapshots, and cannot grow");
        }
        if !self.views[0].bitmaps()?.is_empty() {
            return refused("a disk with persistent bitmaps, which would have to grow too, cannot grow");
        }
        Ok(())
    }

    /// Makes room for the tables of a disk of so many bytes; the header says its old size still.
    pub(in crate::layer::qcow2) fn make_room(&self, size: u64) -> Result<()> {
        self.mark_written()?;
        let entries = size.div_ceil(self.header().l2_coverage());
        let state = &mut *self.state();
        let (old_at, old_entries) = self.staged.l1_place();
        if entries > old_entries {
            let clusters = (entries * 8).div_ceil(self.header().cluster_size());
            let at = state.refcounts.allocate_together(clusters)?;
            // All that the table leads to is durable after this, and so are its refcounts.
            self.commit_state(state)?;
            let words: Vec<u64> = (0..entries).map(|index| self.staged.l1_entry(0, index)).collect();
            self.file.write_at(at, &encode_words(&words))?;
            self.file.sync()?;
            // At most MAX_L1_BYTES / 8.
            let pointer = [&(entries as u32).to_be_bytes()[..], &at.0.to_be_bytes()].concat();
            let pointed = self.file.write_at(HostOffset(field::L1_TABLE), &pointer);
            // Should this fail, nobody knows which table the header names.
            pointed.and_then(|()| self.file.sync()).inspect_err(|error| state.lost = Some(error.kind()))?;
            self.staged.move_l1(at, entries);
            let old_clusters = (old_entries * 8).div_ceil(self.header().cluster_size());
            state.refcounts.release(old_at, old_clusters, 1)?;
        }
        if self.header().has_data_file() && self.data_file.size() < size {
            self.data_file.set_size(size)?;
        }
        self.staged.set_size(size);
        Ok(())
    }

    /// Lets the header say the size, when all that lies behind the old end reads as zeros.
    pub(in crate::layer::qcow2) fn set_size(&self, size: u64) -> Result<()> {
        let state = &mut *self.state();
        self.commit_state(state)?;
        self.file.write_at(HostOffset(field::SIZE), &size.to_be_bytes()).path(self.file.path())?;
        self.file.sync()
    }
}
