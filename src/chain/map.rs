//! The map of a chain: for every run of guest bytes, which layer holds it and as what.
//!
//! Says what `qemu-img map` says, from [`Chain::extent_at`] alone. Prints nothing.

use std::path::PathBuf;

use serde::Serialize;

use super::extents::{joined, step};
use super::{Chain, Owned};
use crate::error::Result;
use crate::file::HostOffset;
use crate::layer::{Detail, Extent, ExtentKind, Format, GuestOffset, Layer};

/// A run of guest bytes with one state; the fields of qemu-img's MapEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MapEntry {
    /// Guest offset in bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The layer that holds it, 0 for the top.
    pub depth: usize,
    /// Whether any layer holds it.
    pub present: bool,
    /// Whether it reads as zeros, as far as can be told without reading.
    pub zero: bool,
    /// Whether it is stored as data.
    pub data: bool,
    /// Whether it is compressed.
    pub compressed: bool,
    /// Where it lies in the file, if it lies there as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file of `offset`.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

impl MapEntry {
    /// The same at this place of the layer's file.
    fn at(self, layer: &dyn Layer, host: HostOffset) -> Self {
        let file = Some(layer.data_file().path().to_owned());
        Self { offset: Some(host.0), file, ..self }
    }

    /// As `qemu-img map --output=json` writes it.
    pub(crate) fn as_json(&self) -> String {
        let Self { start, length, depth, present, zero, data, compressed, offset, .. } = self;
        let offset = offset.map(|offset| format!(", \"offset\": {offset}")).unwrap_or_default();
        format!(
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}"
        )
    }

    /// Takes in `next`, which lies right behind, if that goes on in the same way.
    fn join(&mut self, next: &Self) -> bool {
        let expected = Self {
            start: self.start + self.length,
            length: next.length,
            offset: self.offset.map(|offset| offset + self.length),
            ..self.clone()
        };
        let goes_on = expected == *next;
        self.length += if goes_on { next.length } else { 0 };
        goes_on
    }

    /// Whether two runs of equal length are in the same state, wherever they are stored.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let state = |e: &Self| (e.present, e.zero, e.data, e.compressed, e.offset.is_some());
        state(self) == state(other)
    }
}

impl Chain {
    /// The map of the bytes from `start` on, at most `length`: entries in order, each as long as it
    /// can be, as `qemu-img map --output=json` has them.
    ///
    /// # Errors
    /// The iterator ends with an error where tables cannot be read or break the rules of their
    /// format.
    pub fn map(&self, start: u64, length: u64) -> impl Iterator<Item = Result<MapEntry>> {
        let mut range = start..start.saturating_add(length).min(self.virtual_size());
        let step =
            move || step(&mut range, |at, left| self.map_entry_at(at, left), |entry: &MapEntry| entry.length);
        joined(std::iter::from_fn(step), MapEntry::join)
    }

    /// The state at `at`, for at most `length` (≥ 1) bytes.
    pub(crate) fn map_entry_at(&self, at: GuestOffset, length: u64) -> Result<MapEntry> {
        let Owned { depth, extent } = self.extent_at(at, length, Detail::Owner)?;
        let is_held = depth.is_some_and(|depth| at.0 < self.layers()[depth].virtual_size());
        let depth = match depth {
            None => self.layers().len().saturating_sub(1),
            Some(depth) if is_held => depth,
            // Not held by the layer above, and beyond the end of this one.
            Some(depth) => depth.saturating_sub(1),
        };
        let nowhere =
            MapEntry { start: at.0, length: extent.length, depth, zero: true, ..MapEntry::default() };
        match self.layers().get(depth) {
            None => Ok(nowhere),
            Some(layer) if is_held => held(&**layer, extent, nowhere),
            Some(layer) => set_aside(&**layer, nowhere),
        }
    }
}

/// A run that `layer` holds.
fn held(layer: &dyn Layer, extent: Extent, nowhere: MapEntry) -> Result<MapEntry> {
    let held = MapEntry { present: true, ..nowhere };
    Ok(match extent.kind {
        ExtentKind::Data(host) => {
            let (zero, length) = holes(layer, GuestOffset(held.start), extent.length)?;
            // A hole of a raw file is zeros; a hole in a qcow2 cluster is data that is zeros.
            let data = !(zero && layer.format() == Format::Raw);
            MapEntry { length, zero, data, ..held }.at(layer, host)
        }
        ExtentKind::Zero(Some(host)) => held.at(layer, host),
        ExtentKind::Compressed(_) => MapEntry { zero: false, data: true, compressed: true, ..held },
        ExtentKind::Zero(None) | ExtentKind::NotMine => held,
    })
}

/// Whether a run of data is a hole, and for how long that holds. Of an external data file,
/// `qemu-img map` does not tell.
fn holes(layer: &dyn Layer, at: GuestOffset, length: u64) -> Result<(bool, u64)> {
    if layer.as_qcow2().is_some_and(|image| image.header().has_data_file()) {
        return Ok((false, length));
    }
    let found = layer.extent_at(at, length, Detail::Holes)?;
    Ok((matches!(found.kind, ExtentKind::Zero(_)), found.length))
}

/// A run that no layer holds, `layer` being the last one asked: subclusters can have a place in the
/// file all the same.
fn set_aside(layer: &dyn Layer, nowhere: MapEntry) -> Result<MapEntry> {
    let image = layer.as_qcow2().filter(|image| image.header().has_subclusters());
    let Some(image) = image else { return Ok(nowhere) };
    let (place, length) = image.place_at(GuestOffset(nowhere.start), nowhere.length)?;
    let entry = MapEntry { length, ..nowhere };
    Ok(match place {
        Some(host) => entry.at(layer, host),
        None => entry,
    })
}
