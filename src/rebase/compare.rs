//! Comparing two buffers: which units differ, and what the old ones hold. Pure.

use std::ops::Range;

/// A run of units that differ and are alike in whether they hold anything but zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// Bytes of the buffers.
    pub bytes: Range<usize>,
    /// Whether the old buffer holds nothing but zeros there.
    pub is_zero: bool,
}

/// The runs of units of `unit` bytes in which `old` and `new`, equally long, differ.
pub(super) fn differences(old: &[u8], new: &[u8], unit: usize) -> Vec<Difference> {
    let mut found: Vec<Difference> = Vec::new();
    let units = old.chunks(unit).zip(new.chunks(unit)).enumerate();
    for (number, (old, _)) in units.filter(|(_, (old, new))| old != new) {
        let bytes = number * unit..number * unit + old.len();
        let is_zero = is_zero(old);
        match found.last_mut() {
            Some(last) if last.bytes.end == bytes.start && last.is_zero == is_zero => {
                last.bytes.end = bytes.end;
            }
            _ => found.push(Difference { bytes, is_zero }),
        }
    }
    found
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    // A slice that equals itself shifted by one holds one value throughout; memcmp does the work.
    bytes.first().is_none_or(|first| *first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_by_kind() {
        //           same  data  data  zero  zero  same
        let old = [1, 1, 2, 2, 2, 3, 0, 0, 0, 0, 7, 7];
        let new = [1, 1, 9, 2, 2, 9, 5, 0, 0, 5, 7, 7];
        let expected =
            [Difference { bytes: 2..6, is_zero: false }, Difference { bytes: 6..10, is_zero: true }];
        assert_eq!(differences(&old, &new, 2), expected);
        assert_eq!(differences(&old, &old, 2), []);
    }

    #[test]
    fn zeros_are_told_from_one_stray_byte() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        for stray in [0, 1, 2047, 4095] {
            let mut bytes = [0; 4096];
            bytes[stray] = 1;
            assert!(!is_zero(&bytes));
        }
    }
}
