//! Host files: positioned I/O, holes, size, sync and locks of the files that images lie in.
//!
//! The trait is the seam at which tests record, fail or reorder what is written; everything above
//! it reaches the disk through it. It knows nothing of formats.

mod buffer;
mod cache;
mod direct;
mod directory;
mod local;
mod lock;
pub(crate) mod output;
mod stamp;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

pub(crate) use buffer::AlignedBuffer;
pub use cache::CacheMode;
pub use directory::Directory;
pub use local::LocalFile;
pub use lock::Lock;
pub use stamp::Stamp;

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::Result;

/// Byte offset in a file that stores an image. Never mixed with [`GuestOffset`].
///
/// [`GuestOffset`]: crate::layer::GuestOffset
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl std::ops::Add<u64> for HostOffset {
    type Output = Self;
    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::LowerHex for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// What makes a file the same file under another name: device and inode, or the device number of
/// a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// `st_dev`, or 0 for a block device.
    pub device: u64,
    /// `st_ino`, or `st_rdev` for a block device.
    pub inode: u64,
}

impl Identity {
    /// That of the block device with this number.
    pub(crate) fn of_device(number: u64) -> Self {
        Self { device: 0, inode: number }
    }

    /// Whether it is that of a block device.
    pub fn is_block_device(self) -> bool {
        self.device == 0
    }
}

/// Whether the file may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Opened for reading only (invariant I5).
    ReadOnly,
    /// Opened for reading and writing.
    ReadWrite,
}

/// A run of bytes that a file system answers alike for: all data, or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Whether it may hold anything but zeros.
    pub is_data: bool,
    /// Length in bytes, at least 1.
    pub length: u64,
}

/// Where bytes lie on the device under a file system. Equal places mean equal bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file system (`st_dev`).
    pub device: u64,
    /// Byte offset.
    pub offset: u64,
}

impl Place {
    /// The place of what lies `bytes` further on in the same extent.
    #[must_use]
    pub fn advanced(self, bytes: u64) -> Self {
        Self { offset: self.offset + bytes, ..self }
    }
}

/// A file that stores an image. All methods take `&self`: I/O is positioned and may run in
/// parallel. Errors name the file and the offset.
pub trait HostFile: fmt::Debug + Send + Sync {
    /// The name under which it was opened.
    fn path(&self) -> &Path;

    /// The directory that it was found in, if that is held open: what it names relative to itself is there.
    fn directory(&self) -> Option<&Arc<Directory>> {
        None
    }

    /// What makes it this file and no other.
    fn identity(&self) -> Identity;

    /// Whether it may be written.
    fn access(&self) -> Access;

    /// Its length in bytes: as it was when opened, and as we have changed it since.
    fn size(&self) -> u64;

    /// Takes note of the length that others have given it. Nobody may write to it through this meanwhile.
    ///
    /// # Errors
    /// The file system does not answer.
    fn take_size_anew(&self) -> Result<()> {
        Ok(())
    }

    /// What it looks like now, whoever has changed it.
    ///
    /// # Errors
    /// The file system does not answer.
    fn stamp(&self) -> Result<Stamp>;

    /// The bytes that it takes on its file system (`st_blocks` × 512).
    ///
    /// # Errors
    /// The file system does not answer.
    fn allocated_bytes(&self) -> Result<u64>;

    /// Fills `buffer` from `at`. Beyond [`size`](Self::size) there are zeros, as QEMU has it; a
    /// file that has become shorter than that is an error.
    ///
    /// # Errors
    /// The file cannot be read, or was cut short.
    fn read_at(&self, at: HostOffset, buffer: &mut [u8]) -> Result<()>;

    /// Writes all of `buffer` at `at`, enlarging the file where needed.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write_at(&self, at: HostOffset, buffer: &[u8]) -> Result<()>;

    /// Sets the length in bytes.
    ///
    /// # Errors
    /// The file cannot have that length.
    fn set_size(&self, size: u64) -> Result<()>;

    /// Gives a range within the length space on the file system, so that writing to it cannot
    /// fail for want of it. What it reads as does not change.
    ///
    /// # Errors
    /// There is no space.
    fn allocate(&self, at: HostOffset, length: u64) -> Result<()>;

    /// Frees the blocks of a range, which read as zeros afterwards. The length stays. What shares a
    /// sector of a block device with bytes outside of the range stays as it is.
    ///
    /// # Errors
    /// The file cannot be written.
    fn punch(&self, at: HostOffset, length: u64) -> Result<()>;

    /// Returns when all that was written is durable, and what is needed to find it (`fdatasync`).
    ///
    /// # Errors
    /// Something that was written may be lost.
    fn sync(&self) -> Result<()>;

    /// Lets the kernel begin to write to the disk what it has, so that [`sync`](Self::sync) has less to
    /// wait for. Makes nothing durable.
    fn start_sync(&self) {}

    /// Writes back what whoever has mapped the file has written to a range, as far as the file system can
    /// tell, so that writing there again moves its times. Makes nothing durable.
    fn write_back(&self, at: HostOffset, length: u64) {
        let _ = (at, length);
    }

    /// Lets the kernel forget what it has cached, so that what is read next comes from the disk.
    /// Does nothing where there is no cache.
    ///
    /// # Errors
    /// What was written cannot be written out.
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    /// The run that begins at `at`, at most `length` (≥ 1) bytes long. A file system that cannot
    /// tell answers data; beyond the end there is a hole.
    ///
    /// # Errors
    /// The file system fails to look.
    fn run_at(&self, at: HostOffset, length: u64) -> Result<Run>;

    /// Where the bytes at `at` lie on the device, and for how many of them, at most `length` (≥ 1), the
    /// answer holds. `None` where no other file has the same extent, or where that is not known.
    ///
    /// # Errors
    /// The file system fails to look.
    fn shared_place_at(&self, at: HostOffset, length: u64) -> Result<(Option<Place>, u64)> {
        let _ = at;
        Ok((None, length))
    }

    /// Lets this file have a part in an extent of another: `[at, at + length)` is from now on what
    /// `from` has from `from_at` on, and takes no space until one of them is written to. Whether
    /// that could be done; if not, nothing was. Durable after [`sync`](Self::sync).
    fn share(&self, at: HostOffset, from: &dyn HostFile, from_at: HostOffset, length: u64) -> bool {
        let _ = (at, from, from_at, length);
        false
    }

    /// The open file, if it is one of this machine.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Takes the locks of `lock`, in addition to or in place of those held, or gives all back
    /// with [`Lock::None`].
    ///
    /// # Errors
    /// Another process holds a lock that rules it out ([`ErrorKind::Busy`]).
    fn lock(&self, lock: Lock) -> Result<()>;
}
