//! L1 and L2 entries: what the bits mean.
//!
//! Pure: no I/O. Facts from the qcow2 specification, *Cluster mapping* and *Extended L2 entries*.

use super::header::Header;
use crate::error::{Error, Result};
use crate::file::HostOffset;

/// The refcount of what this entry points to is exactly one: it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (standard entries of version 3 without subclusters).
pub const ZERO: u64 = 1 << 0;
/// Bits 9–55: a host offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of an L1 entry that are neither offset nor flag.
pub(super) const L1_RESERVED: u64 = !(OFFSET | COPIED);
/// Bits of an L2 entry that are neither offset nor flag.
pub(super) const L2_RESERVED: u64 = !(OFFSET | COPIED | ZERO);

/// Number of subclusters in a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// The host offset of an L2 table that an L1 entry points to, `None` if there is none.
pub fn l2_table(entry: u64, header: &Header) -> Result<Option<HostOffset>> {
    if entry & L1_RESERVED != 0 {
        return Err(Error::corrupt(format!("L1 entry {entry:#018x} has reserved bits set")));
    }
    match entry & OFFSET {
        0 => Ok(None),
        offset if offset % header.cluster_size() == 0 => Ok(Some(HostOffset(offset))),
        _ => Err(Error::corrupt(format!("L1 entry {entry:#018x} is not aligned to a cluster"))),
    }
}

/// An L2 entry as it stands in the table; `bitmap` is zero where entries have 8 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct L2Entry {
    /// The first 8 bytes.
    pub word: u64,
    /// The second 8 bytes of an extended entry: bits 0–31 allocated, bits 32–63 zero.
    pub bitmap: u64,
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Compressed.
    Compressed {
        /// Where its bytes begin.
        at: HostOffset,
        /// How many bytes it has at most.
        size: u32,
    },
    /// Uncompressed, or nothing, or zeros: each subcluster for itself.
    Standard(Standard),
}

/// An entry that is not compressed, in the words of subclusters: without extended L2 entries all
/// 32 say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standard {
    /// The host cluster, if there is one.
    pub host: Option<HostOffset>,
    /// Bit n: subcluster n is data in the host cluster.
    pub allocated: u32,
    /// Bit n: subcluster n reads as zeros.
    pub zero: u32,
}

/// The state of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the host cluster.
    Data,
    /// Zeros.
    Zero,
    /// Unknown here.
    Unallocated,
}

impl Standard {
    /// The state of a subcluster.
    pub fn state(&self, index: u32) -> State {
        let bit = 1 << index;
        if self.zero & bit != 0 {
            State::Zero
        } else if self.allocated & bit != 0 {
            State::Data
        } else {
            State::Unallocated
        }
    }

    /// How many subclusters from `index` on, at most up to `end`, have the same state.
    pub fn run(&self, index: u32, end: u32) -> u32 {
        let state = self.state(index);
        (index..end).take_while(|&i| self.state(i) == state).count() as u32
    }

    /// Bit n: nothing is known of subcluster n here.
    pub fn unallocated(&self) -> u32 {
        !(self.allocated | self.zero)
    }
}

impl L2Entry {
    /// What the entry says, with everything that the format forbids refused.
    pub fn decode(self, header: &Header) -> Result<Cluster> {
        if self.word & COMPRESSED != 0 {
            return self.decode_compressed(header);
        }
        let extended = header.has_subclusters();
        let reserved = L2_RESERVED | if header.has_zero_flag() { 0 } else { ZERO };
        if self.word & reserved != 0 {
            return Err(self.corrupt("has reserved bits set"));
        }
        let offset = self.word & OFFSET;
        if !offset.is_multiple_of(header.cluster_size()) {
            return Err(self.corrupt("is not aligned to a cluster"));
        }
        // In an external data file, offset 0 is a place like any other; there the flag tells.
        let is_set = offset != 0 || (header.has_data_file() && self.word & COPIED != 0);
        let host = is_set.then_some(HostOffset(offset));
        let (allocated, zero) = if extended {
            (self.bitmap as u32, (self.bitmap >> 32) as u32)
        } else if self.word & ZERO != 0 {
            (0, u32::MAX)
        } else {
            (if is_set { u32::MAX } else { 0 }, 0)
        };
        if allocated & zero != 0 {
            return Err(self.corrupt("calls a subcluster both allocated and zero"));
        }
        if allocated != 0 && host.is_none() {
            return Err(self.corrupt("has allocated subclusters but no host cluster"));
        }
        Ok(Cluster::Standard(Standard { host, allocated, zero }))
    }

    /// Compressed: bits 0 to x−1 are the host offset, bits x to 61 the number of additional
    /// 512-byte sectors, where x = 62 − (cluster_bits − 8).
    fn decode_compressed(self, header: &Header) -> Result<Cluster> {
        if header.has_data_file() {
            return Err(self.corrupt("is compressed, which an external data file rules out"));
        }
        if self.bitmap != 0 {
            return Err(self.corrupt("is compressed but has subclusters"));
        }
        if self.word & COPIED != 0 {
            return Err(self.corrupt("is compressed but marked as writable in place"));
        }
        let x = 62 - (header.cluster_bits - 8);
        let at = self.word & ((1 << x) - 1);
        let sectors = ((self.word & !COMPRESSED) >> x) + 1;
        if at >> 56 != 0 {
            return Err(self.corrupt("points beyond any file"));
        }
        let size = sectors * 512 - at % 512;
        // Fits: at most 2^(cluster_bits - 8) sectors, 4 MiB.
        Ok(Cluster::Compressed { at: HostOffset(at), size: size as u32 })
    }

    /// The entry of a compressed cluster that has `length` bytes at `at`; `None` if that is too far
    /// into the file for an entry.
    pub fn compressed(header: &Header, at: HostOffset, length: u64) -> Option<Self> {
        let x = 62 - (header.cluster_bits - 8);
        if at.0 >> x.min(56) != 0 {
            return None;
        }
        let sectors = (at.0 + length - 1) / 512 - at.0 / 512;
        Some(Self { word: COMPRESSED | sectors << x | at.0, bitmap: 0 })
    }

    fn corrupt(self, what: &str) -> Error {
        let Self { word, bitmap } = self;
        let bitmap = if bitmap == 0 { String::new() } else { format!(" {bitmap:#018x}") };
        Error::corrupt(format!("L2 entry {word:#018x}{bitmap} {what}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::qcow2::header::{DECODED_LENGTH, incompatible};

    fn header(version: u8, cluster_bits: u32, incompatible: u64) -> Header {
        let mut bytes = [0; DECODED_LENGTH];
        bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        Header { cluster_bits, incompatible, ..Header::decode(&bytes).unwrap() }
    }

    fn headers() -> impl Strategy<Value = Header> {
        let features = prop_oneof![Just(0), Just(incompatible::EXTENDED_L2), Just(incompatible::DATA_FILE)];
        (2..=3u8, 9..=21u32, features).prop_map(|(version, bits, features)| header(version, bits, features))
    }

    /// Any entry, and often one with few reserved bits set.
    fn entries() -> impl Strategy<Value = L2Entry> {
        let word = prop_oneof![any::<u64>(), any::<u64>().prop_map(|word| word & (OFFSET | COPIED | ZERO))];
        let bitmap = prop_oneof![Just(0), any::<u32>().prop_map(u64::from), any::<u64>()];
        (word, bitmap).prop_map(|(word, bitmap)| L2Entry { word, bitmap })
    }

    proptest! {
        #[test]
        fn what_an_entry_decodes_to_is_possible(header in headers(), entry in entries()) {
            match entry.decode(&header) {
                Ok(Cluster::Compressed { at, size }) => {
                    prop_assert!((1..=4 << 20).contains(&size));
                    prop_assert!(at.0 >> 56 == 0 && (at.0 + u64::from(size)) % 512 == 0);
                }
                Ok(Cluster::Standard(standard)) => {
                    prop_assert_eq!(standard.allocated & standard.zero, 0);
                    prop_assert!(standard.allocated == 0 || standard.host.is_some());
                    prop_assert!(standard.host.is_none_or(|host| host.0 % header.cluster_size() == 0));
                }
                Err(_) => {}
            }
            let _ = l2_table(entry.word, &header);
        }

        #[test]
        fn compressed_entries_say_what_went_in(header in headers(), at in 1..1u64 << 57, part in 1..=1000u64) {
            prop_assume!(!header.has_data_file());
            let length = (header.cluster_size() * part / 1000).clamp(1, header.cluster_size() - 1);
            let Some(entry) = L2Entry::compressed(&header, HostOffset(at), length) else {
                prop_assert!(at >> 49 != 0);
                return Ok(());
            };
            let Ok(Cluster::Compressed { at: found, size }) = entry.decode(&header) else {
                return Err(TestCaseError::fail("not compressed"));
            };
            prop_assert_eq!(found, HostOffset(at));
            prop_assert!((length..length + 512).contains(&u64::from(size)));
        }

        #[test]
        fn runs_of_subclusters_have_one_state(allocated: u32, zero: u32, index in 0..SUBCLUSTERS) {
            let standard = Standard { host: None, allocated: allocated & !zero, zero };
            let run = standard.run(index, SUBCLUSTERS);
            prop_assert!(run >= 1);
            prop_assert!((index..index + run).all(|i| standard.state(i) == standard.state(index)));
            let next = index + run;
            prop_assert!(next == SUBCLUSTERS || standard.state(next) != standard.state(index));
        }
    }

    #[test]
    fn entries_say_what_the_specification_says() {
        let plain = |word| L2Entry { word, bitmap: 0 }.decode(&header(3, 16, 0)).unwrap();
        let standard = |host, allocated, zero| Cluster::Standard(Standard { host, allocated, zero });
        let host = Some(HostOffset(0x50000));
        assert_eq!(plain(0), standard(None, 0, 0));
        assert_eq!(plain(ZERO), standard(None, 0, u32::MAX));
        assert_eq!(plain(0x50000 | COPIED), standard(host, u32::MAX, 0));
        assert_eq!(plain(0x50000 | ZERO), standard(host, 0, u32::MAX));
        // x = 62 - (16 - 8) = 54: two sectors from 0x50123 on.
        let at = HostOffset(0x50123);
        assert_eq!(plain(COMPRESSED | 1 << 54 | at.0), Cluster::Compressed { at, size: 1024 - 0x123 });
    }

    #[test]
    fn what_the_format_forbids_is_refused() {
        let refused = |entry: L2Entry, header: &Header| entry.decode(header).unwrap_err().to_string();
        let plain = |word| L2Entry { word, bitmap: 0 };
        assert!(refused(plain(0x50002), &header(3, 16, 0)).contains("reserved bits"));
        assert!(refused(plain(ZERO), &header(2, 16, 0)).contains("reserved bits"));
        assert!(refused(plain(0x50200), &header(3, 16, 0)).contains("not aligned"));
        assert!(refused(plain(COMPRESSED), &header(3, 16, incompatible::DATA_FILE)).contains("data file"));
        let extended = header(3, 16, incompatible::EXTENDED_L2);
        let both = L2Entry { word: 0x50000, bitmap: 1 | 1 << 32 };
        assert!(refused(both, &extended).contains("both allocated and zero"));
        assert!(refused(L2Entry { word: 0, bitmap: 1 }, &extended).contains("no host cluster"));
        assert!(l2_table(1, &header(3, 16, 0)).is_err());
    }
}
