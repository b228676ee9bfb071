//! The snapshot table: internal snapshots and where their L1 tables lie.
//!
//! Facts from the qcow2 specification, *Snapshots*; limits as QEMU sets them.

use super::header::Header;
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

const FIXED_LENGTH: usize = 40;
const MAX_EXTRA_BYTES: u32 = 1024;
/// Of these, an image of version 3 has the size of the machine state and that of the disk.
const NEEDED_EXTRA_BYTES: u32 = 16;
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
#[derive(Debug, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub entries: Vec<Entry>,
    /// Bytes that the table takes in the file.
    pub bytes: u64,
    /// The last entry claims so much that what follows it was not looked for.
    pub is_cut: bool,
}

/// An entry of the table, whatever is wrong with it.
#[derive(Debug)]
pub struct Entry {
    /// What it says.
    pub snapshot: Snapshot,
    /// Why its disk cannot be read.
    pub fault: Option<Fault>,
    /// The entry as it is to be written: with the extra data that has to be there, and with no more than is
    /// known. `None` for one that says nothing at all.
    pub mended: Option<Vec<u8>>,
    /// Whether that is something else than what is there.
    pub is_to_be_mended: bool,
    /// In an image of version 3, whether it lacks extra data that has to be there.
    pub is_incomplete: bool,
}

/// What is wrong with an entry.
#[derive(Debug)]
pub enum Fault {
    /// It claims more extra data than there may be.
    TooMuchExtra(Error),
    /// A part of it lies past the end of the file.
    Cut(Error),
    /// Its L1 table cannot lie where it says.
    Misplaced(Error),
    /// Its L1 table is too small for its disk.
    Short(Error),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::TooMuchExtra(e) | Fault::Cut(e) | Fault::Misplaced(e) | Fault::Short(e) => e,
        }
    }
}

impl SnapshotTable {
    /// Reads the table that the header names. All its entries must be sound.
    pub fn read(file: &dyn HostFile, header: &Header) -> Result<Vec<Snapshot>> {
        let entries = Self::read_as_it_is(file, header)?.entries.into_iter().enumerate();
        let sound = |(number, entry): (usize, Entry)| match entry.fault {
            None => Ok(entry.snapshot),
            Some(fault) => {
                Err(Error::from(fault).path(file.path()).doing(format!("reading snapshot {number}")))
            }
        };
        entries.map(sound).collect()
    }

    /// Reads the table, whatever is wrong with its entries: what lies past the end of the file is zeros.
    pub fn read_as_it_is(file: &dyn HostFile, header: &Header) -> Result<Self> {
        let mut table = Self::default();
        for _ in 0..header.snapshot_count {
            let at = header.snapshots_offset.saturating_add(table.bytes);
            let (entry, length) = read_one(file, header, at).map_err(|e| e.path(file.path()))?;
            table.entries.push(entry);
            table.bytes += length;
            if table.bytes > MAX_TABLE_BYTES {
                table.is_cut = table.entries.last().is_some_and(|entry| entry.fault.is_some());
                return match table.is_cut {
                    true => Ok(table),
                    false => {
                        let error = Error::corrupt("the snapshot table is too large");
                        Err(error.path(file.path()).offset(at))
                    }
                };
            }
        }
        Ok(table)
    }
}

fn read_one(file: &dyn HostFile, header: &Header, at: u64) -> Result<(Entry, u64)> {
    let mut fixed = [0; FIXED_LENGTH];
    file.read_at(HostOffset(at), &mut fixed)?;
    let u16_at = |i: usize| u16::from_be_bytes([fixed[i], fixed[i + 1]]);
    let extra_bytes = u32_of(&fixed, 36);
    let (id_length, name_length) = (usize::from(u16_at(12)), usize::from(u16_at(14)));
    let mut extra = vec![0; extra_bytes.min(MAX_EXTRA_BYTES) as usize];
    let mut names = vec![0; id_length + name_length];
    let names_at = at.saturating_add(FIXED_LENGTH as u64 + u64::from(extra_bytes));
    file.read_at(HostOffset(at + FIXED_LENGTH as u64), &mut extra)?;
    file.read_at(HostOffset(names_at), &mut names)?;
    let extra_u64 = |i: usize| (extra.len() >= i + 8).then(|| u64_of(&extra, i));
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
    let end = names_at.saturating_add(names.len() as u64);
    let fault = fault_of(&snapshot, header, (at, end, extra_bytes), file.size());
    let is_incomplete = header.version >= 3 && extra_bytes < NEEDED_EXTRA_BYTES;
    let is_nothing = fixed == [0; FIXED_LENGTH];
    let has_right_extra = extra_bytes <= MAX_EXTRA_BYTES && !is_incomplete;
    if !has_right_extra {
        extra = known_extra(&snapshot);
        fixed[36..].copy_from_slice(&(extra.len() as u32).to_be_bytes());
    }
    let mut mended = [&fixed[..], &extra, &names].concat();
    mended.resize(mended.len().next_multiple_of(8), 0);
    let is_to_be_mended = is_nothing || !has_right_extra;
    let mended = (!is_nothing).then_some(mended);
    let entry = Entry { snapshot, fault, mended, is_to_be_mended, is_incomplete };
    Ok((entry, (end - at).next_multiple_of(8)))
}

/// The extra data that QEMU knows: size of the machine state, size of the disk, instruction count.
fn known_extra(snapshot: &Snapshot) -> Vec<u8> {
    let words = [snapshot.vm_state_size, snapshot.disk_size, snapshot.icount.unwrap_or(u64::MAX)];
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn fault_of(
    snapshot: &Snapshot,
    header: &Header,
    (at, end, extra_bytes): (u64, u64, u32),
    size: u64,
) -> Option<Fault> {
    let bytes = u64::from(snapshot.l1_entries) * 8;
    if let Err(e) = header.validate_table("snapshot's L1 table", snapshot.l1_offset, bytes, MAX_L1_BYTES) {
        return Some(Fault::Misplaced(e));
    }
    if extra_bytes > MAX_EXTRA_BYTES {
        let what = format!("the snapshot has {extra_bytes} bytes of extra data");
        return Some(Fault::TooMuchExtra(Error::corrupt(what).offset(at)));
    }
    if end > size {
        return Some(Fault::Cut(Error::corrupt("the snapshot table leaves the file").offset(at)));
    }
    let is_short = u64::from(snapshot.l1_entries) < snapshot.disk_size.div_ceil(header.l2_coverage());
    let what = "the snapshot's L1 table is too small for its disk size";
    is_short.then(|| Fault::Short(Error::corrupt(what).offset(at)))
}

fn u32_of(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_of(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}
