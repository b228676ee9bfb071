//! The partitions of a disk, as its MBR or GPT has them: decoded, and checked so far that none leaves
//! the disk. Bytes → values; reads what it decodes and nothing else.
//!
//! A guest has written these tables, and may have written anything: what is read is bounded, a chain of
//! tables that comes back to itself ends, and nothing here panics.

use std::collections::HashSet;

use bytemuck::{Pod, pod_read_unaligned};
use gpt_disk_types::{
    BlockSize, Crc32, GptHeader, GptPartitionEntryArray, MasterBootRecord, MbrPartitionRecord, crc,
};
use serde::Serialize;

use crate::error::Result;

/// A GPT has 128 entries as a rule; more than this are not looked at.
const MAX_ENTRIES: u32 = 4096;
/// Nor are entries that take more than this, in bytes.
const MAX_TABLE: u64 = 1 << 20;
/// Tables of logical partitions; more than Linux lets a disk have partitions.
const MAX_LOGICAL: usize = 256;
/// The sector of an MBR, in bytes.
const SECTOR: u64 = 512;
/// What ends the sector of an MBR, and of each table of logical partitions.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the only partition of an MBR that stands before a GPT.
const PROTECTIVE: u8 = 0xee;

/// A partition that lies within the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Partition {
    /// As the kernel counts them: the place in the table; logical partitions from 5 on.
    pub(super) number: u32,
    /// Guest offset in bytes.
    pub(super) start: u64,
    /// Bytes.
    pub(super) length: u64,
    /// `0x83`, or a GUID.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// Its name in a GPT; empty in an MBR, which has none.
    pub(super) name: String,
}

/// A disk of so many bytes, to be read from.
pub(super) struct Disk<'a> {
    pub(super) size: u64,
    pub(super) read: &'a dyn Fn(u64, &mut [u8]) -> Result<()>,
}

impl Disk<'_> {
    /// Bytes of the disk; `None` if they are not all there.
    fn bytes(&self, at: u64, length: u64) -> Result<Option<Vec<u8>>> {
        if at.checked_add(length).is_none_or(|end| end > self.size) {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize];
        (self.read)(at, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// The partitions, in the order of their numbers; none, if there is no table that can be trusted.
    pub(super) fn partitions(&self) -> Result<Vec<Partition>> {
        let Some(mbr) = self.mbr_at(0)? else { return Ok(Vec::new()) };
        // The first sector of a file system ends with the same two bytes and has code in this place.
        if mbr.partitions.iter().any(|entry| entry.boot_indicator & 0x7f != 0) {
            return Ok(Vec::new());
        }
        match mbr.partitions.iter().any(|entry| entry.os_indicator == PROTECTIVE) {
            true => self.gpt(),
            false => self.of_mbr(&mbr),
        }
    }

    fn mbr_at(&self, at: u64) -> Result<Option<MasterBootRecord>> {
        let mbr: Option<MasterBootRecord> = self.bytes(at, SECTOR)?.map(|bytes| decoded(&bytes));
        Ok(mbr.filter(|mbr| mbr.signature == SIGNATURE))
    }

    fn of_mbr(&self, mbr: &MasterBootRecord) -> Result<Vec<Partition>> {
        let mut found = Vec::new();
        for (number, entry) in (1..).zip(&mbr.partitions) {
            if !is_extended(entry) {
                found.extend(self.of_record(number, 0, entry));
            }
        }
        let used = mbr.partitions.iter().map(sectors).filter(|(_, length)| *length > 0);
        let starts = used.map(|(start, _)| start).collect();
        let mut tables = Tables { starts, ..Tables::default() };
        for container in mbr.partitions.iter().filter(|entry| is_extended(entry)) {
            self.logical(container, &mut tables, &mut found)?;
        }
        Ok(found)
    }

    /// The logical partitions in a container: a list of tables, each with partitions and the place in the
    /// container where the next table lies.
    ///
    /// As a rule the first record of a table is a partition and the second leads on; OS/2 uses all four
    /// for partitions, and DR-DOS leads on in the first. The last two may be garbage.
    fn logical(
        &self,
        container: &MbrPartitionRecord,
        tables: &mut Tables,
        found: &mut Vec<Partition>,
    ) -> Result<()> {
        let (start, length) = sectors(container);
        let whole = start..start + length;
        let mut next = Some(whole.clone());
        while let Some(own) = next.take() {
            let at = own.start;
            if tables.seen.len() == MAX_LOGICAL || !tables.seen.insert(at) {
                log::warn!(
                    "the logical partitions of the disk are too many or a loop: the rest is not shown"
                );
                return Ok(());
            }
            let Some(table) = self.mbr_at(at * SECTOR)? else { return Ok(()) };
            for (place, entry) in table.partitions.iter().enumerate() {
                let (to, length) = sectors(entry);
                let is_garbage = || {
                    let end = at + to + length;
                    to + length > own.end - own.start || at + to < whole.start || end > whole.end
                };
                match length {
                    0 => {}
                    _ if is_extended(entry) => {
                        next = next.or(Some(start + to..start + to + length));
                    }
                    _ if place >= 2 && is_garbage() => {}
                    // A table that another one leads into may say the same again.
                    _ if !tables.starts.insert(at + to) => {}
                    _ => {
                        tables.partitions += 1;
                        found.extend(self.of_record(4 + tables.partitions, at, entry));
                    }
                }
            }
        }
        Ok(())
    }

    /// The partition of a record whose table counts from this sector.
    fn of_record(&self, number: u32, base: u64, entry: &MbrPartitionRecord) -> Option<Partition> {
        let (start, length) = sectors(entry);
        let kind = format!("{:#04x}", entry.os_indicator);
        let place = (base + start, length);
        (length > 0).then(|| self.within(number, place, SECTOR, kind, String::new())).flatten()
    }

    /// A partition at these blocks, if it lies within the disk.
    fn within(
        &self,
        number: u32,
        (start, length): (u64, u64),
        block: u64,
        kind: String,
        name: String,
    ) -> Option<Partition> {
        let end = start.checked_add(length).and_then(|end| end.checked_mul(block));
        if end.is_none_or(|end| end > self.size) {
            log::warn!("partition {number} leaves the disk: it is not shown");
            return None;
        }
        Some(Partition { number, start: start * block, length: length * block, kind, name })
    }

    /// What the first GPT that is whole says: that at the beginning of the disk, or its copy at the end.
    fn gpt(&self) -> Result<Vec<Partition>> {
        for block in [BlockSize::BS_512, BlockSize::BS_4096] {
            let last = (self.size / block.to_u64()).saturating_sub(1);
            for place in [1, last] {
                if let Some(found) = self.gpt_at(place, block)? {
                    return Ok(found);
                }
            }
        }
        log::warn!("the disk has a GPT that is damaged: its partitions are not shown");
        Ok(Vec::new())
    }

    /// The GPT whose header lies at this block, if it is whole.
    fn gpt_at(&self, place: u64, block: BlockSize) -> Result<Option<Vec<Partition>>> {
        // No block of a disk is too far.
        let Some(mut bytes) = self.bytes(place.saturating_mul(block.to_u64()), block.to_u64())? else {
            return Ok(None);
        };
        let header: GptHeader = decoded(&bytes);
        let (header_size, checksum) = (header.header_size.to_u32() as usize, header.header_crc32);
        if !header.is_signature_valid() || !(size_of::<GptHeader>()..=bytes.len()).contains(&header_size) {
            return Ok(None);
        }
        bytes[CHECKSUM].fill(0);
        let found = crc::Crc::<u32>::new(&Crc32::ALGORITHM).checksum(&bytes[..header_size]);
        let Ok(layout) = header.get_partition_entry_array_layout() else { return Ok(None) };
        let length = layout.num_bytes_rounded_to_block(block).filter(|length| *length <= MAX_TABLE);
        let (true, true, Some(length)) =
            (checksum.0.to_u32() == found, layout.num_entries <= MAX_ENTRIES, length)
        else {
            return Ok(None);
        };
        let at = layout.start_lba.to_u64().checked_mul(block.to_u64());
        let Some(mut storage) = at.map_or(Ok(None), |at| self.bytes(at, length))? else { return Ok(None) };
        let Ok(entries) = GptPartitionEntryArray::new(layout, block, &mut storage) else { return Ok(None) };
        let checksum = header.partition_entry_array_crc32;
        Ok((entries.calculate_crc32() == checksum).then(|| self.of_entries(&entries, block.to_u64())))
    }

    fn of_entries(&self, entries: &GptPartitionEntryArray<'_>, block: u64) -> Vec<Partition> {
        let partition = |index: u32| {
            let entry = entries.get_partition_entry(index).filter(|entry| entry.is_used())?;
            let (first, last) = (entry.starting_lba.to_u64(), entry.ending_lba.to_u64());
            let length = last.checked_sub(first)?.checked_add(1)?;
            let kind = { entry.partition_type_guid }.0.to_string();
            let name = entry.name.chars().collect();
            self.within(index + 1, (first, length), block, kind, name)
        };
        (0..entries.layout().num_entries).filter_map(partition).collect()
    }
}

/// Where the checksum of a GPT header lies in it (UEFI specification, *GPT Header*).
const CHECKSUM: std::ops::Range<usize> = 16..20;

/// The tables of logical partitions that were read.
#[derive(Default)]
struct Tables {
    seen: HashSet<u64>,
    /// The first sectors of the partitions that were found in them, and of those of the MBR.
    starts: HashSet<u64>,
    partitions: u32,
}

fn is_extended(entry: &MbrPartitionRecord) -> bool {
    matches!(entry.os_indicator, 0x05 | 0x0f | 0x85)
}

/// First sector and number of sectors.
fn sectors(entry: &MbrPartitionRecord) -> (u64, u64) {
    (entry.starting_lba.to_u32().into(), entry.size_in_lba.to_u32().into())
}

/// A structure at the beginning of at least a sector.
fn decoded<T: Pod>(bytes: &[u8]) -> T {
    pod_read_unaligned(&bytes[..size_of::<T>()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partitions(disk: &[u8], size: u64) -> Vec<(u32, u64, u64)> {
        let read = |at: u64, buffer: &mut [u8]| {
            buffer.fill(0);
            let start = disk.len().min(at as usize);
            let length = buffer.len().min(disk.len() - start);
            buffer[..length].copy_from_slice(&disk[start..start + length]);
            Ok(())
        };
        let found = Disk { size, read: &read }.partitions().unwrap();
        for partition in &found {
            assert!(partition.length > 0 && partition.start + partition.length <= size, "{partition:?}");
        }
        found.iter().map(|found| (found.number, found.start / SECTOR, found.length / SECTOR)).collect()
    }

    /// The sector of a table, and its records: type, first sector, number of sectors.
    type Table<'a> = (usize, &'a [(u8, u32, u32)]);

    fn table(records: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut sector = vec![0; 512];
        for (n, (kind, start, length)) in records.iter().enumerate() {
            let record = &mut sector[446 + 16 * n..][..16];
            record[4] = *kind;
            record[8..12].copy_from_slice(&start.to_le_bytes());
            record[12..].copy_from_slice(&length.to_le_bytes());
        }
        sector[510..].copy_from_slice(&SIGNATURE);
        sector
    }

    /// A disk with tables at these sectors.
    fn disk(sectors: usize, tables: &[Table<'_>]) -> Vec<u8> {
        let mut disk = vec![0; sectors * 512];
        for (at, records) in tables {
            disk[at * 512..][..512].copy_from_slice(&table(records));
        }
        disk
    }

    fn of_mbr(tables: &[Table<'_>]) -> Vec<(u32, u64, u64)> {
        partitions(&disk(100, tables), 100 * 512)
    }

    #[test]
    fn primary_and_logical_partitions_have_the_numbers_of_the_kernel() {
        let tables: [Table<'_>; 3] = [
            (0, &[(0x83, 1, 9), (0, 0, 0), (0x05, 20, 60), (0x82, 90, 10)]),
            (20, &[(0x83, 2, 8), (0x05, 30, 20)]),
            (50, &[(0x07, 1, 19)]),
        ];
        assert_eq!(of_mbr(&tables), [(1, 1, 9), (4, 90, 10), (5, 22, 8), (6, 51, 19)]);
    }

    #[test]
    fn partitions_that_leave_the_disk_are_left_out_and_overlapping_ones_are_not() {
        let records = [(0x83, 1, 100), (0x83, 0, 100), (0x83, u32::MAX, u32::MAX), (0x83, 50, 50)];
        assert_eq!(of_mbr(&[(0, &records)]), [(2, 0, 100), (4, 50, 50)]);
    }

    #[test]
    fn tables_of_logical_partitions_that_are_a_loop_end() {
        let container: Table<'_> = (0, &[(0x0f, 20, 60)]);
        assert_eq!(of_mbr(&[container, (20, &[(0x83, 1, 1), (5, 0, 9)])]), [(5, 21, 1)]);
        let round = [container, (20, &[(0x83, 1, 1), (5, 10, 9)]), (30, &[(0x83, 1, 1), (5, 0, 9)])];
        assert_eq!(of_mbr(&round), [(5, 21, 1), (6, 31, 1)]);
        assert_eq!(
            of_mbr(&[container, (20, &[(0x83, 1, 1), (5, 60, 9)]), (80, &[(0x83, 1, 1)])]),
            [(5, 21, 1), (6, 81, 1)]
        );
        assert_eq!(of_mbr(&[(0, &[(5, u32::MAX, u32::MAX), (5, 0, u32::MAX)])]), []);
        // A long chain, as far as it is followed.
        let mut long = disk(3000, &[(0, &[(5, 1, 2999)])]);
        for at in 1..2999 {
            long[at * 512..][..512].copy_from_slice(&table(&[(0x83, 1, 1), (5, at as u32, 1)]));
        }
        assert_eq!(partitions(&long, 3000 * 512).len(), MAX_LOGICAL);
    }

    /// A disk of 1000 sectors with a GPT, as its header and its one entry are.
    fn gpt(change: impl Fn(&mut GptHeader, &mut [u8])) -> Vec<u8> {
        let mut disk = disk(1000, &[(0, &[(PROTECTIVE, 1, 999)])]);
        let mut header = GptHeader {
            my_lba: gpt_disk_types::LbaLe::from_u64(1),
            partition_entry_lba: gpt_disk_types::LbaLe::from_u64(2),
            number_of_partition_entries: gpt_disk_types::U32Le::from_u32(128),
            ..GptHeader::default()
        };
        let entry = &mut disk[1024..1152];
        entry[..32].fill(7);
        entry[32] = 40;
        entry[40] = 99;
        entry[56..60].copy_from_slice(b"a\0\xff\xdf");
        change(&mut header, entry);
        let length = header.number_of_partition_entries.to_u32() as usize * 128;
        let crc = crc::Crc::<u32>::new(&Crc32::ALGORITHM);
        let table = disk.get(1024..1024 + length).unwrap_or_default();
        header.partition_entry_array_crc32 = Crc32(gpt_disk_types::U32Le::from_u32(crc.checksum(table)));
        header.update_header_crc32();
        disk[512..604].copy_from_slice(bytemuck::bytes_of(&header));
        disk
    }

    #[test]
    fn a_gpt_is_believed_as_far_as_it_can_be() {
        let found = |disk: &[u8]| partitions(disk, 512_000);
        assert_eq!(found(&gpt(|_, _| {})), [(1, 40, 60)]);
        assert_eq!(found(&gpt(|_, entry| entry[40] = 39)), []);
        assert_eq!(found(&gpt(|_, entry| entry[40..48].fill(255))), []);
        assert_eq!(found(&gpt(|_, entry| entry[32..48].fill(255))), []);
        assert_eq!(found(&gpt(|_, entry| entry[47] = 1)), []);
        for entries in [0, 4097, u32::MAX] {
            let entries = gpt_disk_types::U32Le::from_u32(entries);
            assert_eq!(found(&gpt(|header, _| header.number_of_partition_entries = entries)), []);
        }
        for size in [0, 1, 127, 130, 1 << 31] {
            let size = gpt_disk_types::U32Le::from_u32(size);
            assert_eq!(found(&gpt(|header, _| header.size_of_partition_entry = size)), []);
        }
        for place in [999, 1000, u64::MAX] {
            let place = gpt_disk_types::LbaLe::from_u64(place);
            assert_eq!(found(&gpt(|header, _| header.partition_entry_lba = place)), []);
        }
        for size in [0, 91, 513, u32::MAX] {
            let size = gpt_disk_types::U32Le::from_u32(size);
            assert_eq!(found(&gpt(|header, _| header.header_size = size)), []);
        }
        let mut damaged = gpt(|_, _| {});
        damaged[1100] ^= 1;
        assert_eq!(found(&damaged), []);
    }

    #[test]
    fn the_first_sector_of_a_file_system_is_no_table_and_short_disks_have_none() {
        let mut sector = table(&[(0x83, 1, 9)]);
        sector[446] = 0xeb;
        assert_eq!(partitions(&sector, 51200), []);
        for size in [0, 1, 511, 512, 513, 1024] {
            partitions(&gpt(|_, _| {}), size);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_table_makes_it_panic(
            changes in proptest::collection::vec((0usize..1400, 0u8..=255), 0..40), is_gpt: bool, size in 0u64..600_000
        ) {
            let tables: [Table<'_>; 2] = [(0, &[(5, 1, 99), (0x83, 9, 9)]), (1, &[(0x83, 1, 1), (5, 1, 9)])];
            let mut disk = if is_gpt { gpt(|_, _| {}) } else { disk(100, &tables) };
            for (at, byte) in changes {
                disk[if is_gpt { at } else { 440 + at % 600 }] = byte;
            }
            partitions(&disk, size);
        }
    }
}
