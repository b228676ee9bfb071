//! Entries of L2 tables that say zeros, and set a place aside for them that no cluster begins at.
//!
//! Nothing is lost with that place: the zeros stay, and the place is free. Touches nothing but such entries,
//! and only in tables that are a table and nothing else.

use super::write_changes;
use crate::error::Result;
use crate::file::{HostFile, HostOffset};
use crate::layer::Layer;
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::entry::{COMPRESSED, L2_RESERVED, L2Entry, OFFSET, SUBCLUSTERS, ZERO};
use crate::layer::qcow2::header::Header;
use crate::layer::qcow2::references::References;
use crate::layer::qcow2::table::{decode_words, encode_words};

/// Mends such entries, durably; whether there were any.
pub(super) fn mend(image: &Qcow2, references: &References) -> Result<bool> {
    let (file, header): (&dyn HostFile, &Header) = (&**image.file(), image.header());
    if header.version < 3 || header.has_data_file() {
        return Ok(false);
    }
    let per_entry = (header.l2_entry_size() / 8) as usize;
    let mut is_mended = false;
    for (&table, uses) in &references.l2_tables {
        let is_aligned = table.is_multiple_of(header.cluster_size());
        let is_table_only = references.counts.of(table >> header.cluster_bits) == uses.by_all;
        if !uses.is_damaged || !is_aligned || !is_table_only {
            continue;
        }
        let mut before = vec![0; header.cluster_size() as usize];
        file.read_at(HostOffset(table), &mut before)?;
        let mut words = decode_words(&before);
        for words in words.chunks_exact_mut(per_entry) {
            let entry = L2Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
            if is_misplaced_zero(header, entry) {
                words[0] &= ZERO;
                is_mended = true;
            }
        }
        write_changes(file, HostOffset(table), &before, &encode_words(&words))?;
    }
    if is_mended {
        file.sync()?;
    }
    Ok(is_mended)
}

/// Whether no byte of the place is in use, and the place is none.
fn is_misplaced_zero(header: &Header, entry: L2Entry) -> bool {
    if entry.word & L2_RESERVED != 0 {
        // Somebody's data, perhaps, and no entry.
        return false;
    }
    let is_zero = match header.has_subclusters() {
        // No subcluster has data there.
        true => entry.bitmap & ((1 << SUBCLUSTERS) - 1) == 0,
        false => entry.word & ZERO != 0,
    };
    is_zero && entry.word & COMPRESSED == 0 && !(entry.word & OFFSET).is_multiple_of(header.cluster_size())
}
