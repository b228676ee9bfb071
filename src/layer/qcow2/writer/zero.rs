//! Zeros that a guest asks for, with or without their space: zero clusters where the format has them,
//! data where not.
//!
//! What reads as zeros already, by metadata, stays as it is: discarding an empty disk costs nothing.

use super::{Guest, State, Writer};
use crate::error::{Context, Result};
use crate::file::HostOffset;
use crate::layer::qcow2::entry::{COPIED, Cluster, L2Entry, SUBCLUSTERS, Standard, ZERO};
use crate::layer::{GuestOffset, GuestView, Overlay};

/// Bytes that are zeroed in one go, if a cluster is not larger.
const PIECE: u64 = 1 << 20;

impl Guest<'_> {
    /// Lets the guest see zeros. With `may_unmap` the space is given back as well.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&self, view: &dyn GuestView, at: GuestOffset, length: u64, may_unmap: bool) -> Result<()> {
        let end = at + length;
        let mut at = at;
        while at < end {
            let zeros = view.zeros_at(at, end - at)?;
            let next = at + zeros.length;
            if !zeros.are_zero || (zeros.take_space && may_unmap) {
                self.writer.zero_run(view, (at, next), may_unmap)?;
            }
            at = next;
        }
        Ok(())
    }
}

impl Writer {
    /// The same where there may be something else than zeros: piece by piece, so that others can
    /// write between.
    fn zero_run(
        &self,
        view: &dyn GuestView,
        (start, end): (GuestOffset, GuestOffset),
        may_unmap: bool,
    ) -> Result<()> {
        let size = self.header().cluster_size();
        let piece = PIECE.max(size);
        let mut at = start;
        while at < end {
            let next = end.min(GuestOffset(at.0 / piece * piece + piece));
            self.mark_written()?;
            let _held = self.hold_clusters(at, next - at);
            for cluster in (at.0 / size * size..next.0).step_by(size as usize) {
                let range = (at.0.max(cluster), next.0.min(cluster + size));
                self.zero_part(view, GuestOffset(cluster), range, may_unmap)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Zeros the bytes from `start` to `end`, which lie in the cluster at `at`.
    fn zero_part(
        &self,
        view: &dyn GuestView,
        at: GuestOffset,
        (start, end): (u64, u64),
        may_unmap: bool,
    ) -> Result<()> {
        // Behind the end of the disk nobody looks.
        let reach = if end >= self.staged.end() { at.0 + self.header().cluster_size() } else { end };
        let whole = self.subclusters_in(at.0, start, reach);
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        if self.can_say_zero(whole) && self.stage_zeros(at, whole, may_unmap)? {
            // What is left lies before the first whole subcluster, and behind the last.
            let first = at.0 + u64::from(whole.trailing_zeros()) * size;
            let last = at.0 + u64::from(SUBCLUSTERS - whole.leading_zeros()) * size;
            self.write_zeros(view, start, first.min(end))?;
            return self.write_zeros(view, last.max(start), end);
        }
        self.write_zeros(view, start, end)?;
        if self.header().has_data_file() && may_unmap {
            // They are zeros now, and these need no space.
            self.punch(HostOffset(start), end - start);
        }
        Ok(())
    }

    /// Whether an L2 entry can say that these subclusters are zeros.
    fn can_say_zero(&self, subclusters: u32) -> bool {
        let needed = if self.header().has_subclusters() { 1 } else { u32::MAX };
        let is_enough = subclusters.count_ones() >= needed.count_ones();
        // A data file that is a raw image by itself must read as the guest does.
        is_enough && self.has_zero_clusters() && !self.header().has_data_file()
    }

    /// Lets the L2 entry say so; false if it cannot, of a part of a compressed cluster.
    fn stage_zeros(&self, at: GuestOffset, subclusters: u32, may_unmap: bool) -> Result<bool> {
        let state = &mut *self.state();
        let table = self.own_table(state, at)?;
        let before = state.staged.entry(table, at)?;
        let cluster = match before.decode(self.header()).path(self.file.path())? {
            Cluster::Standard(cluster) => cluster,
            Cluster::Compressed { .. } if subclusters == u32::MAX => {
                Standard { host: None, allocated: 0, zero: 0 }
            }
            Cluster::Compressed { .. } => return Ok(false),
        };
        let allocated = cluster.allocated & !subclusters;
        let zero = cluster.zero | subclusters;
        let keeps_host = match before.word & COPIED {
            _ if allocated != 0 => true,
            0 => false,
            _ => !may_unmap,
        };
        let word = if keeps_host && cluster.host.is_some() { before.word & !ZERO } else { 0 };
        let after = match self.header().has_subclusters() {
            true => L2Entry { word, bitmap: u64::from(allocated) | u64::from(zero) << SUBCLUSTERS },
            false => L2Entry { word: word | ZERO, bitmap: 0 },
        };
        self.stage_zero_entry(state, (table, at), before, after)?;
        Ok(true)
    }

    fn stage_zero_entry(
        &self,
        state: &mut State,
        (table, at): (HostOffset, GuestOffset),
        before: L2Entry,
        after: L2Entry,
    ) -> Result<()> {
        if before == after {
            return Ok(());
        }
        self.replace_entry(state, table, at, after)?;
        self.commit_if_large(state)
    }

    fn write_zeros(&self, view: &dyn GuestView, start: u64, end: u64) -> Result<()> {
        if start >= end || self.is_zero(view, GuestOffset(start), end - start)? {
            return Ok(());
        }
        self.write_held(view, GuestOffset(start), &vec![0; (end - start) as usize])
    }
}
