//! Whether two chains show a guest the same bytes.
//!
//! Metadata first: what both take from the same place, or both hold as zeros, is not read.

use super::{Chain, Source};
use crate::error::{Error, Result};
use crate::layer::{Detail, GuestOffset};

/// Bytes read and compared at a time.
const CHUNK: u64 = 2 << 20;
/// Mismatches are reported at multiples of this many bytes.
const SECTOR: usize = 512;

/// What a comparison found first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No difference.
    Same,
    /// The bytes differ in the sector at this guest offset.
    Content(u64),
    /// The allocation differs at this guest offset (asked for strictness only).
    Allocation(u64),
}

/// What kept a comparison from coming to an end.
#[derive(Debug)]
pub enum Trouble {
    /// It cannot be told where the bytes come from.
    Metadata(Error),
    /// The bytes cannot be read.
    Data(Error),
}

/// A comparison of two chains over a range of guest bytes.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// One of them.
    pub first: &'a Chain,
    /// The other.
    pub second: &'a Chain,
    /// Whether allocated, zero and unallocated are to be told apart, too.
    pub is_strict: bool,
}

impl Comparison<'_> {
    /// Compares `[start, end)`. `progress` is told how far it has come.
    pub fn run(&self, start: u64, end: u64, mut progress: impl FnMut(u64)) -> Result<Verdict, Trouble> {
        let mut buffers = [vec![0; CHUNK as usize], vec![0; CHUNK as usize]];
        let mut at = start;
        while at < end {
            let (verdict, length) = self.step(GuestOffset(at), end - at, &mut buffers)?;
            if verdict != Verdict::Same {
                return Ok(verdict);
            }
            at += length;
            progress(at);
        }
        Ok(Verdict::Same)
    }

    fn step(
        &self,
        at: GuestOffset,
        length: u64,
        buffers: &mut [Vec<u8>; 2],
    ) -> Result<(Verdict, u64), Trouble> {
        let mut length = length;
        if self.is_strict {
            let first = self.first.map_entry_at(at, length).map_err(Trouble::Metadata)?;
            let second = self.second.map_entry_at(at, first.length).map_err(Trouble::Metadata)?;
            if !first.is_like(&second) {
                return Ok((Verdict::Allocation(at.0), 0));
            }
            length = second.length;
        }
        let first = self.first.source_at(at, length, Detail::Holes).map_err(Trouble::Metadata)?;
        let second = self.second.source_at(at, first.1, Detail::Holes).map_err(Trouble::Metadata)?;
        // The same compressed cluster is nothing that reads alike before it is known to read.
        if first.0 == second.0 && !matches!(first.0, Source::Compressed(..)) {
            return Ok((Verdict::Same, second.1));
        }
        let length = second.1.min(CHUNK);
        let [one, two] = buffers.each_mut().map(|buffer| &mut buffer[..length as usize]);
        fill(self.first, first.0, at, one).map_err(Trouble::Data)?;
        fill(self.second, second.0, at, two).map_err(Trouble::Data)?;
        let verdict = match differing_sector(one, two) {
            None => Verdict::Same,
            Some(index) => Verdict::Content(at.0 + index as u64),
        };
        Ok((verdict, length))
    }
}

fn fill(chain: &Chain, source: Source, at: GuestOffset, buffer: &mut [u8]) -> Result<()> {
    match source {
        Source::Zero => {
            buffer.fill(0);
            Ok(())
        }
        _ => chain.read_at(at, buffer),
    }
}

/// Where the first sector that differs begins, counted from the beginning of the buffers.
fn differing_sector(one: &[u8], two: &[u8]) -> Option<usize> {
    if one == two {
        return None;
    }
    let sectors = one.chunks(SECTOR).zip(two.chunks(SECTOR));
    sectors.into_iter().position(|(one, two)| one != two).map(|sector| sector * SECTOR)
}
