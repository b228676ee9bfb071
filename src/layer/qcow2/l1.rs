//! An L1 table in memory.
//!
//! Takes the room of the entries that are in use: a hostile image can claim 32 MiB for the table of
//! each of 65536 snapshots, and for none of them must the file hold more than a hole.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::table::read_words;
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

/// Entries of a piece. A piece of empty entries is not kept.
const PIECE: u64 = 512;
/// So many entries are read at once, whole pieces. A larger table is searched for holes before.
const AT_ONCE: u64 = 64 * PIECE;

/// The entries of an L1 table. A clone shares them until one of the two is changed.
#[derive(Clone, Debug, Default)]
pub(super) struct L1Table {
    pieces: BTreeMap<u64, Arc<[u64]>>,
}

impl L1Table {
    /// Reads the table at `offset`, which begins and ends in the file.
    pub fn read(file: &dyn HostFile, offset: u64, entries: u32) -> Result<Self> {
        if offset + u64::from(entries) * 8 > file.size().next_multiple_of(512) {
            return Err(Error::corrupt("the L1 table leaves the file").offset(offset));
        }
        Self::read_cut(file, offset, entries)
    }

    /// The same where the file may be too short: what is missing is empty.
    pub fn read_cut(file: &dyn HostFile, offset: u64, entries: u32) -> Result<Self> {
        let entries = u64::from(entries);
        let mut table = Self::default();
        let mut next = 0;
        while next < entries {
            let at = HostOffset(offset + next * 8);
            next += match entries - next > AT_ONCE {
                true => empty_entries(file, at, entries - next)?,
                false => 0,
            };
            let end = entries.min(next + AT_ONCE);
            table.read_part(file, HostOffset(offset + next * 8), next..end)?;
            next = end;
        }
        Ok(table)
    }

    fn read_part(&mut self, file: &dyn HostFile, at: HostOffset, entries: Range<u64>) -> Result<()> {
        let words = read_words(file, at, entries.end - entries.start)?;
        let pieces = (entries.start / PIECE..).zip(words.chunks(PIECE as usize));
        let used = pieces.filter(|(_, words)| words.iter().any(|word| *word != 0));
        self.pieces.extend(used.map(|(number, words)| (number, Arc::from(words))));
        Ok(())
    }

    /// The entry with this index, 0 where there is none.
    pub fn entry(&self, index: u64) -> u64 {
        let piece = self.pieces.get(&(index / PIECE));
        piece.and_then(|piece| piece.get((index % PIECE) as usize)).copied().unwrap_or(0)
    }

    /// Index and word of each entry that is not empty.
    pub fn used(&self) -> impl Iterator<Item = (u64, u64)> {
        let words =
            self.pieces.iter().flat_map(|(number, words)| (number * PIECE..).zip(words.iter().copied()));
        words.filter(|&(_, word)| word != 0)
    }

    /// Sets the entry with this index.
    pub fn set_entry(&mut self, index: u64, word: u64) {
        let piece = self.pieces.entry(index / PIECE).or_default();
        let mut words = piece.to_vec();
        words.resize(words.len().max((index % PIECE) as usize + 1), 0);
        words[(index % PIECE) as usize] = word;
        *piece = words.into();
    }

    /// The first index from `from` on whose entry is not empty.
    pub fn next_used(&self, from: u64) -> Option<u64> {
        self.pieces.range(from / PIECE..).find_map(|(number, words)| {
            let mut indices = (number * PIECE..).zip(words.iter());
            indices.find(|&(index, word)| index >= from && *word != 0).map(|(index, _)| index)
        })
    }
}

/// How many of the next entries are known to be empty because the file has a hole there: all that
/// there are, or whole pieces.
fn empty_entries(file: &dyn HostFile, at: HostOffset, entries: u64) -> Result<u64> {
    let run = file.run_at(at, entries * 8)?;
    Ok(match run.length / 8 {
        _ if run.is_data => 0,
        hole if hole >= entries => entries,
        hole => hole / PIECE * PIECE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::LocalFile;
    use crate::layer::qcow2::table::encode_words;

    /// Where pieces, reads and holes begin and end, in a table of 100,000 entries.
    const USED: [u64; 9] = [0, 1, 511, 512, 32_767, 32_768, 65_535, 65_536, 99_999];

    fn table() -> (tempfile::TempDir, LocalFile) {
        let directory = tempfile::tempdir().unwrap();
        let file = LocalFile::create(&directory.path().join("f")).unwrap();
        file.set_size(512 + 800_000).unwrap();
        for index in USED {
            file.write_at(HostOffset(512 + index * 8), &encode_words(&[index + 7])).unwrap();
        }
        (directory, file)
    }

    #[test]
    fn a_table_with_holes_holds_what_a_plain_list_would() {
        let (_directory, file) = table();
        let mut table = L1Table::read(&file, 512, 100_000).unwrap();
        assert!(table.used().eq(USED.map(|index| (index, index + 7))));
        let words = read_words(&file, HostOffset(512), 100_000).unwrap();
        assert!((0..100_000).all(|index| table.entry(index) == words[index as usize]));
        assert!(table.pieces.len() <= USED.len(), "empty pieces are kept");
        let mut next = Some(0);
        for index in USED {
            next = table.next_used(next.unwrap());
            assert_eq!(next, Some(index));
            next = Some(index + 1);
        }
        assert_eq!(table.next_used(100_000), None);
        let before = table.clone();
        table.set_entry(5000, 9);
        table.set_entry(511, 8);
        assert_eq!((table.entry(5000), table.entry(511), table.entry(512)), (9, 8, 519));
        assert_eq!((before.entry(5000), before.entry(511)), (0, 518));
    }

    #[test]
    fn a_table_that_leaves_its_file_is_refused_unless_it_may() {
        let (_directory, file) = table();
        assert!(L1Table::read(&file, 512, 100_100).is_err());
        assert_eq!(L1Table::read_cut(&file, 512, 4 << 20).unwrap().used().count(), USED.len());
    }
}
