//! Layers: one image of a chain each, opened, knowing nothing of the layers below it.
//!
//! Owns the one question that everything is built on, *where do these guest bytes come from?*
//! ([`Layer::extent_at`]), and what a writable top must offer (`Overlay`).

mod format;
pub mod qcow2;
mod raw;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use format::Format;
pub use raw::Raw;

use crate::error::Result;
use crate::file::{HostFile, HostOffset};
use qcow2::{Hold, Live, Qcow2};

/// Byte offset in the virtual disk. Never mixed with [`HostOffset`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

impl std::ops::Add<u64> for GuestOffset {
    type Output = Self;
    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl std::ops::Sub for GuestOffset {
    type Output = u64;
    fn sub(self, start: Self) -> u64 {
        self.0 - start.0
    }
}

impl fmt::LowerHex for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A run of guest bytes with one answer to "where do these come from?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The answer.
    pub kind: ExtentKind,
    /// Length in bytes, at least 1.
    pub length: u64,
}

/// Where guest bytes come from, as one layer knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the layer's data file, uncompressed, from this offset on.
    Data(HostOffset),
    /// Zeros; with the host offset where the layer has set space aside for them all the same.
    Zero(Option<HostOffset>),
    /// Inside a compressed cluster.
    Compressed(Compressed),
    /// Not in this layer: the next layer down knows.
    NotMine,
}

impl ExtentKind {
    /// The same for what lies `bytes` further on in the extent.
    #[must_use]
    pub fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Data(host) => Self::Data(host + bytes),
            Self::Zero(Some(host)) => Self::Zero(Some(host + bytes)),
            // An extent of a compressed cluster never leaves the cluster.
            Self::Compressed(place) => {
                Self::Compressed(Compressed { skip: place.skip + bytes as u32, ..place })
            }
            Self::Zero(None) | Self::NotMine => self,
        }
    }
}

/// A place inside a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compressed {
    /// Where the compressed bytes begin.
    pub at: HostOffset,
    /// How many compressed bytes there are at most; the last of them may be unused.
    pub size: u32,
    /// Distance in bytes of the extent from the beginning of the inflated cluster.
    pub skip: u32,
}

/// How hard to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Who owns the bytes. Answered from the image's own metadata alone, with no system call.
    Owner,
    /// Also which of a raw file's bytes are holes: zeros, not data.
    Holes,
}

/// The name by which an image refers to the next file of its chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// As stored, to be resolved against the directory of the image that names it.
    pub name: OsString,
    /// The format, as stored: a name of QEMU's, `None` if the image leaves it open.
    pub format: Option<String>,
}

impl Reference {
    /// A file of this format.
    pub fn new(name: impl Into<OsString>, format: Format) -> Self {
        Self { name: name.into(), format: Some(format.to_string()) }
    }
}

/// A file of whatever format it turns out to have.
impl From<OsString> for Reference {
    fn from(name: OsString) -> Self {
        Self { name, format: None }
    }
}

/// Likewise.
impl From<PathBuf> for Reference {
    fn from(name: PathBuf) -> Self {
        name.into_os_string().into()
    }
}

/// Likewise.
impl From<&Path> for Reference {
    fn from(name: &Path) -> Self {
        name.as_os_str().to_owned().into()
    }
}

/// Likewise.
impl From<&str> for Reference {
    fn from(name: &str) -> Self {
        OsString::from(name).into()
    }
}

/// One image of a chain, opened. Knows nothing of the layers below.
pub trait Layer: fmt::Debug + Send + Sync {
    /// The image's format.
    fn format(&self) -> Format;

    /// The size of the virtual disk in bytes; a multiple of 512.
    fn virtual_size(&self) -> u64;

    /// The extent that begins at `at`, at most `length` (≥ 1) bytes long; it may be shorter than
    /// what could be said. The range lies below [`virtual_size`](Self::virtual_size).
    ///
    /// # Errors
    /// Tables cannot be read, or break the rules of the format.
    fn extent_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<Extent>;

    /// Inflates the cluster at `place` and copies what lies at [`Compressed::skip`] to `buffer`.
    ///
    /// # Errors
    /// The payload cannot be read, or is none.
    fn read_compressed(&self, place: Compressed, buffer: &mut [u8]) -> Result<()>;

    /// The file with the image's metadata.
    fn file(&self) -> &Arc<dyn HostFile>;

    /// The file that the offsets of [`ExtentKind::Data`] point into.
    fn data_file(&self) -> &Arc<dyn HostFile> {
        self.file()
    }

    /// The backing file, as the header names it.
    fn backing(&self) -> Option<&Reference> {
        None
    }

    /// What only a qcow2 image has, if it is one.
    fn as_qcow2(&self) -> Option<&Qcow2> {
        None
    }

    /// The image with its writer, if a guest writes to it.
    #[doc(hidden)]
    fn as_live(&self) -> Option<&Live> {
        None
    }

    /// As long as this is held, what extents lead to stays where it is. Of a layer that nobody
    /// writes to it always does.
    #[doc(hidden)]
    fn hold(&self) -> Option<Hold<'_>> {
        None
    }
}

/// What a guest sees of its disk: of what a write leaves of a cluster, a copy is needed.
#[doc(hidden)]
pub trait GuestView {
    /// Fills `buffer` from `at` on; zeros beyond the end.
    fn read_at(&self, at: GuestOffset, buffer: &mut [u8]) -> Result<()>;

    /// What metadata says of zeros at `at`, for at most `length` (≥ 1) bytes.
    fn zeros_at(&self, at: GuestOffset, length: u64) -> Result<Zeros>;
}

/// A run of guest bytes that are known to be zeros, or not.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros {
    /// Whether they are.
    pub are_zero: bool,
    /// Whether the top layer has set space aside for them all the same.
    pub take_space: bool,
    /// Length in bytes, at least 1.
    pub length: u64,
}

/// What a rebase puts in the place of guest bytes that the overlay does not hold.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// These bytes, which lie in this file from there on: the file system may let the overlay have
    /// a part in them.
    Stored(&'a [u8], &'a dyn HostFile, HostOffset),
    /// So many zeros.
    Zero(u64),
}

impl Content<'_> {
    /// How many bytes.
    pub fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) | Self::Stored(bytes, ..) => bytes.len() as u64,
            Self::Zero(length) => *length,
        }
    }
}

/// A run of guest bytes that some view of an overlay does not hold, or that all of them hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Whether any view (the active disk, an internal snapshot) falls through to the backing file.
    pub is_missing: bool,
    /// Length in bytes, at least 1.
    pub length: u64,
}

/// What a writable top offers to the rebase engine: to hold what it did not hold, and to name
/// another backing file. A *view* is the active disk or an internal snapshot.
pub(crate) trait Overlay: Send + Sync {
    /// The smallest number of bytes that can be held by themselves: a cluster or subcluster.
    fn unit(&self) -> u64;

    /// The number of bytes, one unit or several, that is best compared and filled in one piece
    /// where all of it is missing: more than a unit only if whole clusters can be compressed.
    fn whole(&self) -> u64;

    /// The end of the largest view in bytes: the virtual size, or that of a larger snapshot.
    fn end(&self) -> u64;

    /// Refuses, before the first [`fill`](Self::fill), an image whose tables cannot be trusted.
    fn check_tables(&self) -> Result<()>;

    /// Whether some view falls through to the backing file at `at`, and for how long the answer
    /// holds, at most `length` (≥ 1) bytes.
    fn missing_at(&self, at: GuestOffset, length: u64) -> Result<Missing>;

    /// Whether zeros can be held without data.
    fn has_zero_clusters(&self) -> bool;

    /// Told of a range in which old and new backing file are read and compared. Whoever only takes notes
    /// wants to know.
    fn is_compared(&self, at: GuestOffset, length: u64) {
        let _ = (at, length);
    }

    /// Lets every view that falls through to the backing file in this range hold `content`
    /// itself. What a view holds already stays. The range begins at a multiple of
    /// [`unit`](Self::unit) and ends at one. May be called from several threads for disjoint
    /// ranges. Durable only after [`commit`](Self::commit). Returns what it cost.
    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<Filled>;

    /// Lets the active disk fall through to the backing file in a range of whole units, where no
    /// snapshot shares what it holds. Durable only after [`commit`](Self::commit). Returns how many
    /// bytes that were.
    fn forget(&self, at: GuestOffset, length: u64) -> Result<u64>;

    /// Frees the space of all that was forgotten before the last [`commit`](Self::commit). To be
    /// called when nobody reads by the old tables any more (invariant I4).
    fn free_forgotten(&self) -> Result<()>;

    /// Makes all that was filled or forgotten durable, in the order of invariants I2 and I3.
    fn commit(&self) -> Result<()>;

    /// Refuses what [`set_backing`](Self::set_backing) would refuse, without writing anything.
    fn check_backing(&self, backing: Option<&Reference>) -> Result<()>;

    /// Lets the header name another backing file, durably, in one step (invariant I3).
    fn set_backing(&self, backing: Option<&Reference>) -> Result<()>;
}

/// What [`Overlay::fill`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Bytes that are the overlay's own now, as data.
    pub copied: u64,
    /// Bytes that are the overlay's own now, as zero clusters.
    pub zeroed: u64,
}
