//! Reading and writing past the page cache: O_DIRECT takes whole blocks from aligned memory only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use super::AlignedBuffer;

/// The strictest alignment of offset and length that a disk asks for.
const BLOCK: u64 = 4096;

/// Turns any read or write into one of whole blocks. Its buffer also keeps writes that share a
/// block apart: each reads the block, changes its part, and writes it back.
#[derive(Debug, Default)]
pub(super) struct Direct(Mutex<AlignedBuffer>);

impl Direct {
    /// Like `FileExt::read_at`.
    pub fn read_at(&self, file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let start = at / BLOCK * BLOCK;
        let end = (at + buffer.len() as u64).next_multiple_of(BLOCK);
        let skip = (at - start) as usize;
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let blocks = blocks.of_length((end - start) as usize);
        let read = file.read_at(blocks, start)?.saturating_sub(skip).min(buffer.len());
        buffer[..read].copy_from_slice(&blocks[skip..skip + read]);
        Ok(read)
    }

    /// Like `FileExt::write_all_at`. A file may end up longer, up to a block boundary.
    pub fn write_all_at(&self, file: &File, buffer: &[u8], at: u64) -> io::Result<()> {
        let start = at / BLOCK * BLOCK;
        let end = (at + buffer.len() as u64).next_multiple_of(BLOCK);
        let skip = (at - start) as usize;
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let blocks = blocks.of_length((end - start) as usize);
        if (skip, blocks.len()) != (0, buffer.len()) {
            fill_from(file, &mut blocks[..BLOCK as usize], start)?;
            let last = blocks.len() - BLOCK as usize;
            fill_from(file, &mut blocks[last..], start + last as u64)?;
        }
        blocks[skip..skip + buffer.len()].copy_from_slice(buffer);
        file.write_all_at(blocks, start)
    }
}

/// Reads one block; zeros behind the end of the file.
fn fill_from(file: &File, block: &mut [u8], at: u64) -> io::Result<()> {
    let read = file.read_at(block, at)?;
    block[read..].fill(0);
    Ok(())
}
