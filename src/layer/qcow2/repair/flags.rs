//! The flags that promise that a refcount is exactly one, and may be wrong.
//!
//! Touches nothing but that bit, and only in tables of the active disk that are a table and
//! nothing else and have no other fault: what only looks like a table may be somebody's data.

use super::{Repair, write_changes};
use crate::error::Result;
use crate::file::{HostFile, HostOffset};
use crate::layer::Layer;
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::entry::{COMPRESSED, COPIED, Cluster, L1_RESERVED, L2Entry, OFFSET, Standard};
use crate::layer::qcow2::header::Header;
use crate::layer::qcow2::references::References;
use crate::layer::qcow2::stored::StoredRefcounts;
use crate::layer::qcow2::table::{decode_words, encode_words};

struct Flags<'a> {
    file: &'a dyn HostFile,
    header: &'a Header,
    references: &'a References,
    stored: StoredRefcounts<'a>,
    what: Repair,
}

/// Mends the flags of the active disk's tables, durably. The refcounts are settled already.
pub(super) fn mend(image: &Qcow2, references: &References, what: Repair) -> Result<()> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    let flags = Flags { file, header, references, stored: StoredRefcounts::read(file, header)?, what };
    flags.l1_table()?;
    for (&table, uses) in &references.l2_tables {
        let is_aligned = table.is_multiple_of(header.cluster_size());
        let is_table_only = references.counts.of(table >> header.cluster_bits) == uses.by_all;
        if uses.by_active > 0 && is_aligned && is_table_only && !uses.is_damaged {
            flags.l2_table(table)?;
        }
    }
    file.sync()
}

impl Flags<'_> {
    fn l1_table(&self) -> Result<()> {
        let (at, bytes) = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        let mut clusters = at >> self.header.cluster_bits..(at + bytes).div_ceil(self.header.cluster_size());
        if clusters.any(|cluster| self.references.counts.of(cluster) != 1) {
            return Ok(());
        }
        self.rewrite(at, bytes, |words| {
            for word in words.iter_mut().filter(|word| **word & OFFSET != 0 && **word & L1_RESERVED == 0) {
                *word = self.mended(*word, *word & OFFSET)?;
            }
            Ok(())
        })
    }

    fn l2_table(&self, at: u64) -> Result<()> {
        let per_entry = (self.header.l2_entry_size() / 8) as usize;
        self.rewrite(at, self.header.cluster_size(), |words| {
            for words in words.chunks_exact_mut(per_entry) {
                let entry = L2Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
                words[0] = self.mended_entry(entry)?;
            }
            Ok(())
        })
    }

    /// The first word of an entry as it should be.
    fn mended_entry(&self, entry: L2Entry) -> Result<u64> {
        if entry.word & COMPRESSED != 0 {
            return Ok(match self.what {
                Repair::All => entry.word & !COPIED,
                Repair::Leaks => entry.word,
            });
        }
        match entry.decode(self.header) {
            Ok(Cluster::Standard(Standard { host: Some(_), .. })) if self.header.has_data_file() => {
                Ok(self.with_flag(entry.word, true))
            }
            Ok(Cluster::Standard(Standard { host: Some(host), .. })) => self.mended(entry.word, host.0),
            _ => Ok(entry.word),
        }
    }

    fn mended(&self, word: u64, points_to: u64) -> Result<u64> {
        let cluster = points_to >> self.header.cluster_bits;
        Ok(match self.stored.of(cluster)? {
            None => word,
            Some(refcount) => self.with_flag(word, refcount == 1 && self.references.counts.of(cluster) == 1),
        })
    }

    /// A leak that is freed can leave a refcount of one: then the flag is set. It is not cleared
    /// unless all is to be repaired.
    fn with_flag(&self, word: u64, is_set: bool) -> u64 {
        match (is_set, self.what) {
            (true, _) => word | COPIED,
            (false, Repair::All) => word & !COPIED,
            (false, Repair::Leaks) => word,
        }
    }

    fn rewrite(&self, at: u64, bytes: u64, change: impl Fn(&mut [u64]) -> Result<()>) -> Result<()> {
        let mut before = vec![0; bytes as usize];
        self.file.read_at(HostOffset(at), &mut before)?;
        let mut words = decode_words(&before);
        change(&mut words)?;
        write_changes(self.file, HostOffset(at), &before, &encode_words(&words))
    }
}
