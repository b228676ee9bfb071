//! Chains: the layers of an image, top first, and the bytes that a guest would see of them.
//!
//! A chain is a list, never a recursive type: rebase must be able to say that a new backing file
//! is already in it. Reading is a loop over [`Chain::extent_at`].

mod block_options;
pub(crate) mod compare;
mod extents;
mod ground;
mod grow;
pub mod info;
mod map;
mod name;
mod open;
mod owners;
mod payload;
mod place;
mod seen;
mod watch;

use std::sync::Arc;

pub use extents::Extents;
pub(crate) use ground::{announce, mounted_at, or_rebase_mounted};
pub use map::MapEntry;
pub(crate) use name::{format_to_record, is_inside, refuse_what_qemu_cannot_open, resolve};
pub use open::{Guess, MAX_DEPTH, Opener};
pub(crate) use payload::Payloads;
pub(crate) use place::place_of;
pub(crate) use watch::{Change, Watch, Way};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, HostFile, HostOffset, Identity, Place};
use crate::layer::{Compressed, Detail, Extent, ExtentKind, GuestOffset, GuestView, Layer, Zeros};
use owners::{FEWEST_LAYERS, Owners};

/// The layers of an image, top first. Never changed once made: a rebase makes another chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    layers: Arc<[Arc<dyn Layer>]>,
    /// Why what the last layer stands on is not among them.
    unopened: Option<Arc<str>>,
    /// Of a long chain, what is remembered of the layers that are not written to.
    owners: Option<Arc<Owners>>,
}

/// Where a run of guest bytes comes from: which layer, and what that layer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// Index of the layer, 0 for the top; `None` where no layer holds the bytes and they are
    /// zeros.
    pub depth: Option<usize>,
    /// What that layer says; never [`ExtentKind::NotMine`] unless `depth` is `None`.
    pub extent: Extent,
}

/// What makes bytes the same without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Zeros.
    Zero,
    /// Bytes of this host file from this offset on.
    Bytes(Identity, HostOffset),
    /// Inside a compressed cluster of this host file. One and the same cluster: whatever comes of reading
    /// it, bytes or an error, comes of it in both chains.
    Compressed(Identity, Compressed),
}

impl Source {
    /// The source of what lies `bytes` further on in the same extent.
    #[must_use]
    pub fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Bytes(file, host) => Self::Bytes(file, host + bytes),
            // An extent of a compressed cluster never leaves the cluster.
            Self::Compressed(file, place) => {
                Self::Compressed(file, Compressed { skip: place.skip + bytes as u32, ..place })
            }
        }
    }
}

impl Chain {
    /// The chain of these layers, top first.
    pub fn new(layers: impl Into<Arc<[Arc<dyn Layer>]>>) -> Self {
        Self::ending(layers.into(), None)
    }

    fn ending(layers: Arc<[Arc<dyn Layer>]>, unopened: Option<Arc<str>>) -> Self {
        let owners = (layers.len() >= FEWEST_LAYERS).then(|| Arc::new(Owners::new()));
        Self { layers, unopened, owners }
    }

    /// No layers, in the place of a chain that could not be opened: what is read from it, and from
    /// a chain that stands on it, is an error and not zeros.
    #[must_use]
    pub(crate) fn unopened(why: &Error) -> Self {
        Self::ending([].into(), Some(why.to_string().into()))
    }

    /// Why what the last layer stands on could not be opened, if so.
    pub fn broken_off(&self) -> Option<&str> {
        self.unopened.as_deref()
    }

    /// The layers, top first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// The files of all layers, top first, with external data files.
    pub fn files(&self) -> impl Iterator<Item = &Arc<dyn HostFile>> {
        self.layers.iter().flat_map(|layer| {
            let (file, data_file) = (layer.file(), layer.data_file());
            let is_other = data_file.identity() != file.identity();
            std::iter::once(file).chain(is_other.then_some(data_file))
        })
    }

    /// The top layer, `None` in the chain of no layers (which reads as zeros).
    pub fn top(&self) -> Option<&Arc<dyn Layer>> {
        self.layers.first()
    }

    /// The chain below the layer at `depth`.
    #[must_use]
    pub fn below(&self, depth: usize) -> Self {
        Self::ending(self.layers.get(depth + 1..).unwrap_or_default().into(), self.unopened.clone())
    }

    /// The chain with other objects for the same layers.
    pub(crate) fn with_layers(&self, layers: Vec<Arc<dyn Layer>>) -> Self {
        Self::ending(layers.into(), self.unopened.clone())
    }

    /// This chain with `layer` on top of it.
    #[must_use]
    pub fn under(&self, layer: Arc<dyn Layer>) -> Self {
        let layers = std::iter::once(layer).chain(self.layers.iter().cloned());
        Self::ending(layers.collect(), self.unopened.clone())
    }

    /// Whether this is not the only handle by which its top can be read.
    pub(crate) fn is_held_elsewhere(&self) -> bool {
        Arc::strong_count(&self.layers) > 1 || self.top().is_some_and(|top| Arc::strong_count(top) > 1)
    }

    /// Virtual size of the top layer in bytes, 0 without layers.
    pub fn virtual_size(&self) -> u64 {
        self.top().map_or(0, |layer| layer.virtual_size())
    }

    /// Where the bytes at `at` come from, for at most `length` (≥ 1) bytes; the answer may be
    /// shorter than what could be said. Beyond the end of a layer there are zeros, which hide
    /// what the layers below hold there.
    ///
    /// # Errors
    /// Tables cannot be read, or break the rules of their format; what the last layer stands on could
    /// not be opened ([`broken_off`](Self::broken_off)).
    pub fn extent_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<Owned> {
        let Some(owners) = &self.owners else { return self.walk(0, at, length, detail) };
        let is_written = |layer: &&Arc<dyn Layer>| layer.file().access() == Access::ReadWrite;
        let written = self.layers.iter().take_while(is_written).count();
        let mut length = length;
        for depth in 0..written {
            let extent = self.ask(depth, at, length, detail)?;
            if extent.kind != ExtentKind::NotMine {
                return Ok(Owned { depth: Some(depth), extent });
            }
            length = extent.length;
        }
        let Some(Owned { depth, extent }) = owners.find(&self.layers[written..], at, length) else {
            return self.walk(written, at, length, detail);
        };
        let Some(depth) = depth.map(|depth| depth + written) else { return self.nobodys(extent.length) };
        let extent = match (extent.kind, detail) {
            (ExtentKind::Data(_), Detail::Holes) => self.ask(depth, at, extent.length, detail)?,
            _ => extent,
        };
        Ok(Owned { depth: Some(depth), extent })
    }

    /// Asks the layers from `first` on, one after the other.
    fn walk(&self, first: usize, at: GuestOffset, length: u64, detail: Detail) -> Result<Owned> {
        let mut length = length;
        for depth in first..self.layers.len() {
            let extent = self.ask(depth, at, length, detail)?;
            if extent.kind != ExtentKind::NotMine {
                return Ok(Owned { depth: Some(depth), extent });
            }
            length = extent.length;
        }
        self.nobodys(length)
    }

    /// What one layer says; zeros behind its end.
    fn ask(&self, depth: usize, at: GuestOffset, length: u64, detail: Detail) -> Result<Extent> {
        let layer = &self.layers[depth];
        let size = layer.virtual_size();
        if at.0 >= size {
            // The layer is shorter than the one that asked it.
            return Ok(Extent { kind: ExtentKind::Zero(None), length });
        }
        layer
            .extent_at(at, length.min(size - at.0), detail)
            .doing(|| format!("reading layer {depth} of the chain"))
    }

    /// What no layer has.
    fn nobodys(&self, length: u64) -> Result<Owned> {
        match &self.unopened {
            None => Ok(Owned { depth: None, extent: Extent { kind: ExtentKind::NotMine, length } }),
            Some(why) => Err(Error::new(ErrorKind::NotFound, format!("the chain is broken off: {why}"))
                .hint("name the file that is there: `-u -b FILE -F FORMAT`")),
        }
    }

    /// The same question, answered such that equal answers mean equal bytes.
    pub(crate) fn source_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<(Source, u64)> {
        let owned = self.extent_at(at, length, detail)?;
        let layer = owned.depth.map(|depth| &self.layers[depth]);
        let source = match (owned.extent.kind, layer) {
            (ExtentKind::Data(host), Some(layer)) => Source::Bytes(layer.data_file().identity(), host),
            (ExtentKind::Compressed(place), Some(layer)) => {
                Source::Compressed(layer.file().identity(), place)
            }
            _ => Source::Zero,
        };
        Ok((source, owned.extent.length))
    }

    /// Where the bytes at `at` lie on a device, if they are data, uncompressed, in an extent that
    /// several files share, and for how many of them, at most `length` (≥ 1), that holds.
    pub(crate) fn shared_place_at(&self, at: GuestOffset, length: u64) -> Result<(Option<Place>, u64)> {
        let Owned { depth, extent } = self.extent_at(at, length, Detail::Holes)?;
        match (depth, extent.kind) {
            (Some(depth), ExtentKind::Data(host)) => {
                self.layers[depth].data_file().shared_place_at(host, extent.length)
            }
            _ => Ok((None, extent.length)),
        }
    }

    /// Fills `buffer` with the guest's bytes from `at` on; zeros beyond the virtual size.
    ///
    /// # Errors
    /// As [`extent_at`](Self::extent_at); a file cannot be read, or was cut short; a compressed cluster is
    /// damaged.
    pub fn read_at(&self, at: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        // Only a top is ever written to.
        let _held = self.top().and_then(|top| top.hold());
        let mut at = at;
        let mut rest = buffer;
        while !rest.is_empty() {
            let owned = self.extent_at(at, rest.len() as u64, Detail::Owner)?;
            // At most `rest.len()`, as asked.
            let (now, later) = rest.split_at_mut(owned.extent.length as usize);
            self.read_extent(owned, now)?;
            at = at + owned.extent.length;
            rest = later;
        }
        Ok(())
    }

    fn read_extent(&self, owned: Owned, buffer: &mut [u8]) -> Result<()> {
        let Some(depth) = owned.depth else {
            buffer.fill(0);
            return Ok(());
        };
        let layer = &self.layers[depth];
        let read = match owned.extent.kind {
            ExtentKind::Data(host) => layer.data_file().read_at(host, buffer),
            ExtentKind::Compressed(place) => layer.read_compressed(place, buffer),
            ExtentKind::Zero(_) | ExtentKind::NotMine => {
                buffer.fill(0);
                Ok(())
            }
        };
        read.doing(|| format!("reading layer {depth} of the chain"))
    }
}

impl GuestView for Chain {
    fn read_at(&self, at: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.read_at(at, buffer)
    }

    fn zeros_at(&self, at: GuestOffset, length: u64) -> Result<Zeros> {
        let owned = self.extent_at(at, length, Detail::Holes)?;
        Ok(Zeros {
            are_zero: owned.is_zero(),
            take_space: owned.depth == Some(0) && matches!(owned.extent.kind, ExtentKind::Zero(Some(_))),
            length: owned.extent.length,
        })
    }
}
