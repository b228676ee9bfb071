//! Compressed clusters for what is filled in: deflated by the workers, outside of the lock, then
//! packed one behind the other, so that several share a host cluster.
//!
//! Owns what may be compressed: a whole guest cluster, of which a view holds nothing, and that
//! shrinks. Anything else is filled as without compression.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fill::{Filling, Group, Origin, Placement};
use super::{State, Writer};
use crate::error::{Context, Error, Result};
use crate::file::HostOffset;
use crate::layer::GuestOffset;
use crate::layer::qcow2::compressed::deflate;
use crate::layer::qcow2::entry::L2Entry;
use crate::layer::qcow2::header::Compression;

/// What guest clusters are when compressed; those that do not shrink have no payload.
#[derive(Debug, Default)]
pub(super) struct Deflated(HashMap<GuestOffset, Vec<u8>>);

impl Deflated {
    pub fn of(&self, at: GuestOffset) -> Option<&[u8]> {
        self.0.get(&at).map(Vec::as_slice)
    }
}

impl Writer {
    /// Whether what is filled in from now on is stored compressed where it can be. Refuses an image
    /// that can have no compressed clusters.
    pub(crate) fn compress(&self, is_wanted: bool) -> Result<()> {
        if is_wanted && self.header().has_data_file() {
            let what = "an external data file holds no compressed clusters";
            return Err(Error::unsupported(what).path(self.file.path()).hint("leave out `-c`"));
        }
        self.header().compression().path(self.file.path())?;
        self.is_compressing.store(is_wanted, Ordering::Relaxed);
        Ok(())
    }

    fn compression(&self) -> Option<Compression> {
        let is_compressing = self.is_compressing.load(Ordering::Relaxed);
        self.header().compression().ok().filter(|_| is_compressing)
    }

    /// Deflates the clusters that lie in `bytes` as a whole.
    pub(super) fn deflate(&self, at: GuestOffset, bytes: &[u8]) -> Deflated {
        let Some(compression) = self.compression() else { return Deflated::default() };
        let size = self.header().cluster_size();
        let skip = at.0.next_multiple_of(size) - at.0;
        let whole = bytes.get(skip as usize..).unwrap_or_default().chunks_exact(size as usize);
        let offsets = (0..).map(|number| at + skip + number * size);
        Deflated(
            offsets.zip(whole).filter_map(|(at, bytes)| Some((at, deflate(compression, bytes)?))).collect(),
        )
    }

    /// Finds room for the payload of the cluster at `at`; `None` if these L2 tables cannot have it
    /// compressed.
    pub(super) fn place_payload(
        &self,
        state: &mut State,
        at: GuestOffset,
        group: &Group,
        content: &Filling<'_>,
    ) -> Result<Option<Placement>> {
        let Some(payload) = content.payloads.of(at) else { return Ok(None) };
        let length = payload.len() as u64;
        // A host cluster that nobody can share, as with refcounts of one bit, saves nothing.
        let can_share = group.owners <= state.refcounts.max() / 2;
        // Preallocated: its host cluster would be lost.
        let has_host = self.host_of(group.entry)?.is_some();
        if !can_share || has_host || self.missing_in(group.entry, u32::MAX)? != u32::MAX {
            return Ok(None);
        }
        let host = state.refcounts.allocate_bytes(length, group.owners)?;
        let Some(after) = L2Entry::compressed(self.header(), host, length) else {
            state.refcounts.release_bytes(host, length, group.owners)?;
            return Ok(None);
        };
        Ok(Some(Placement {
            at,
            host,
            subclusters: u32::MAX,
            before: group.entry,
            after,
            tables: group.tables.clone(),
            owners: group.owners,
            origin: Origin::Compressed { length },
            shape: Arc::default(),
        }))
    }

    /// Writes the payloads of a fill to their places: neighbours in one go.
    pub(super) fn write_payloads(&self, content: &Filling<'_>, placements: &[Placement]) -> Result<()> {
        let mut pending: (HostOffset, Vec<u8>) = Default::default();
        for placement in placements.iter().filter(|placement| placement.is_compressed()) {
            let payload = content.payloads.of(placement.at).unwrap_or_default();
            if pending.0 + pending.1.len() as u64 != placement.host {
                self.write_pending(&pending)?;
                pending = (placement.host, Vec::new());
            }
            pending.1.extend_from_slice(payload);
        }
        self.write_pending(&pending)
    }

    fn write_pending(&self, (at, bytes): &(HostOffset, Vec<u8>)) -> Result<()> {
        if bytes.is_empty() { Ok(()) } else { self.data_file.write_at(*at, bytes) }
    }
}
