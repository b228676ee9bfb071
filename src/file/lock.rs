//! QEMU-compatible image locks.
//!
//! QEMU marks each permission that it uses with a shared open-file-description lock on byte
//! 100 + n of the file, and each permission that it does not grant to others on byte 200 + n;
//! then it looks whether anyone holds the opposite byte. Permission bits from QEMU's documentation
//! of block layer permissions: 0 consistent read, 1 write, 2 write unchanged, 3 resize.

use std::fs::File;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, errno};

const USED: u64 = 100;
const REFUSED: u64 = 200;
const PERMISSIONS: u8 = 5;

const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// How an image is shared with other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Not at all looked after (`qemu-img -U`, `--force-share`).
    None,
    /// We look at it while others may write: what QEMU's programs take to read a raw file.
    Look,
    /// We read; others may read too, but nobody may write.
    Read,
    /// We write; nobody else may open it, except with `--force-share`.
    Write,
}

impl Lock {
    /// Bits of the permissions used and of those refused to others.
    fn bits(self) -> (u8, u8) {
        match self {
            Self::None => (0, 0),
            Self::Look => (CONSISTENT_READ, 0),
            Self::Read => (CONSISTENT_READ, WRITE | RESIZE),
            Self::Write => (CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE),
        }
    }
}

/// Moves from the locks of `held` to those of `lock`; on a conflict `held` stays as it was.
pub(super) fn apply(file: &File, held: Lock, lock: Lock) -> Result<()> {
    let taken = take(file, lock);
    let keep = if taken.is_ok() { lock } else { held };
    release_all_but(file, keep)?;
    taken
}

fn take(file: &File, lock: Lock) -> Result<()> {
    let (used, refused) = lock.bits();
    for byte in all_bytes(lock) {
        sys::lock_byte_shared(file, byte).map_err(|e| match e.raw_os_error() {
            Some(errno::EAGAIN | errno::EACCES) => in_use(lock),
            _ => Error::io(e, "cannot lock the image"),
        })?;
    }
    for opposite in bytes(REFUSED, used).chain(bytes(USED, refused)) {
        let locked = sys::byte_is_locked(file, opposite);
        if locked.map_err(|e| Error::io(e, "cannot look for locks on the image"))? {
            return Err(in_use(lock));
        }
    }
    Ok(())
}

/// Whether somebody else has a file open as an image, whichever of these locks it holds.
pub(super) fn is_held(file: &File) -> std::io::Result<bool> {
    for byte in bytes(USED, u8::MAX).chain(bytes(REFUSED, u8::MAX)) {
        if sys::byte_is_locked(file, byte)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn release_all_but(file: &File, keep: Lock) -> Result<()> {
    let every = bytes(USED, u8::MAX).chain(bytes(REFUSED, u8::MAX));
    for byte in every.filter(|&byte| !all_bytes(keep).any(|kept| kept == byte)) {
        sys::unlock_byte(file, byte).map_err(|e| Error::io(e, "cannot unlock the image"))?;
    }
    Ok(())
}

fn all_bytes(lock: Lock) -> impl Iterator<Item = u64> {
    let (used, refused) = lock.bits();
    bytes(USED, used).chain(bytes(REFUSED, refused))
}

fn bytes(base: u64, bits: u8) -> impl Iterator<Item = u64> {
    (0..PERMISSIONS).filter(move |n| bits & (1 << n) != 0).map(move |n| base + u64::from(n))
}

fn in_use(lock: Lock) -> Error {
    let what = match lock {
        Lock::Write => "is in use by another process",
        _ => "is open for writing in another process",
    };
    Error::new(ErrorKind::Busy, what)
        .hint("is a virtual machine running on it? stop it first, or look with `fuser -v FILE`")
}
