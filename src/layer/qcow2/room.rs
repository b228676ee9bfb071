//! Room for metadata on the host, taken before anything depends on it.
//!
//! A file may be full when a commit comes. What the commit writes has its place by then: a new table or
//! refcount block is written, as zeros, when it is allocated, and a piece of an old one that lies in a hole
//! of the file is written as it is before it is changed. So it is the write of a guest, or the copy of a
//! rebase, that meets the full disk, and never what makes earlier ones durable.

use crate::error::Result;
use crate::file::{HostFile, HostOffset};

/// Zeros that are written at once.
const PIECE: u64 = 64 << 10;

/// Lets the host set space aside for `bytes`, which are what the file has at `at`.
///
/// # Errors
/// There is no space, or the file cannot be looked at.
pub fn keep(file: &dyn HostFile, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let length = bytes.len() as u64;
    let mut done = 0;
    while done < length {
        let run = file.run_at(at + done, length - done)?;
        if !run.is_data {
            return file.write_at(at, bytes);
        }
        done += run.length;
    }
    Ok(())
}

/// Lets the host set space aside for `length` bytes at `at` that nothing points to yet. They are zeros
/// afterwards.
///
/// # Errors
/// There is no space. Some of it may have been set aside.
pub fn take(file: &dyn HostFile, at: HostOffset, length: u64) -> Result<()> {
    let zeros = vec![0; length.min(PIECE) as usize];
    (0..length).step_by(PIECE as usize).try_for_each(|done| {
        let piece = (length - done).min(PIECE) as usize;
        file.write_at(at + done, &zeros[..piece])
    })
}
