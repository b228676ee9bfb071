//! Mounts and device numbers.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::check;

/// What becomes of those who use a mount that is taken down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// The mount stays as long as there are any.
    Respected,
    /// It is out of the directory tree at once, and ends with the last of them (`MNT_DETACH`).
    Kept,
}

/// Takes a mount out of the directory tree although it is in use (`MNT_DETACH`).
pub fn detach_mount(mountpoint: &Path) -> io::Result<()> {
    unmount(mountpoint, libc::MNT_DETACH)
}

/// Takes the mount down that lies on `name` in the directory `parent` (`UMOUNT_NOFOLLOW`).
pub fn unmount_in(parent: BorrowedFd<'_>, name: &OsStr, users: Users) -> io::Result<()> {
    let lazily = if users == Users::Kept { libc::MNT_DETACH } else { 0 };
    unmount(&place_in(parent, name), libc::UMOUNT_NOFOLLOW | lazily)
}

fn unmount(mountpoint: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string with a NUL at its end that outlives the call.
    check(unsafe { libc::umount2(path.as_ptr(), flags) }).map(drop)
}

/// A name in an open directory, as a path.
fn place_in(parent: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name)
}

/// Opens the place that a path leads to (`O_PATH`): its file system is not asked for anything.
pub fn open_place(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

/// The same for `name` in the directory `parent`; a symbolic link is the place itself.
pub fn open_place_in(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags).open(place_in(parent, name))
}

/// Major and minor number of a device, as `/sys` names it.
pub fn device_numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// The device of this major and minor number.
pub fn device(major: u32, minor: u32) -> u64 {
    libc::makedev(major, minor)
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    rest: [u64; 26],
}

/// `LOOP_GET_STATUS64` of linux/loop.h.
const LOOP_GET_STATUS: libc::Ioctl = 0x4c05;

/// The file behind a loop device: device number of its file system, inode, and its own device number if it
/// is a device.
pub fn behind_loop(device: &File) -> io::Result<(u64, u64, u64)> {
    let mut info = LoopInfo { device: 0, inode: 0, rdevice: 0, rest: [0; 26] };
    // SAFETY: the descriptor is open for as long as `device` is borrowed; `info` has the layout and the size
    // (232 bytes) of what this request writes.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS, &raw mut info) })?;
    Ok((info.device, info.inode, info.rdevice))
}

/// The file that `path` leads to: device number of its file system, inode, and its own device number if it
/// is a device. What the kernel remembers of it counts: no server of a file system is asked.
pub fn identity_unasked(path: &Path) -> io::Result<(u64, u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `statx` is plain old data; all zeros is a valid value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let wanted = libc::STATX_TYPE | libc::STATX_INO;
    // SAFETY: `path` is a string with a NUL at its end and `found` is valid for the call to write.
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, wanted, &raw mut found) })?;
    let kind = u32::from(found.stx_mode) & libc::S_IFMT;
    let is_file = kind == libc::S_IFREG;
    if !is_file && kind != libc::S_IFBLK {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let rdevice = if is_file { 0 } else { device(found.stx_rdev_major, found.stx_rdev_minor) };
    Ok((device(found.stx_dev_major, found.stx_dev_minor), found.stx_ino, rdevice))
}

/// An empty file in memory with this name, which others see in `/proc`. No program that we start inherits it.
pub fn memory_file(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a string with a NUL at its end that outlives the call.
    let descriptor = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}
