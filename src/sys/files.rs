//! Calls on open files: holes, space, caches, and the flags to open with.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{check, signed};

/// What `fallocate(2)` is asked for.
pub mod fallocate {
    use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};

    /// The file does not grow.
    pub const KEEP_SIZE: i32 = FALLOC_FL_KEEP_SIZE;
    /// Zeros that take no space.
    pub const PUNCH_HOLE: i32 = FALLOC_FL_PUNCH_HOLE;
    /// Zeros.
    pub const ZERO_RANGE: i32 = FALLOC_FL_ZERO_RANGE;
}

/// The ways to look for data and holes with `lseek(2)`.
pub mod whence {
    pub use libc::{SEEK_DATA, SEEK_HOLE};
}

/// `open(2)` flags for images: a FIFO or a device without a medium must not block the open, and
/// no program that we start inherits the descriptor.
pub const OPEN_IMAGE: i32 = libc::O_NONBLOCK | OPEN_IMAGE_WAITING;

/// The same for what is known to be a regular file: waits for the leases of others on it.
pub const OPEN_IMAGE_WAITING: i32 = libc::O_CLOEXEC | libc::O_NOCTTY;

/// `open(2)`: to see what is there, without opening it.
pub const O_PATH: i32 = libc::O_PATH;

/// `open(2)`: a directory, or nothing.
pub const O_DIRECTORY: i32 = libc::O_DIRECTORY;

/// `open(2)`: for reading, or for reading and writing.
pub const O_RDONLY: i32 = libc::O_RDONLY;
pub const O_RDWR: i32 = libc::O_RDWR;

/// Opens what `path` leads to from `directory`, or from the current directory without one. A path that is
/// absolute leads where it leads. No program that we start inherits it.
pub fn open_at(directory: Option<BorrowedFd<'_>>, path: &Path, flags: i32) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let directory = directory.map_or(libc::AT_FDCWD, |directory| directory.as_raw_fd());
    // SAFETY: the path is a C string that outlives the call, and the directory is open as long as it is
    // borrowed. Without O_CREAT there is no further argument.
    let opened = check(unsafe { libc::openat(directory, path.as_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: it has just been opened, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) }.into())
}

/// `open(2)`: past the page cache.
pub const O_DIRECT: i32 = libc::O_DIRECT;

/// `open(2)`: every write is durable when it returns.
pub const O_DSYNC: i32 = libc::O_DSYNC;

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; lseek touches no memory.
    let found = unsafe { libc::lseek(file.as_raw_fd(), signed(offset)?, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}

/// The first offset at or after `offset` that holds data (`SEEK_DATA`), `None` if none follows.
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_DATA)
}

/// The first offset at or after `offset` that lies in a hole (`SEEK_HOLE`; the end of the file
/// counts as one), `None` if `offset` lies beyond the end.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_HOLE)
}

/// Gives `[offset, offset + length)` space on the file system, where need be by reading and writing
/// (`posix_fallocate`).
pub fn allocate(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (signed(offset)?, signed(length)?);
    if length == 0 {
        return Ok(());
    }
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), offset, length) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Frees the blocks of `[offset, offset + length)`; the range reads as zeros, the size stays.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, length) = (signed(offset)?, signed(length)?);
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) }).map(drop)
}

/// The unit in which a block device is read and written, in bytes.
pub fn sector_size(device: &File) -> io::Result<u64> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as `device` is borrowed; `size` is what the call fills.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET as _, &raw mut size) })?;
    u64::try_from(size).map_err(io::Error::other)
}

/// Begins to write back what the page cache holds of a file, and does not wait for it.
pub fn start_writing_back(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) }).map(drop)
}

/// Whether the kernel refuses all writes to a block device (`BLKROGET`).
pub fn is_read_only_device(file: &File) -> io::Result<bool> {
    let mut is_read_only: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the call writes one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut is_read_only) })?;
    Ok(is_read_only != 0)
}

/// `_IO(0x12, 94)` of `linux/fs.h`, which libc has not.
const BLKROGET: libc::Ioctl = (0x12 << 8 | 94) as libc::Ioctl;

/// Writes back what the page cache holds of a range of a file, and waits for it: pages that somebody has
/// mapped tell of the next write to them then.
pub fn write_back(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (signed(offset)?, signed(length)?);
    let how =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, how) }).map(drop)
}

/// Drops the clean pages of a file from the page cache.
pub fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Sets the flag `FS_NOCOW_FL` of an empty file.
pub fn stop_copies(file: &File) -> io::Result<()> {
    /// `FS_NOCOW_FL` of `linux/fs.h`.
    const NO_COPIES: libc::c_int = 0x0080_0000;
    let mut flags: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int, in spite of the request's name.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) })?;
    flags |= NO_COPIES;
    // SAFETY: the descriptor is open, and the kernel reads one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) }).map(drop)
}
