//! Forgetting: the active disk falls through to the backing file again where it held the same
//! bytes, and the clusters are freed.
//!
//! In two steps, for readers may still hold the old tables: first the L2 entries are cleared,
//! durably; when no reader is left (invariant I4), the clusters are punched out and released. What a
//! guest overwrites or discards goes the same way.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crate::error::{Context, ErrorKind, Result};
use crate::file::HostOffset;
use crate::layer::GuestOffset;
use crate::layer::qcow2::entry::{Cluster, L2Entry, SUBCLUSTERS, Standard};

use super::fill::runs;
use super::{State, Writer};

/// What nothing points to any more, once what is staged is durable.
#[derive(Debug, Default)]
pub(super) struct Forgotten {
    /// Host clusters that lose a reference.
    clusters: Vec<HostOffset>,
    /// How many references of each of these clusters are among them.
    pending: HashMap<HostOffset, u64>,
    /// Ranges of the data file that hold nothing any more: offset and bytes.
    ranges: Vec<(HostOffset, u64)>,
    /// Whether compressed clusters are among them.
    has_compressed: bool,
}

impl Forgotten {
    /// Notes that this cluster loses a reference.
    pub fn push(&mut self, cluster: HostOffset) {
        self.clusters.push(cluster);
        *self.pending.entry(cluster).or_default() += 1;
    }

    /// How many references of a cluster are still counted although nothing in memory has them.
    pub fn references(&self, cluster: HostOffset) -> u64 {
        self.pending.get(&cluster).copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.clusters.is_empty() && self.ranges.is_empty()
    }

    /// Notes that the clusters of a compressed one lose a reference each.
    pub fn push_compressed(&mut self, at: HostOffset, size: u32, cluster_size: u64) {
        let first = at.0 / cluster_size * cluster_size;
        let clusters = (at.0 + u64::from(size)).div_ceil(cluster_size) - first / cluster_size;
        (0..clusters).for_each(|number| self.push(HostOffset(first + number * cluster_size)));
        self.has_compressed = true;
    }
}

impl Writer {
    /// Stages that the active disk falls through in `[at, at + length)`, in whole subclusters;
    /// what a snapshot shares stays. Returns how many bytes were forgotten.
    pub(super) fn forget_range(&self, at: GuestOffset, length: u64) -> Result<u64> {
        let state = &mut *self.state();
        let mut forgotten = 0;
        for (cluster, wanted) in self.clusters(at, length) {
            forgotten += self.bytes_of(self.forget_cluster(state, cluster, wanted)?);
        }
        self.commit_if_large(state)?;
        Ok(forgotten)
    }

    /// Which subclusters were forgotten.
    fn forget_cluster(&self, state: &mut State, at: GuestOffset, wanted: u32) -> Result<u32> {
        let shared = state.staged.tables_at(at)?;
        let own = shared.iter().find(|shared| shared.views == [0]).and_then(|shared| shared.table);
        let Some(table) = own else { return Ok(0) };
        if state.refcounts.of(table)? != 1 {
            return Ok(0);
        }
        let entry = state.staged.entry(table, at)?;
        match entry.decode(self.header()).path(self.file.path())? {
            Cluster::Compressed { at: host, size } if wanted == u32::MAX => {
                state.forgotten.push_compressed(host, size, self.header().cluster_size());
                state.staged.set_entry(table, at, L2Entry::default())?;
                Ok(wanted)
            }
            Cluster::Compressed { .. } => Ok(0),
            Cluster::Standard(cluster) => self.forget_standard(state, (table, at), entry, cluster, wanted),
        }
    }

    fn forget_standard(
        &self,
        state: &mut State,
        (table, at): (HostOffset, GuestOffset),
        entry: L2Entry,
        cluster: Standard,
        wanted: u32,
    ) -> Result<u32> {
        let external = self.header().has_data_file();
        if let (Some(host), false) = (cluster.host, external)
            && state.refcounts.of(host)? != 1
        {
            // A snapshot holds it.
            return Ok(0);
        }
        let held = !cluster.unallocated();
        let gone = held & wanted;
        if gone == held {
            state.staged.set_entry(table, at, L2Entry::default())?;
            match cluster.host {
                Some(host) if external => state.forgotten.ranges.push((host, self.header().cluster_size())),
                Some(host) => state.forgotten.push(host),
                None => {}
            }
            return Ok(gone);
        }
        // Some of its subclusters stay, which only extended L2 entries can say.
        let bitmap = entry.bitmap & !(u64::from(gone) | u64::from(gone) << 32);
        state.staged.set_entry(table, at, L2Entry { bitmap, ..entry })?;
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        let host = cluster.host.unwrap_or_default();
        state.forgotten.ranges.extend(
            runs(gone & cluster.allocated)
                .map(|(first, count)| (host + u64::from(first) * size, u64::from(count) * size)),
        );
        Ok(gone)
    }

    /// Punches what was forgotten out of the file and releases its clusters. To be called after a
    /// commit, when nobody reads by the old tables any more.
    pub(super) fn free_forgotten_clusters(&self) -> Result<()> {
        let state = &mut *self.state();
        let released = self.release_forgotten(state);
        released.and(self.commit_state(state))
    }

    /// The same for the counts in memory. One cluster that cannot be released keeps no other.
    pub(super) fn release_forgotten(&self, state: &mut State) -> Result<()> {
        let forgotten = std::mem::take(&mut state.forgotten);
        if forgotten.has_compressed {
            state.staged.forget_clusters();
        }
        let mut holes = forgotten.ranges;
        let mut result = Ok(());
        for cluster in forgotten.clusters {
            match self.release_cluster(state, cluster) {
                Ok(true) => holes.push((cluster, self.header().cluster_size())),
                Ok(false) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        // Nobody else can have any of it yet: the state is ours.
        self.punch_all(holes);
        result
    }

    /// Whether nobody has the cluster any more. One that other compressed clusters share stays.
    fn release_cluster(&self, state: &mut State, cluster: HostOffset) -> Result<bool> {
        let is_last = state.refcounts.of(cluster)? == 1;
        state.refcounts.release(cluster, 1, 1)?;
        Ok(is_last)
    }

    /// Neighbours in one go: a cluster can be smaller than what a device frees.
    fn punch_all(&self, mut holes: Vec<(HostOffset, u64)>) {
        holes.sort_unstable();
        let mut holes = holes.into_iter().peekable();
        while let Some((at, mut length)) = holes.next() {
            while let Some((_, more)) = holes.next_if(|(next, _)| *next == at + length) {
                length += more;
            }
            self.punch(at, length);
        }
    }

    /// Where holes cannot be punched the file keeps the space. Its clusters are free all the same, and
    /// a guest's write has come to its end: it is no error. Says so once.
    pub(super) fn punch(&self, at: HostOffset, length: u64) {
        let Err(error) = self.data_file.punch(at, length) else { return };
        let is_new = !self.has_failed_to_punch.swap(true, Ordering::Relaxed);
        match error.kind() {
            ErrorKind::Unsupported => log::debug!("{error}"),
            _ if is_new => log::warn!("{error}: the file keeps this space, and perhaps more of it"),
            _ => log::debug!("{error}"),
        }
    }
}
