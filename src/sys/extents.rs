//! Where the bytes of a file lie on its device, and how files come to share them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// A run of a file and where it lies on the device under the file system (`struct fiemap_extent`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PhysicalExtent {
    /// Offset in the file, in bytes.
    pub logical: u64,
    /// Offset on the device, in bytes.
    pub physical: u64,
    /// Length in bytes.
    pub length: u64,
    reserved: [u64; 2],
    /// What is known of it: see [`fiemap`].
    pub flags: u32,
    reserved_too: [u32; 3],
}

/// Flags of a [`PhysicalExtent`] (`linux/fiemap.h`).
pub mod fiemap {
    /// The last one of the file.
    pub const LAST: u32 = 0x0001;
    /// Joined from several by the file system.
    pub const MERGED: u32 = 0x1000;
    /// Other files have it, too.
    pub const SHARED: u32 = 0x2000;
}

/// `struct fiemap` with room for one extent.
#[repr(C)]
#[derive(Default)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
    extent: PhysicalExtent,
}

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`, whose extents do not count.
const FIEMAP_REQUEST: libc::c_ulong = 0xc020_660b;
/// Write back first what is in the page cache only.
const FIEMAP_SYNC: u32 = 1;

/// The first extent of a file that reaches into `[offset, offset + length)`, after what the page
/// cache holds has been written back. It may begin before `offset`.
pub fn physical_extent(file: &File, offset: u64, length: u64) -> io::Result<Option<PhysicalExtent>> {
    let mut map = Fiemap { start: offset, length, flags: FIEMAP_SYNC, room: 1, ..Fiemap::default() };
    // SAFETY: the descriptor is open, and `map` has the layout that the request is defined with and
    // the room that it says.
    check(unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP_REQUEST, &raw mut map) })?;
    Ok((map.mapped > 0).then_some(map.extent))
}

/// `struct file_clone_range`.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    length: u64,
    offset: u64,
}

/// `FICLONERANGE`: `_IOW(0x94, 13, struct file_clone_range)`.
const CLONE_REQUEST: libc::c_ulong = 0x4020_940d;

/// Lets `[offset, offset + length)` of `file` share the extents of another file of the same file
/// system. All three must be multiples of its block size.
pub fn share_extent(
    file: &File,
    offset: u64,
    source: BorrowedFd<'_>,
    source_offset: u64,
    length: u64,
) -> io::Result<()> {
    let range = CloneRange { source: source.as_raw_fd().into(), source_offset, length, offset };
    // SAFETY: both descriptors are open, and `range` has the layout of the request, which only
    // reads it.
    check(unsafe { libc::ioctl(file.as_raw_fd(), CLONE_REQUEST, &raw const range) }).map(drop)
}

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    others: [u32; 4],
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const ATTRIBUTES_REQUEST: libc::c_ulong = 0x801c_581f;
/// The data lies on the real-time device of an XFS, not on that with the metadata.
const REAL_TIME: u32 = 1;

/// Whether the file lies on a file system that lets files share extents, and tells where they lie
/// on its one device: Btrfs (whose addresses are of all its devices together), or XFS.
pub fn tells_shared_extents(file: &File) -> io::Result<bool> {
    // SAFETY: `statfs` is plain old data; all zeros is a valid value.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `about` is valid for the call to write.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut about) })?;
    match about.f_type {
        libc::BTRFS_SUPER_MAGIC => Ok(true),
        libc::XFS_SUPER_MAGIC => {
            let mut attributes = Attributes::default();
            // SAFETY: the descriptor is open, and `attributes` has the layout of the request.
            check(unsafe { libc::ioctl(file.as_raw_fd(), ATTRIBUTES_REQUEST, &raw mut attributes) })?;
            Ok(attributes.flags & REAL_TIME == 0)
        }
        _ => Ok(false),
    }
}
