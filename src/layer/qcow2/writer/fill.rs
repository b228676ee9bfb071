//! Filling: new clusters for guest bytes that the overlay did not hold, in all views at once.
//!
//! Owns what a fill is: find the L2 entries that lack something, find host clusters for them, write
//! the content, stage the entries. Metadata changes in memory only; when it is written, and in
//! which order, is the writer's business.

use std::ops::Range;
use std::sync::Arc;

use super::compress::Deflated;
use super::staged::Shared;
use super::{REPAIR, Staged, State, Writer};
use crate::error::{Context, Error, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::qcow2::entry::{COPIED, Cluster, L2Entry, SUBCLUSTERS, ZERO};
use crate::layer::qcow2::room;
use crate::layer::{Filled, GuestOffset};

/// One host cluster that gets content, and the L2 entries that will point to it.
#[derive(Debug)]
pub(super) struct Placement {
    /// The guest cluster.
    pub at: GuestOffset,
    /// The host cluster, or where in it a compressed one begins.
    pub host: HostOffset,
    /// Bit n: subcluster n gets content.
    pub subclusters: u32,
    /// The entry that all of `tables` have now, and the one that they will have.
    pub before: L2Entry,
    pub after: L2Entry,
    pub tables: Vec<HostOffset>,
    /// How many L1 tables lead to the cluster in all.
    pub owners: u64,
    pub origin: Origin,
    /// The tables that the views had for the cluster: a guest's write to any other cluster of the same table
    /// can give the active disk one of its own meanwhile, which knows nothing of this placement.
    pub shape: Arc<[Shared]>,
}

impl Placement {
    pub fn is_compressed(&self) -> bool {
        matches!(self.origin, Origin::Compressed { .. })
    }
}

/// Where the host cluster of a [`Placement`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// It was the entry's already; some of its subclusters were not in use.
    InPlace,
    /// It was free.
    Fresh,
    /// So many bytes that were free, for a compressed cluster.
    Compressed { length: u64 },
    /// It is a part of an external data file, where clusters are not counted.
    External,
}

/// After so many bytes of data the disk is told to begin with them.
const WRITE_BACK: u64 = 32 << 20;

/// Sharing an extent costs about as much as copying so many bytes.
const WORTH_SHARING: usize = 64 << 10;

/// Guest bytes to be filled in.
pub(super) struct Filling<'a> {
    start: GuestOffset,
    bytes: &'a [u8],
    /// Where else they lie, from `start` on.
    stored: Option<(&'a dyn HostFile, HostOffset)>,
    /// Of the clusters that are to be compressed.
    pub payloads: Deflated,
}

impl Filling<'_> {
    fn part(&self, at: GuestOffset, length: usize) -> &[u8] {
        let from = (at - self.start) as usize;
        &self.bytes[from..from + length]
    }
}

/// L2 tables that have the same entry for a guest cluster, and how many L1 tables lead there.
pub(super) struct Group {
    pub entry: L2Entry,
    pub tables: Vec<HostOffset>,
    pub owners: u64,
}

impl Writer {
    /// Bit n: subcluster n of the cluster at `cluster` lies in `[start, end)` as a whole.
    pub(super) fn subclusters_in(&self, cluster: u64, start: u64, end: u64) -> u32 {
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        let first = start.saturating_sub(cluster).div_ceil(size);
        let end = ((end - cluster) / size).min(u64::from(SUBCLUSTERS));
        (first..end).fold(0, |bits, n| bits | 1 << n)
    }

    /// Stages zeros for the cluster at `at`; returns which subclusters anybody was missing.
    fn zero_cluster(&self, state: &mut State, at: GuestOffset, wanted: u32) -> Result<u32> {
        let mut zeroed = 0;
        for group in self.groups(state, at, wanted)? {
            let missing = self.missing_in(group.entry, wanted)?;
            zeroed |= missing;
            let entry = if self.header().has_subclusters() {
                L2Entry { bitmap: group.entry.bitmap | u64::from(missing) << 32, ..group.entry }
            } else {
                L2Entry { word: group.entry.word | ZERO, ..group.entry }
            };
            group.tables.iter().try_for_each(|table| state.staged.set_entry(*table, at, entry))?;
        }
        Ok(zeroed)
    }

    /// Finds host clusters for the cluster at `at`, one for each different L2 entry.
    fn place_cluster(
        &self,
        state: &mut State,
        at: GuestOffset,
        wanted: u32,
        content: &Filling<'_>,
    ) -> Result<Vec<Placement>> {
        let groups = self.groups(state, at, wanted)?;
        let shape: Arc<[Shared]> = match self.is_live {
            true => state.staged.tables_at(at)?.into(),
            false => Arc::default(),
        };
        let place = |group| {
            let placement = self.place_group(state, at, wanted, group, content)?;
            Ok(Placement { shape: shape.clone(), ..placement })
        };
        groups.into_iter().map(place).collect()
    }

    fn place_group(
        &self,
        state: &mut State,
        at: GuestOffset,
        wanted: u32,
        group: Group,
        content: &Filling<'_>,
    ) -> Result<Placement> {
        if let Some(placement) = self.place_payload(state, at, &group, content)? {
            return Ok(placement);
        }
        let Group { entry: before, tables, owners } = group;
        let subclusters = self.missing_in(before, wanted)?;
        let (host, origin) = match self.host_of(before)? {
            _ if self.header().has_data_file() => (HostOffset(at.0), Origin::External),
            Some(host) => {
                self.refuse_used(state, (at, host), subclusters, content)?;
                (host, Origin::InPlace)
            }
            None => (state.refcounts.allocate(1, owners)?.0, Origin::Fresh),
        };
        let copied = if owners == 1 || origin == Origin::External { COPIED } else { 0 };
        let word = if origin == Origin::InPlace { before.word } else { host.0 | copied };
        let bitmap = match self.header().has_subclusters() {
            true => before.bitmap | u64::from(subclusters),
            false => 0,
        };
        let after = L2Entry { word, bitmap };
        Ok(Placement { at, host, subclusters, before, after, tables, owners, origin, shape: Arc::default() })
    }

    /// Subclusters of a host cluster may be filled in place if no other view uses them. One that
    /// does holds what is to be filled in: a rebase was cut short between two L2 tables.
    fn refuse_used(
        &self,
        state: &mut State,
        (at, host): (GuestOffset, HostOffset),
        wanted: u32,
        content: &Filling<'_>,
    ) -> Result<()> {
        let (mut owners, mut used) = (0, 0);
        for shared in state.staged.tables_at(at)? {
            let Some(table) = shared.table else { continue };
            if let Cluster::Standard(cluster) = state.staged.entry(table, at)?.decode(self.header())?
                && cluster.host == Some(host)
            {
                owners += shared.views.len() as u64;
                used |= cluster.allocated;
            }
        }
        self.refuse_foreign_owners(state, host, owners)?;
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        for (first, count) in runs(used & wanted) {
            let within = u64::from(first) * size;
            let mut bytes = vec![0; (u64::from(count) * size) as usize];
            self.data_file.read_at(host + within, &mut bytes)?;
            if bytes != content.part(at + within, bytes.len()) {
                let what = "a cluster is shared by snapshots in a way that cannot be followed";
                return Err(self.foreign(what.to_owned(), host));
            }
        }
        Ok(())
    }

    /// The L2 tables in which something of `wanted` is missing, grouped by the entry they have.
    /// L2 tables that are missing altogether are made.
    fn groups(&self, state: &mut State, at: GuestOffset, wanted: u32) -> Result<Vec<Group>> {
        let mut groups: Vec<Group> = Vec::new();
        let max = state.refcounts.max();
        for shared in state.staged.tables_at(at)? {
            match shared.table {
                Some(table) => {
                    self.group(state, &mut groups, (table, shared.views.len() as u64), at, wanted)?;
                }
                // No more views share a new table than its refcount can count.
                None => {
                    for views in shared.views.chunks(max.min(shared.views.len() as u64) as usize) {
                        let owners = views.len() as u64;
                        let table = state.new_table(&*self.file, self.header().cluster_size(), owners)?;
                        state.linking(table, owners, |staged| staged.link(views, at, table))?;
                        self.group(state, &mut groups, (table, owners), at, wanted)?;
                    }
                }
            }
        }
        Ok(groups)
    }

    /// Adds a table with that many owners to the group that has the same entry, if something of `wanted`
    /// is missing in it.
    fn group(
        &self,
        state: &mut State,
        groups: &mut Vec<Group>,
        (table, owners): (HostOffset, u64),
        at: GuestOffset,
        wanted: u32,
    ) -> Result<()> {
        let entry = state.staged.entry(table, at)?;
        if self.missing_in(entry, wanted)? == 0 {
            return Ok(());
        }
        self.refuse_foreign_owners(state, table, owners)?;
        let max = state.refcounts.max();
        match groups.iter_mut().find(|group| group.entry == entry && owners <= max - group.owners) {
            Some(group) => {
                group.tables.push(table);
                group.owners += owners;
            }
            None => groups.push(Group { entry, tables: vec![table], owners }),
        }
        Ok(())
    }

    pub(super) fn host_of(&self, entry: L2Entry) -> Result<Option<HostOffset>> {
        match entry.decode(self.header()).path(self.file.path())? {
            Cluster::Standard(cluster) => Ok(cluster.host),
            Cluster::Compressed { .. } => Ok(None),
        }
    }

    /// Which of the `wanted` subclusters an entry leaves to the backing file.
    pub(super) fn missing_in(&self, entry: L2Entry, wanted: u32) -> Result<u32> {
        match entry.decode(self.header()).path(self.file.path())? {
            Cluster::Compressed { .. } => Ok(0),
            Cluster::Standard(cluster) => Ok(cluster.unallocated() & wanted),
        }
    }

    /// What has more references than we know of must not be changed in place.
    fn refuse_foreign_owners(&self, state: &mut State, at: HostOffset, owners: u64) -> Result<()> {
        match state.refcounts.of(at)?.saturating_sub(state.forgotten.references(at)) {
            count if count == owners => Ok(()),
            count => {
                Err(self
                    .foreign(format!("a cluster is used {owners} times, but its refcount is {count}"), at))
            }
        }
    }

    fn foreign(&self, what: String, at: HostOffset) -> Error {
        Error::corrupt(what).path(self.file.path()).offset(at.0).hint(REPAIR)
    }

    /// Writes the content of a fill to its placements: neighbours in one go.
    fn write_data(&self, content: &Filling<'_>, placements: &[Placement]) -> Result<()> {
        let start = content.start;
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        let mut pending: Option<(HostOffset, usize, usize)> = None;
        for placement in placements.iter().filter(|placement| !placement.is_compressed()) {
            for (first, count) in runs(placement.subclusters) {
                let within = u64::from(first) * size;
                let host = placement.host + within;
                let from = (placement.at.0 + within - start.0) as usize;
                let length = (u64::from(count) * size) as usize;
                pending = match pending {
                    Some((at, a, b)) if at + (b - a) as u64 == host && b == from => Some((at, a, b + length)),
                    Some((at, a, b)) => {
                        self.write_part(content, at, a..b)?;
                        Some((host, from, from + length))
                    }
                    None => Some((host, from, from + length)),
                };
            }
        }
        match pending {
            Some((at, a, b)) => self.write_part(content, at, a..b),
            None => Ok(()),
        }
    }

    fn write_part(&self, content: &Filling<'_>, at: HostOffset, part: Range<usize>) -> Result<()> {
        if let Some((file, from)) = content.stored
            && part.len() >= WORTH_SHARING
            && self.data_file.share(at, file, from + part.start as u64, part.len() as u64)
        {
            return Ok(());
        }
        self.data_file.write_at(at, &content.bytes[part])
    }

    pub(super) fn fill_zero(&self, at: GuestOffset, length: u64) -> Result<Filled> {
        let state = &mut *self.state();
        let mut zeroed = 0;
        for (cluster, wanted) in self.clusters(at, length) {
            zeroed += self.bytes_of(self.zero_cluster(state, cluster, wanted)?);
        }
        self.commit_if_large(state)?;
        Ok(Filled { copied: 0, zeroed })
    }

    /// `stored` is where else the bytes lie, if they do.
    pub(super) fn fill_data(
        &self,
        at: GuestOffset,
        bytes: &[u8],
        stored: Option<(&dyn HostFile, HostOffset)>,
    ) -> Result<Filled> {
        let content = Filling { start: at, bytes, stored, payloads: self.deflate(at, bytes) };
        let mut placements = Vec::new();
        let placed = {
            let state = &mut *self.state();
            self.clusters(at, bytes.len() as u64).try_for_each(|(cluster, wanted)| {
                placements.extend(self.place_cluster(state, cluster, wanted, &content)?);
                Ok(())
            })
        };
        let written = placed
            .and_then(|()| self.write_data(&content, &placements))
            .and_then(|()| self.write_payloads(&content, &placements));
        let mut filled = Filled::default();
        let (overtaken, is_time) = {
            let state = &mut *self.state();
            let before = state.uncommitted / WRITE_BACK;
            if let Err(error) = written {
                placements.iter().try_for_each(|placement| state.undo(placement))?;
                return Err(error);
            }
            let overtaken = self.stage_all(state, &placements, &mut filled)?;
            (overtaken, state.uncommitted / WRITE_BACK > before)
        };
        if is_time {
            self.data_file.start_sync();
        }
        for cluster in overtaken {
            let again = self.fill_part(cluster, at, bytes)?;
            filled.copied += again.copied;
        }
        Ok(filled)
    }

    /// Stages what was written. Returns the guest clusters of which another thread has changed
    /// the entry meanwhile: these are to be filled again.
    fn stage_all(
        &self,
        state: &mut State,
        placements: &[Placement],
        filled: &mut Filled,
    ) -> Result<Vec<GuestOffset>> {
        let mut overtaken = Vec::new();
        let mut last = None;
        for placement in placements {
            if !state.stage(placement)? {
                overtaken.push(placement.at);
            } else if last.replace(placement.at) != Some(placement.at) {
                // Several placements of one guest cluster are one copy to the guest.
                filled.copied += self.bytes_of(placement.subclusters);
            }
        }
        overtaken.dedup();
        state.uncommitted += filled.copied;
        self.commit_if_large(state)?;
        Ok(overtaken)
    }

    /// Fills the part of `[start, start + bytes)` that lies in one cluster.
    fn fill_part(&self, cluster: GuestOffset, start: GuestOffset, bytes: &[u8]) -> Result<Filled> {
        let from = cluster.max(start);
        let end = (cluster + self.header().cluster_size()).min(start + bytes.len() as u64);
        self.fill_data(from, &bytes[(from - start) as usize..(end - start) as usize], None)
    }

    /// The clusters that `[at, at + length)` touches, with the subclusters that lie in it.
    pub(super) fn clusters(&self, at: GuestOffset, length: u64) -> impl Iterator<Item = (GuestOffset, u32)> {
        let size = self.header().cluster_size();
        let end = at.0 + length;
        (at.0 / size * size..end)
            .step_by(size as usize)
            .map(move |cluster| (GuestOffset(cluster), self.subclusters_in(cluster, at.0, end)))
    }

    pub(super) fn bytes_of(&self, subclusters: u32) -> u64 {
        u64::from(subclusters.count_ones()) * (self.header().cluster_size() / u64::from(SUBCLUSTERS))
    }
}

impl State {
    /// A new, empty L2 table for the cluster at `at`. Its room is taken now, while it can be told to
    /// whoever writes.
    pub(super) fn new_table(
        &mut self,
        file: &dyn HostFile,
        cluster_size: u64,
        owners: u64,
    ) -> Result<HostOffset> {
        let (table, _) = self.refcounts.allocate(1, owners)?;
        if let Err(error) = room::take(file, table, cluster_size) {
            self.refcounts.release(table, 1, owners)?;
            return Err(error);
        }
        Ok(table)
    }

    /// Lets `use_it` link a table that was just made, and gives its cluster back if that fails.
    pub(super) fn linking(
        &mut self,
        table: HostOffset,
        owners: u64,
        use_it: impl FnOnce(&Staged) -> Result<()>,
    ) -> Result<HostOffset> {
        if let Err(error) = use_it(&self.staged) {
            self.refcounts.release(table, 1, owners)?;
            return Err(error);
        }
        Ok(table)
    }

    /// Lets the L2 entries of a placement lead to its content, which has been written. If another
    /// thread has changed one of them since, or the tables that they are in, nothing is staged and the space given back: false.
    fn stage(&mut self, placement: &Placement) -> Result<bool> {
        let has_moved =
            !placement.shape.is_empty() && self.staged.tables_at(placement.at)? != *placement.shape;
        let mut is_overtaken = has_moved;
        for &table in &placement.tables {
            is_overtaken = is_overtaken || self.staged.entry(table, placement.at)? != placement.before;
        }
        if is_overtaken {
            self.undo(placement)?;
            return Ok(false);
        }
        for &table in &placement.tables {
            self.staged.set_entry(table, placement.at, placement.after)?;
        }
        Ok(true)
    }

    /// Gives back what was allocated for a placement that failed.
    fn undo(&mut self, placement: &Placement) -> Result<()> {
        match placement.origin {
            Origin::Fresh => self.refcounts.release(placement.host, 1, placement.owners),
            Origin::Compressed { length } => {
                self.refcounts.release_bytes(placement.host, length, placement.owners)
            }
            Origin::InPlace | Origin::External => Ok(()),
        }
    }
}

/// The runs of set bits: first bit and count.
pub(super) fn runs(bits: u32) -> impl Iterator<Item = (u32, u32)> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let rest = bits.checked_shr(next)?;
        if rest == 0 {
            return None;
        }
        let first = next + rest.trailing_zeros();
        let count = (bits >> first).trailing_ones();
        next = first + count;
        Some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_of_bits() {
        let all = |bits| runs(bits).collect::<Vec<_>>();
        assert_eq!(all(0), []);
        assert_eq!(all(u32::MAX), [(0, 32)]);
        assert_eq!(all(0b1000_0000_0000_0000_0000_0000_0110_1001), [(0, 1), (3, 1), (5, 2), (31, 1)]);
    }
}
