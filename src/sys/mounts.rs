//! Mounts and device numbers.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
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
