//! Mounts and device numbers.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;

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
