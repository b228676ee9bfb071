//! Persistent bitmaps: the header extension and the directory that it points to.
//!
//! Pure, but for reading the directory. Facts from the qcow2 specification, *Bitmaps extension* and
//! *Bitmap directory*; limits as QEMU sets them.

use super::header::Header;
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

const EXTENSION_LENGTH: usize = 24;
const ENTRY_LENGTH: usize = 24;
const MAX_BITMAPS: u32 = 65535;
/// Bytes of a directory at most.
const MAX_DIRECTORY: u64 = MAX_BITMAPS as u64 * (ENTRY_LENGTH as u64 + 1023);
/// Bytes of bitmap data that one bitmap may take.
const MAX_DATA: u64 = 512 << 20;

/// Bits of a bitmap table entry that are neither offset nor the "all ones" flag.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// Where the directory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Number of bitmaps.
    pub count: u32,
    /// Its length in bytes.
    pub size: u64,
    /// Its host offset.
    pub offset: u64,
}

/// A bitmap, as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bitmap {
    /// Host offset of its entry in the directory.
    pub entry_offset: u64,
    /// Host offset of its table.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_entries: u32,
    /// See [`IN_USE`](Self::IN_USE), [`AUTO`](Self::AUTO).
    pub flags: u32,
    /// log2 of the guest bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
}

impl Bitmap {
    /// Where the flags lie in an entry of the directory: 4 bytes.
    pub const FLAGS: u64 = 12;
    /// Was not saved properly: its content is not to be trusted.
    pub const IN_USE: u32 = 1 << 0;
    /// Records writes as soon as the image is open for writing.
    pub const AUTO: u32 = 1 << 1;
}

impl Directory {
    /// Decodes the data of the header extension.
    pub fn decode(extension: &[u8], header: &Header) -> Result<Self> {
        let bytes: &[u8; EXTENSION_LENGTH] = extension
            .try_into()
            .map_err(|_| Error::corrupt(format!("bitmaps extension of {} bytes", extension.len())))?;
        let directory = Self { count: u32_at(bytes, 0), size: u64_at(bytes, 8), offset: u64_at(bytes, 16) };
        if directory.count == 0 || directory.count > MAX_BITMAPS {
            return Err(Error::corrupt(format!("the image claims {} bitmaps", directory.count)));
        }
        header.validate_table("bitmap directory", directory.offset, directory.size, MAX_DIRECTORY)?;
        Ok(directory)
    }

    /// Reads the directory's own entries: one after the other, whatever its size claims.
    pub fn read(&self, file: &dyn HostFile, header: &Header) -> Result<Vec<Bitmap>> {
        let wrong = |what: String| Error::corrupt(what).offset(self.offset);
        let mut bitmaps = Vec::new();
        let mut done = 0;
        while done < self.size {
            if bitmaps.len() as u64 == u64::from(self.count) {
                return Err(wrong(format!("the bitmap directory has more than {} entries", self.count)));
            }
            let (bitmap, length) = self.read_entry(file, header, done)?;
            bitmaps.push(bitmap);
            done += length.next_multiple_of(8);
        }
        match bitmaps.len() as u64 == u64::from(self.count) {
            true => Ok(bitmaps),
            false => {
                Err(wrong(format!("the bitmap directory has {} entries, not {}", bitmaps.len(), self.count)))
            }
        }
    }

    /// The entry at `start` of the directory, and its length without padding.
    fn read_entry(&self, file: &dyn HostFile, header: &Header, start: u64) -> Result<(Bitmap, u64)> {
        let mut fixed = [0; ENTRY_LENGTH];
        file.read_at(HostOffset(self.offset + start), &mut fixed)?;
        let bitmap = decode_entry(&fixed, header)?;
        let name_at = start + ENTRY_LENGTH as u64 + u64::from(u32_at(&fixed, 20));
        let mut name = vec![0; usize::from(u16::from_be_bytes([fixed[18], fixed[19]]))];
        let end = name_at + name.len() as u64;
        if end > self.size {
            return Err(Error::corrupt("an entry of the bitmap directory leaves it"));
        }
        if name.is_empty() {
            return Err(Error::corrupt("an entry of the bitmap directory has no name"));
        }
        file.read_at(HostOffset(self.offset + name_at), &mut name)?;
        let name = String::from_utf8_lossy(&name).into_owned();
        Ok((Bitmap { name, entry_offset: self.offset + start, ..bitmap }, end - start))
    }
}

/// The fields before the name.
fn decode_entry(fixed: &[u8; ENTRY_LENGTH], header: &Header) -> Result<Bitmap> {
    let bitmap = Bitmap {
        entry_offset: 0,
        table_offset: u64_at(fixed, 0),
        table_entries: u32_at(fixed, 8),
        flags: u32_at(fixed, 12),
        granularity_bits: fixed[17],
        name: String::new(),
    };
    if (u64::from(bitmap.table_entries) << header.cluster_bits) > MAX_DATA {
        return Err(Error::corrupt("a bitmap is too large"));
    }
    let bytes = u64::from(bitmap.table_entries) * 8;
    header.validate_table("bitmap table", bitmap.table_offset, bytes, MAX_DATA)?;
    Ok(bitmap)
}

/// The host cluster that an entry of a bitmap table points to, `None` where it stands for bits
/// that are all the same.
///
/// # Errors
/// Bits are set that are reserved, or the offset is none of a cluster.
pub fn data_cluster(entry: u64, header: &Header) -> Result<Option<u64>> {
    let offset = entry & TABLE_OFFSET;
    let is_right = entry & TABLE_RESERVED == 0
        && offset.is_multiple_of(header.cluster_size())
        && (offset == 0 || entry & ALL_ONES == 0);
    match is_right {
        true => Ok((offset != 0).then_some(offset)),
        false => Err(Error::corrupt(format!("bitmap table entry {entry:#018x} is not valid"))),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}
