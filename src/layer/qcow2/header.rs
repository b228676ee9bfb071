//! The qcow2 header: bytes to values and back, and which values are acceptable.
//!
//! Pure: no I/O. Facts from the qcow2 specification, *Header*; limits as QEMU sets them, so that
//! what one opens the other opens too.

use crate::error::{Error, Result};

/// The first four bytes of every qcow2 image: `QFI\xfb`.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

/// Bytes of a version 2 header, which has no length field.
pub const V2_LENGTH: u32 = 72;
/// Bytes of a version 3 header as first specified; compression type and padding make it 112.
pub const V3_LENGTH: u32 = 104;
/// Enough bytes to decode any header.
pub const DECODED_LENGTH: usize = 112;

/// The longest backing file name that the format can store, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// Bytes of an L1 table at most.
pub const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// QEMU knows the secret; what it makes of the image is open to us.
const DECRYPT: &str = "who has the secret can make a copy without: `qemu-img convert --object secret,id=key,file=SECRET \
                       --image-opts driver=qcow2,file.filename=IMAGE,encrypt.key-secret=key -O qcow2 NEW`";

/// Incompatible feature bits (*Header*, bytes 72–79) that we understand.
pub mod incompatible {
    /// Refcounts may be wrong: the image was not closed by a writer with lazy refcounts.
    pub const DIRTY: u64 = 1 << 0;
    /// A structure is known to be damaged: no writing until repaired.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in an external file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type field is in use.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 16 bytes and clusters are divided into 32 subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All of the above.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bits (bytes 80–87).
pub mod compatible {
    /// Refcounts may be written late, under the protection of the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear feature bits (bytes 88–95): a writer that does not know one must clear it.
pub mod autoclear {
    /// The bitmaps extension is consistent with the image.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a valid raw image by itself.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// All of the above.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// How compressed clusters are compressed (byte 104).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// The fields of the header, decoded; field order as on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3 (bytes 4–7).
    pub version: u32,
    /// Where the backing file name lies in the first cluster; 0 if there is none (8–15).
    pub backing_offset: u64,
    /// Length of that name in bytes (16–19).
    pub backing_size: u32,
    /// log2 of the cluster size in bytes, 9 to 21 (20–23).
    pub cluster_bits: u32,
    /// Virtual size in bytes (24–31).
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS (32–35).
    pub encryption: u32,
    /// Entries in the active L1 table (36–39).
    pub l1_entries: u32,
    /// Host offset of the active L1 table (40–47).
    pub l1_offset: u64,
    /// Host offset of the refcount table (48–55).
    pub refcount_table_offset: u64,
    /// Its length in clusters (56–59).
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots (60–63).
    pub snapshot_count: u32,
    /// Host offset of the snapshot table (64–71).
    pub snapshots_offset: u64,
    /// Bits that a reader must understand (72–79).
    pub incompatible: u64,
    /// Bits that may be ignored (80–87).
    pub compatible: u64,
    /// Bits that an ignorant writer must clear (88–95).
    pub autoclear: u64,
    /// log2 of the width of a refcount in bits, 0 to 6 (96–99).
    pub refcount_order: u32,
    /// Bytes of the header; the extensions follow (100–103).
    pub length: u32,
    /// Compression type (104), 0 where the header is shorter.
    pub compression: u8,
}

/// Where fields lie that are written one by one.
pub mod field {
    /// Virtual size.
    pub const SIZE: u64 = 24;
    /// L1 table entries and offset: 12 bytes.
    pub const L1_TABLE: u64 = 36;
    /// Refcount table offset and clusters: 12 bytes.
    pub const REFCOUNT_TABLE: u64 = 48;
    /// Snapshot count and offset of the snapshot table: 12 bytes.
    pub const SNAPSHOTS: u64 = 60;
    /// Incompatible feature bits.
    pub const INCOMPATIBLE: u64 = 72;
    /// Autoclear feature bits.
    pub const AUTOCLEAR: usize = 88;
}

impl Header {
    /// Decodes the first [`DECODED_LENGTH`] bytes of an image. Only magic and version are judged
    /// here; [`validate`](Self::validate) judges the rest.
    ///
    /// # Errors
    /// The magic bytes are missing, or the version is not known.
    #[doc(hidden)]
    pub fn decode(bytes: &[u8; DECODED_LENGTH]) -> Result<Self> {
        let u32_at = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]));
        if u32_at(0) != MAGIC {
            return Err(Error::corrupt("is not a qcow2 image: the magic bytes are missing"));
        }
        let version = u32_at(4);
        let v3 = match version {
            2 => false,
            3 => true,
            other => {
                let what = format!("qcow2 version {other} is not supported");
                return Err(Error::unsupported(what).hint("rebasefs reads versions 2 and 3"));
            }
        };
        let length = if v3 { u32_at(100) } else { V2_LENGTH };
        let has_compression = v3 && length > V3_LENGTH;
        Ok(Self {
            version,
            backing_offset: u64_at(8),
            backing_size: u32_at(16),
            cluster_bits: u32_at(20),
            size: u64_at(24),
            encryption: u32_at(32),
            l1_entries: u32_at(36),
            l1_offset: u64_at(40),
            refcount_table_offset: u64_at(48),
            refcount_table_clusters: u32_at(56),
            snapshot_count: u32_at(60),
            snapshots_offset: u64_at(64),
            incompatible: if v3 { u64_at(72) } else { 0 },
            compatible: if v3 { u64_at(80) } else { 0 },
            autoclear: if v3 { u64_at(88) } else { 0 },
            refcount_order: if v3 { u32_at(96) } else { 4 },
            length,
            compression: if has_compression { bytes[104] } else { 0 },
        })
    }

    /// Encodes the header, of the length that it states; the inverse of [`decode`](Self::decode).
    #[doc(hidden)]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length as usize);
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.backing_offset.to_be_bytes());
        bytes.extend(self.backing_size.to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.encryption.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshot_count.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            bytes.extend(self.incompatible.to_be_bytes());
            bytes.extend(self.compatible.to_be_bytes());
            bytes.extend(self.autoclear.to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            bytes.extend(self.length.to_be_bytes());
            bytes.push(self.compression);
        }
        bytes.resize(self.length as usize, 0);
        bytes
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have 16 bytes and clusters 32 subclusters.
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether the zero flag of an L2 entry means anything: version 2 has none, and extended
    /// entries say it in their bitmap.
    pub(crate) fn has_zero_flag(&self) -> bool {
        self.version >= 3 && !self.has_subclusters()
    }

    /// Whether guest data lies in an external file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Bytes of an L2 entry.
    pub(crate) fn l2_entry_size(&self) -> u64 {
        if self.has_subclusters() { 16 } else { 8 }
    }

    /// Entries of an L2 table, which fills one cluster.
    #[doc(hidden)]
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L1 entry, one whole L2 table, stands for.
    pub(crate) fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// The compression of compressed clusters.
    ///
    /// # Errors
    /// Clusters are compressed in a way that is not known.
    pub fn compression(&self) -> Result<Compression> {
        match self.compression {
            0 => Ok(Compression::Zlib),
            1 => Ok(Compression::Zstd),
            other => Err(Error::unsupported(format!("compression type {other} is not supported"))),
        }
    }

    /// Refuses what breaks the specification, what QEMU's limits forbid, and what is not
    /// understood. `feature_name` gives the image's own name of an incompatible bit.
    ///
    /// # Errors
    /// Names the field that is wrong, or the feature that is not understood.
    #[doc(hidden)]
    pub fn validate(&self, feature_name: impl Fn(u32) -> Option<String>) -> Result<()> {
        self.validate_geometry()?;
        self.validate_features(feature_name)?;
        self.validate_tables()
    }

    /// The part of [`validate`](Self::validate) that must hold before the extensions are read.
    pub(crate) fn validate_geometry(&self) -> Result<()> {
        if !(9..=21).contains(&self.cluster_bits) {
            let what = format!("cluster size 2^{} is not between 2^9 and 2^21 bytes", self.cluster_bits);
            return Err(Error::corrupt(what).offset(20));
        }
        let minimum = if self.version == 2 { V2_LENGTH } else { V3_LENGTH };
        if self.length < minimum
            || u64::from(self.length) > self.cluster_size()
            || !self.length.is_multiple_of(8)
        {
            return Err(Error::corrupt(format!("header length {} is not valid", self.length)).offset(100));
        }
        if self.backing_offset == 0 && self.backing_size == 0 {
            return Ok(());
        }
        let end = self.backing_offset.saturating_add(u64::from(self.backing_size));
        let misplaced = self.backing_offset < u64::from(self.length) || end > self.cluster_size();
        if self.backing_offset == 0 {
            // QEMU takes an offset of zero for "no backing file", whatever the size says.
            Ok(())
        } else if misplaced || self.backing_size as usize > MAX_BACKING_NAME {
            let what = format!(
                "the backing file name (offset {:#x}, {} bytes) does not lie in the header cluster",
                self.backing_offset, self.backing_size
            );
            Err(Error::corrupt(what).offset(8))
        } else {
            Ok(())
        }
    }

    fn validate_features(&self, feature_name: impl Fn(u32) -> Option<String>) -> Result<()> {
        match self.encryption {
            0 => {}
            1 => {
                return Err(Error::unsupported("encryption (AES) is not supported").offset(32).hint(DECRYPT));
            }
            2 => {
                return Err(Error::unsupported("encryption (LUKS) is not supported")
                    .offset(32)
                    .hint(DECRYPT));
            }
            other => {
                let what = format!("encryption method {other} is not supported");
                return Err(Error::unsupported(what).offset(32));
            }
        }
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown & (1 << bit) != 0)
                .map(|bit| match feature_name(bit) {
                    Some(name) => format!("'{name}' (bit {bit})"),
                    None => format!("unnamed (bit {bit})"),
                })
                .collect();
            let what = format!("incompatible feature not supported: {}", names.join(", "));
            let hint = "was it made by a newer program? have that make a copy without it";
            return Err(Error::unsupported(what).offset(field::INCOMPATIBLE).hint(hint));
        }
        if self.has_subclusters() && self.cluster_bits < 14 {
            return Err(Error::corrupt("extended L2 entries need clusters of at least 16 KiB").offset(20));
        }
        if (self.compression != 0) != (self.incompatible & incompatible::COMPRESSION != 0) {
            let what = "compression type and its incompatible feature bit contradict each other";
            return Err(Error::corrupt(what).offset(104));
        }
        self.compression().map(drop)
    }

    fn validate_tables(&self) -> Result<()> {
        if self.refcount_order > 6 {
            let what = format!("refcount width 2^{} is more than 64 bits", self.refcount_order);
            return Err(Error::corrupt(what).offset(96));
        }
        if self.size > i64::MAX as u64 {
            return Err(Error::corrupt(format!("virtual size {} is too large", self.size)).offset(24));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        self.validate_table("L1 table", self.l1_offset, l1_bytes, MAX_L1_BYTES)?;
        if u64::from(self.l1_entries) < self.size.div_ceil(self.l2_coverage()) {
            return Err(Error::corrupt("the L1 table is too small for the virtual size").offset(36));
        }
        let refcount_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcount_bytes == 0 {
            return Err(Error::corrupt("there is no refcount table").offset(field::REFCOUNT_TABLE));
        }
        let limit = MAX_REFCOUNT_TABLE_BYTES;
        self.validate_table("refcount table", self.refcount_table_offset, refcount_bytes, limit)?;
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::corrupt(format!("{} snapshots are too many", self.snapshot_count)).offset(60));
        }
        match self.snapshot_count {
            0 => Ok(()),
            _ => self.validate_table("snapshot table", self.snapshots_offset, 0, 0),
        }
    }

    /// Refuses a table that is too large, not aligned, or wraps around the end of the address
    /// space.
    pub(crate) fn validate_table(&self, name: &str, offset: u64, bytes: u64, limit: u64) -> Result<()> {
        if bytes > limit {
            let what = format!("the {name} claims {bytes} bytes, at most {limit} are possible");
            return Err(Error::corrupt(what).offset(offset));
        }
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(Error::corrupt(format!("the {name} is not aligned to a cluster")).offset(offset));
        }
        match offset.checked_add(bytes) {
            Some(end) if i64::try_from(end).is_ok() => Ok(()),
            _ => Err(Error::corrupt(format!("the {name} lies beyond any file")).offset(offset)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any header bytes, most of them with the magic and one of the versions that we read.
    fn bytes() -> impl Strategy<Value = [u8; DECODED_LENGTH]> {
        let fields = proptest::collection::vec(any::<u8>(), DECODED_LENGTH);
        (fields, 1..=4u8, 0..24u8, any::<bool>()).prop_map(|(fields, version, bits, is_plausible)| {
            let mut bytes: [u8; DECODED_LENGTH] = std::array::from_fn(|i| fields[i]);
            bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
            if is_plausible {
                // Nothing that an early check would refuse.
                bytes[8..20].fill(0);
                bytes[20..24].copy_from_slice(&[0, 0, 0, bits]);
                bytes[32..36].fill(0);
                bytes[72..80].fill(0);
                bytes[96..105].copy_from_slice(&[0, 0, 0, bits % 7, 0, 0, 0, 112, 0]);
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_or_validating_panic(bytes in bytes()) {
            if let Ok(header) = Header::decode(&bytes) {
                let _ = header.validate(|_| None);
            }
        }

        #[test]
        fn what_is_encoded_decodes_to_the_same(bytes in bytes()) {
            if let Ok(header) = Header::decode(&bytes) {
                let length = if header.version == 2 { V2_LENGTH } else { 112 };
                let header = Header { length, ..header };
                let mut encoded = header.encode();
                prop_assert_eq!(encoded.len(), length as usize);
                encoded.resize(DECODED_LENGTH, 0xee);
                let again = Header::decode(encoded.first_chunk().unwrap()).unwrap();
                prop_assert_eq!(again, header);
            }
        }
    }
}
