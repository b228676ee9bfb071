//! Every system call that std lacks, as safe functions: the only `unsafe` and the only `libc::` of
//! the crate. No policy: what the kernel answers is handed on as it is.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// The errno values that the rest of the crate names.
pub mod errno {
    pub use libc::{
        EACCES, EAGAIN, EBUSY, EDQUOT, EFBIG, EINTR, EINVAL, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENODEV,
        ENOENT, ENOSPC, ENOTCONN, ENXIO, EOPNOTSUPP, EPERM, EROFS, ETXTBSY, EUCLEAN,
    };
}

/// The numbers of the signals by which a user stops a program.
pub mod signal {
    pub use libc::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM};
}

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
pub const OPEN_IMAGE: i32 = libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY;

/// `open(2)`: past the page cache.
pub const O_DIRECT: i32 = libc::O_DIRECT;

/// `open(2)`: every write is durable when it returns.
pub const O_DSYNC: i32 = libc::O_DSYNC;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn signed(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

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

/// Begins to write back what the page cache holds of a file, and does not wait for it.
pub fn start_writing_back(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) }).map(drop)
}

/// Drops the clean pages of a file from the page cache.
pub fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

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

fn byte_lock(kind: libc::c_int, byte: u64) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain old data; all zeros is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = signed(byte)?;
    lock.l_len = 1;
    Ok(lock)
}

fn set_byte_lock(file: &File, kind: libc::c_int, byte: u64) -> io::Result<()> {
    let lock = byte_lock(kind, byte)?;
    // SAFETY: the descriptor is open, and `lock` outlives the call, which only reads it.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// Takes a shared open-file-description lock on one byte. Fails with EAGAIN or EACCES when
/// another description holds it exclusively.
pub fn lock_byte_shared(file: &File, byte: u64) -> io::Result<()> {
    set_byte_lock(file, libc::F_RDLCK, byte)
}

/// Gives an open-file-description lock on one byte back.
pub fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    set_byte_lock(file, libc::F_UNLCK, byte)
}

/// Whether another open file description holds any lock on this byte.
pub fn byte_is_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte)?;
    // SAFETY: the descriptor is open, and `lock` is a valid flock that the call may overwrite.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Year, month (1–12), day, hour, minute and second of a time (seconds since the epoch) in the
/// local time zone.
pub fn local_time(seconds: i64) -> Option<[i32; 6]> {
    // SAFETY: `tm` is plain old data (its one pointer may be null); all zeros is a valid value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    let found = unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) };
    let date = [tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec];
    (!found.is_null()).then_some(date)
}

/// Raises the soft limit of open files to the hard one: a chain of 500 layers needs 500.
pub fn raise_open_file_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that the call overwrites.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit that the call only reads.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(drop)
}

/// Lets a write beyond the file-size limit fail with EFBIG, where it would kill the process.
pub fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: no handler is installed, so that no code runs in signal context.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The effective user and group of this process.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: both calls always succeed and touch no memory.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Which of the two processes one is after [`fork`].
pub enum Fork {
    /// The process that called.
    Parent,
    /// The new one, in a session of its own.
    Child,
}

/// Forks into a new session. To be called while the process has one thread only: threads do not
/// survive a fork, the locks that they held do.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the caller has one thread, so that no lock or heap state is torn in the child.
    match check(unsafe { libc::fork() })? {
        0 => {
            // SAFETY: no memory is passed; it cannot fail in a process that was just forked.
            check(unsafe { libc::setsid() })?;
            Ok(Fork::Child)
        }
        _ => Ok(Fork::Parent),
    }
}

/// Makes descriptor `target` (0, 1 or 2) another name of `source`.
pub fn redirect(source: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    // SAFETY: `source` is open; what `target` was before is one of the standard streams.
    check(unsafe { libc::dup2(source.as_raw_fd(), target) }).map(drop)
}

/// SIGINT, SIGTERM and SIGHUP, kept from their default action so that one thread can wait for them.
pub struct StopSignals(libc::sigset_t);

impl StopSignals {
    /// Blocks the three in this thread and in all that it starts afterwards; but those that the
    /// process ignores (`nohup`) stay ignored.
    pub fn block() -> io::Result<Self> {
        // SAFETY: `set` is initialised by sigemptyset before any other use.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            check(libc::sigemptyset(&raw mut set))?;
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                if !is_ignored(signal)? {
                    check(libc::sigaddset(&raw mut set, signal))?;
                }
            }
            set
        };
        let signals = Self(set);
        signals.mask(libc::SIG_BLOCK)?;
        Ok(signals)
    }

    /// Waits until one of them arrives and returns its number.
    pub fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: the set is initialised, and `signal` is valid for the call to write.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }

    /// Lets them do from now on what they do by default, in this thread: they end the process.
    pub fn unblock(&self) -> io::Result<()> {
        self.mask(libc::SIG_UNBLOCK)
    }

    fn mask(&self, how: libc::c_int) -> io::Result<()> {
        // SAFETY: the set is initialised; no old mask is asked for.
        match unsafe { libc::pthread_sigmask(how, &raw const self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    // SAFETY: `sigaction` is plain old data; all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: no action is set, and `action` is valid for the call to write.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) })?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// Takes a mount down that nobody uses. For root alone.
pub fn unmount(mountpoint: &Path) -> io::Result<()> {
    unmount_with(mountpoint, 0)
}

/// Takes a mount out of the directory tree although it is in use (`MNT_DETACH`).
pub fn detach_mount(mountpoint: &Path) -> io::Result<()> {
    unmount_with(mountpoint, libc::MNT_DETACH)
}

fn unmount_with(mountpoint: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string with a NUL at its end that outlives the call.
    check(unsafe { libc::umount2(path.as_ptr(), flags) }).map(drop)
}

/// Major and minor number of a device, as `/sys` names it.
pub fn device_numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// Another process, held by a descriptor: its number cannot come to mean a later one.
pub struct Process(OwnedFd);

impl Process {
    /// The process that has this number now.
    pub fn open(number: u32) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        let descriptor = check(libc::c_int::try_from(opened).unwrap_or(-1))?;
        // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Waits until all its threads have ended, at most so long; tells whether they have.
    pub fn ends_within(&self, time: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: `poll` is one valid entry that outlives the call.
        check(unsafe { libc::poll(&raw mut poll, 1, milliseconds) }).map(|ready| ready > 0)
    }
}
