//! What a guest writes: in place where the active disk alone has the cluster, else copied first.
//!
//! Owns what a write is. In place, nothing but data changes. Elsewhere (nothing there, zeros, compressed,
//! or shared with a snapshot) a host cluster is found, gets what the guest writes and a copy of the rest,
//! and then the L2 entry is staged; the cluster that it replaces is free when the new entry is durable. With
//! extended L2 entries only subclusters are copied.

use std::sync::{PoisonError, RwLockReadGuard, RwLockWriteGuard};

use super::fill::{Origin, runs};
use super::ranges::Held;
use super::{State, Writer};
use crate::error::{Context, Result};
use crate::file::HostOffset;
use crate::layer::qcow2::entry::{self, COPIED, Cluster, L2Entry, SUBCLUSTERS, Standard};
use crate::layer::{GuestOffset, GuestView};

/// What one write has to do with one cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// The cluster.
    pub at: GuestOffset,
    /// The bytes of the write that lie in it.
    start: usize,
    end: usize,
    /// Where in the cluster they begin.
    within: u64,
    /// Bit n: some of them lie in subcluster n.
    touched: u32,
}

/// A cluster that gets a place, and what is to be written there.
#[derive(Debug)]
struct Step {
    part: Part,
    table: HostOffset,
    after: L2Entry,
    host: HostOffset,
    /// Bit n: subcluster n is to be written, as a whole.
    wanted: u32,
    origin: Origin,
    /// The host cluster was never written to: it reads as zeros.
    is_pristine: bool,
}

impl Writer {
    /// Lets a guest write: what it sees does not change as long as this is held, apart from what is written.
    /// Waits for whoever needs the disk to stand still. A view of the disk that was looked up before that may
    /// lead to what has been dropped since, and to a backing file that is none any more.
    pub fn guest(&self) -> Guest<'_> {
        Guest { writer: self, _moving: self.guests.read().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Makes durable all that was written.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn flush(&self) -> Result<()> {
        let mut state = self.state();
        if state.lost.is_some() || state.has_changes() {
            return self.commit_state(&mut state);
        }
        // Whoever only looks or writes in place need not wait for the disk.
        drop(state);
        self.sync().inspect_err(|error| self.state().lost = Some(error.kind()))
    }

    /// Whether anything waits in memory.
    pub(crate) fn has_changes(&self) -> bool {
        self.state().has_changes()
    }

    /// Guests wait with their writes as long as this is held. Those under way have ended.
    pub(crate) fn hold_off_guests(&self) -> RwLockWriteGuard<'_, ()> {
        self.guests.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether guests would have to wait.
    pub(crate) fn is_held_off(&self) -> bool {
        self.guests.try_read().is_err()
    }

    /// Nobody else changes the clusters of this range meanwhile.
    pub(super) fn hold_clusters(&self, at: GuestOffset, length: u64) -> Held<'_> {
        let bits = self.header().cluster_bits;
        self.ranges.hold(at.0 >> bits..(at.0 + length).div_ceil(1 << bits))
    }

    /// The same as [`write`](Guest::write), by one who holds the clusters.
    pub(super) fn write_held(&self, view: &dyn GuestView, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        let mut elsewhere = Vec::new();
        let mut here = Gathered::new(self, bytes);
        for part in self.parts(at, bytes.len()) {
            match self.place_of(part)? {
                Some(host) => here.add(host + part.within, part.start, part.end)?,
                None => elsewhere.push(part),
            }
        }
        here.write()?;
        match elsewhere.is_empty() {
            true => Ok(()),
            false => self.write_elsewhere(view, bytes, &elsewhere),
        }
    }

    fn parts(&self, at: GuestOffset, length: usize) -> impl Iterator<Item = Part> {
        let size = self.header().cluster_size();
        let end = at.0 + length as u64;
        (at.0 / size * size..end).step_by(size as usize).map(move |cluster| {
            let (from, to) = (at.0.max(cluster), end.min(cluster + size));
            Part {
                at: GuestOffset(cluster),
                start: (from - at.0) as usize,
                end: (to - at.0) as usize,
                within: from - cluster,
                touched: self.touched(from - cluster, to - cluster),
            }
        })
    }

    /// The subclusters that some of these bytes of a cluster lie in; all, where there are none.
    fn touched(&self, from: u64, end: u64) -> u32 {
        if !self.header().has_subclusters() {
            return u32::MAX;
        }
        let size = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        (from / size..end.div_ceil(size)).fold(0, |bits, n| bits | 1 << n)
    }

    /// The host cluster in which this can be written in place, if it is data there already and the
    /// active disk alone has both cluster and table. The flags say so: they were found right when the
    /// image was opened.
    fn place_of(&self, part: Part) -> Result<Option<HostOffset>> {
        let word = self.staged.l1_entry(0, part.at.0 / self.header().l2_coverage());
        let Some(table) = entry::l2_table(word, self.header()).path(self.file.path())? else {
            return Ok(None);
        };
        let entry = self.staged.entry(table, part.at)?;
        if word & COPIED == 0 || entry.word & COPIED == 0 {
            return Ok(None);
        }
        match entry.decode(self.header()).path(self.file.path())? {
            Cluster::Standard(Standard { host: Some(host), allocated, .. })
                if allocated & part.touched == part.touched =>
            {
                Ok(Some(host))
            }
            _ => Ok(None),
        }
    }

    fn write_elsewhere(&self, view: &dyn GuestView, bytes: &[u8], parts: &[Part]) -> Result<()> {
        let mut steps = Vec::new();
        let placed = {
            let state = &mut *self.state();
            parts.iter().try_for_each(|part| self.place_part(state, *part).map(|step| steps.push(step)))
        };
        let written = placed.and_then(|()| self.write_steps(view, bytes, &steps));
        let state = &mut *self.state();
        if let Err(error) = written {
            let fresh = steps.iter().filter(|step| step.origin == Origin::Fresh);
            fresh.map(|step| step.host).try_for_each(|host| state.refcounts.release(host, 1, 1))?;
            return Err(error);
        }
        steps.iter().try_for_each(|step| self.replace_entry(state, step.table, step.part.at, step.after))?;
        self.commit_if_large(state)
    }

    /// Finds a host cluster for what is written to a cluster.
    fn place_part(&self, state: &mut State, part: Part) -> Result<Step> {
        let table = self.own_table(state, part.at)?;
        let before = state.staged.entry(table, part.at)?;
        let cluster = match before.decode(self.header()).path(self.file.path())? {
            Cluster::Standard(cluster) => cluster,
            Cluster::Compressed { .. } => Standard { host: None, allocated: 0, zero: 0 },
        };
        let is_compressed = before.word & entry::COMPRESSED != 0;
        let pristine_from = state.refcounts.pristine_from();
        let (host, origin) = match cluster.host {
            _ if self.header().has_data_file() => (HostOffset(part.at.0), Origin::External),
            Some(host) if before.word & COPIED != 0 => (host, Origin::InPlace),
            _ => (state.refcounts.allocate(1, 1)?.0, Origin::Fresh),
        };
        // What a compressed or shared cluster had moves with what is written.
        let moved = match origin {
            Origin::Fresh if is_compressed => u32::MAX,
            Origin::Fresh => cluster.allocated,
            _ => 0,
        };
        let wanted = part.touched | moved;
        let bitmap = match self.header().has_subclusters() {
            true => u64::from(cluster.allocated | wanted) | u64::from(cluster.zero & !wanted) << SUBCLUSTERS,
            false => 0,
        };
        Ok(Step {
            part,
            table,
            after: L2Entry { word: host.0 | COPIED, bitmap },
            host,
            wanted,
            origin,
            is_pristine: origin == Origin::Fresh && host >= pristine_from,
        })
    }

    /// Writes what steps want to their places: neighbours in one go.
    fn write_steps(&self, view: &dyn GuestView, bytes: &[u8], steps: &[Step]) -> Result<()> {
        let size = self.header().cluster_size();
        let mut whole = Gathered::new(self, bytes);
        for step in steps {
            let Part { at, start, end, within, .. } = step.part;
            let unit = size / u64::from(SUBCLUSTERS);
            // What is to be written, from the first subcluster to the last.
            let (first, last) = (step.wanted.trailing_zeros(), SUBCLUSTERS - step.wanted.leading_zeros());
            let (first, last) = (u64::from(first) * unit, u64::from(last) * unit);
            let covers = within == first && within + (end - start) as u64 == last;
            if covers || (step.is_pristine && self.is_zero(view, at, size)?) {
                whole.add(step.host + within, start, end)?;
                continue;
            }
            let mut buffer = vec![0; (last - first) as usize];
            let (from, to) = ((within - first) as usize, (within - first) as usize + end - start);
            view.read_at(at + first, &mut buffer[..from])?;
            view.read_at(at + first + to as u64, &mut buffer[to..])?;
            buffer[from..to].copy_from_slice(&bytes[start..end]);
            for (n, count) in runs(step.wanted) {
                let (from, length) = (u64::from(n) * unit, u64::from(count) * unit);
                let part = &buffer[(from - first) as usize..][..length as usize];
                self.data_file.write_at(step.host + from, part)?;
            }
        }
        whole.write()
    }

    /// Whether all of these bytes are zeros by metadata.
    pub(super) fn is_zero(&self, view: &dyn GuestView, at: GuestOffset, length: u64) -> Result<bool> {
        let mut done = 0;
        while done < length {
            let zeros = view.zeros_at(at + done, length - done)?;
            if !zeros.are_zero {
                return Ok(false);
            }
            done += zeros.length;
        }
        Ok(true)
    }

    /// Stages another entry of the active disk; what the one before led to loses a reference once
    /// the new one is durable.
    pub(super) fn replace_entry(
        &self,
        state: &mut State,
        table: HostOffset,
        at: GuestOffset,
        after: L2Entry,
    ) -> Result<()> {
        let before = state.staged.entry(table, at)?;
        let host_of = |entry: L2Entry| self.host_of(entry);
        match before.decode(self.header()).path(self.file.path())? {
            Cluster::Compressed { at: host, size } => {
                state.forgotten.push_compressed(host, size, self.header().cluster_size());
            }
            Cluster::Standard(Standard { host: Some(host), .. })
                if host_of(after)? != Some(host) && !self.header().has_data_file() =>
            {
                state.forgotten.push(host);
            }
            Cluster::Standard(_) => {}
        }
        state.staged.set_entry(table, at, after)
    }

    /// The L2 table for the cluster at `at` that the active disk has alone: a copy of one that
    /// snapshots share, a new one where there is none. The clusters that a copy leads to are counted
    /// as before: once for each L1 table that leads there.
    pub(super) fn own_table(&self, state: &mut State, at: GuestOffset) -> Result<HostOffset> {
        let word = state.staged.l1_entry(0, at.0 / self.header().l2_coverage());
        let shared = entry::l2_table(word, self.header()).path(self.file.path())?;
        if let (Some(table), true) = (shared, word & COPIED != 0) {
            return Ok(table);
        }
        let table = state.new_table(&*self.file, self.header().cluster_size(), 1)?;
        match shared {
            Some(shared) => {
                state.linking(table, 1, |staged| staged.link_copy(at, shared, table))?;
                state.forgotten.push(shared);
                Ok(table)
            }
            None => state.linking(table, 1, |staged| staged.link(&[0], at, table)),
        }
    }
}

/// A guest that may write: the disk does not stand still.
#[derive(Debug)]
pub struct Guest<'a> {
    pub(super) writer: &'a Writer,
    _moving: RwLockReadGuard<'a, ()>,
}

impl Guest<'_> {
    /// Writes what a guest writes. `view` is what the guest sees of this very disk, looked up under this
    /// guard. Durable after [`flush`](Writer::flush).
    ///
    /// # Errors
    /// The image cannot be read or written, or its tables break the rules of the format.
    pub fn write(&self, view: &dyn GuestView, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.writer.mark_written()?;
        let _held = self.writer.hold_clusters(at, bytes.len() as u64);
        self.writer.write_held(view, at, bytes)
    }
}

impl State {
    fn has_changes(&self) -> bool {
        self.staged.bytes() + self.refcounts.dirty_bytes() > 0
            || self.refcounts.has_links()
            || !self.forgotten.is_empty()
    }
}

/// Bytes of a write that go to neighbouring places, to be written in one go.
struct Gathered<'a> {
    writer: &'a Writer,
    bytes: &'a [u8],
    pending: Option<(HostOffset, usize, usize)>,
}

impl<'a> Gathered<'a> {
    fn new(writer: &'a Writer, bytes: &'a [u8]) -> Self {
        Self { writer, bytes, pending: None }
    }

    /// The bytes from `start` to `end` go to `host`.
    fn add(&mut self, host: HostOffset, start: usize, end: usize) -> Result<()> {
        if let Some((at, first, last)) = &mut self.pending
            && *at + (*last - *first) as u64 == host
            && *last == start
        {
            *last = end;
            return Ok(());
        }
        self.write()?;
        self.pending = Some((host, start, end));
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        match self.pending.take() {
            Some((at, start, end)) => self.writer.data_file.write_at(at, &self.bytes[start..end]),
            None => Ok(()),
        }
    }
}
