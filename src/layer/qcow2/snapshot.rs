//! The snapshot table: internal snapshots and where their L1 tables lie.
//!
//! Facts from the qcow2 specification, *Snapshots*; limits as QEMU sets them.

use super::header::Header;
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

const FIXED_LENGTH: usize = 40;
const MAX_EXTRA_BYTES: u32 = 1024;
const MAX_TABLE_BYTES: u64 = 64 << 20;
const MAX_L1_BYTES: u64 = 32 << 20;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Host offset of its L1 table.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Unique id, usually a number.
    pub id: String,
    /// Name, not necessarily unique.
    pub name: String,
    /// When it was taken: seconds since the epoch.
    pub date_seconds: u32,
    /// Nanoseconds of that second.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Virtual size in bytes when it was taken.
    pub disk_size: u64,
    /// Instruction count, where the snapshot records one.
    pub icount: Option<u64>,
}

/// The snapshot table as read.
#[derive(Clone, Debug, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Bytes that the table takes in the file.
    pub bytes: u64,
}

impl SnapshotTable {
    /// Reads the table that the header names.
    pub fn read(file: &dyn HostFile, header: &Header) -> Result<Self> {
        let mut table = Self::default();
        for number in 0..header.snapshot_count {
            let at = header.snapshots_offset + table.bytes;
            let (snapshot, length) = read_one(file, header, at)
                .map_err(|e| e.path(file.path()).offset(at).doing(format!("reading snapshot {number}")))?;
            table.snapshots.push(snapshot);
            table.bytes += length;
            if table.bytes > MAX_TABLE_BYTES {
                return Err(Error::corrupt("the snapshot table is too large").path(file.path()).offset(at));
            }
        }
        Ok(table)
    }
}

fn read_one(file: &dyn HostFile, header: &Header, at: u64) -> Result<(Snapshot, u64)> {
    if at + FIXED_LENGTH as u64 > file.size() {
        return Err(Error::corrupt("the snapshot table leaves the file"));
    }
    let mut fixed = [0; FIXED_LENGTH];
    file.read_at(HostOffset(at), &mut fixed)?;
    let u16_at = |i: usize| u16::from_be_bytes([fixed[i], fixed[i + 1]]);
    let extra_length = u32_of(&fixed, 36);
    if extra_length > MAX_EXTRA_BYTES {
        return Err(Error::corrupt(format!("the snapshot has {extra_length} bytes of extra data")));
    }
    let (id_length, name_length) = (usize::from(u16_at(12)), usize::from(u16_at(14)));
    let mut variable = vec![0; extra_length as usize + id_length + name_length];
    if at + (FIXED_LENGTH + variable.len()) as u64 > file.size() {
        return Err(Error::corrupt("the snapshot table leaves the file"));
    }
    file.read_at(HostOffset(at + FIXED_LENGTH as u64), &mut variable)?;
    let (extra, names) = variable.split_at(extra_length as usize);
    let extra_u64 = |i: usize| (extra.len() >= i + 8).then(|| u64_of(extra, i));
    let snapshot = Snapshot {
        l1_offset: u64_of(&fixed, 0),
        l1_entries: u32_of(&fixed, 8),
        id: String::from_utf8_lossy(&names[..id_length]).into_owned(),
        name: String::from_utf8_lossy(&names[id_length..]).into_owned(),
        date_seconds: u32_of(&fixed, 16),
        date_nanoseconds: u32_of(&fixed, 20),
        vm_clock_nanoseconds: u64_of(&fixed, 24),
        vm_state_size: extra_u64(0).unwrap_or_else(|| u64::from(u32_of(&fixed, 32))),
        disk_size: extra_u64(8).unwrap_or(header.size),
        icount: extra_u64(16).filter(|&count| count != u64::MAX),
    };
    header.validate_table(
        "snapshot's L1 table",
        snapshot.l1_offset,
        u64::from(snapshot.l1_entries) * 8,
        MAX_L1_BYTES,
    )?;
    if u64::from(snapshot.l1_entries) < snapshot.disk_size.div_ceil(header.l2_coverage()) {
        return Err(Error::corrupt("the snapshot's L1 table is too small for its disk size"));
    }
    Ok((snapshot, ((FIXED_LENGTH + variable.len()) as u64).next_multiple_of(8)))
}

fn u32_of(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_of(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}
