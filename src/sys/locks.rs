//! Locks on single bytes of a file, held by its open description.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::{check, signed};

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
