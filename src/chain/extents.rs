//! Walking over a range of guest bytes, one answer after the other: the loop that reading holes,
//! counting, drawing and mapping have in common.
//!
//! Knows neither formats nor what an answer is good for.

use std::ops::{Bound, Range, RangeBounds};

use super::{Chain, Owned};
use crate::error::Result;
use crate::layer::{Detail, ExtentKind, GuestOffset};

/// The extents of a range, in order and without gaps; made by [`Chain::extents`].
///
/// Each is as long as it could be told without looking any further, so neighbours may be alike:
/// [`joined`](Self::joined) joins them. Ends after an error.
#[derive(Clone, Debug)]
pub struct Extents<'a> {
    chain: &'a Chain,
    range: Range<u64>,
    detail: Detail,
}

impl Chain {
    /// Where the bytes of a range come from, from its first byte to its last: guest offset and
    /// answer of each extent, as [`extent_at`](Self::extent_at) gives it. What lies beyond the
    /// virtual size is left out, so that `..` is the whole disk.
    ///
    /// ```
    /// use rebasefs::{Chain, Detail, GuestOffset};
    ///
    /// # let file = tempfile::NamedTempFile::new()?;
    /// # file.as_file().set_len(1 << 20)?;
    /// # std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[0x11; 4096], 512 << 10)?;
    /// # let path = file.path();
    /// let disk = Chain::open(path)?; // 1 MiB, with 4 KiB of data in the middle
    /// let mut data = 0;
    /// for extent in disk.extents(GuestOffset(256 << 10).., Detail::Holes) {
    ///     let (at, owned) = extent?;
    ///     println!("{at:#x}: {} bytes, {:?}", owned.extent.length, owned.extent.kind);
    ///     data += if owned.is_zero() { 0 } else { owned.extent.length };
    /// }
    /// assert_eq!(data, 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The iterator ends with an error where tables cannot be read or break the rules of their
    /// format, or the chain is broken off.
    pub fn extents(&self, range: impl RangeBounds<GuestOffset>, detail: Detail) -> Extents<'_> {
        let start = match range.start_bound() {
            Bound::Included(start) => start.0,
            Bound::Excluded(before) => before.0.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.0.saturating_add(1),
            Bound::Excluded(end) => end.0,
            Bound::Unbounded => u64::MAX,
        };
        Extents { chain: self, range: start..end.min(self.virtual_size()), detail }
    }
}

impl<'a> Extents<'a> {
    /// The same, each run as long as it can be: neighbours of the same layer and kind that go on
    /// where the one before ends, in the guest's disk and in the host file, are one. What begins a
    /// long run is known only when its end is found.
    pub fn joined(self) -> impl Iterator<Item = Result<(GuestOffset, Owned)>> + use<'a> {
        joined(self, |(_, last), (_, next)| last.join(next))
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<(GuestOffset, Owned)>;

    fn next(&mut self) -> Option<Self::Item> {
        let (chain, detail) = (self.chain, self.detail);
        step(
            &mut self.range,
            |at, left| chain.extent_at(at, left, detail).map(|owned| (at, owned)),
            |(_, owned)| owned.extent.length,
        )
    }
}

impl Owned {
    /// Whether the bytes are zeros, as far as metadata tell: some layer says so, or none holds them.
    pub fn is_zero(&self) -> bool {
        matches!(self.extent.kind, ExtentKind::Zero(_) | ExtentKind::NotMine)
    }

    /// Takes in `next`, which lies right behind, if that goes on in the same way.
    fn join(&mut self, next: &Self) -> bool {
        let goes_on =
            self.depth == next.depth && self.extent.kind.advanced(self.extent.length) == next.extent.kind;
        self.extent.length += if goes_on { next.extent.length } else { 0 };
        goes_on
    }
}

/// Asks what lies at the beginning of `range` and goes behind it; `None` at the end. Nothing is
/// left of the range after an error.
pub(super) fn step<T>(
    range: &mut Range<u64>,
    ask: impl FnOnce(GuestOffset, u64) -> Result<T>,
    length: impl FnOnce(&T) -> u64,
) -> Option<Result<T>> {
    if range.is_empty() {
        return None;
    }
    let found = ask(GuestOffset(range.start), range.end - range.start);
    range.start = found.as_ref().map_or(range.end, |found| range.start + length(found));
    Some(found)
}

/// Joins to each run those behind it that `join` can take in. Of a run that an error cut off,
/// nothing is told.
pub(super) fn joined<T>(
    mut runs: impl Iterator<Item = Result<T>>,
    join: impl Fn(&mut T, &T) -> bool,
) -> impl Iterator<Item = Result<T>> {
    let mut open: Option<T> = None;
    std::iter::from_fn(move || {
        loop {
            let next = match runs.next() {
                None => return open.take().map(Ok),
                Some(Ok(next)) => next,
                Some(Err(error)) => {
                    open = None;
                    return Some(Err(error));
                }
            };
            if open.as_mut().is_some_and(|last| join(last, &next)) {
                continue;
            }
            if let Some(done) = open.replace(next) {
                return Some(Ok(done));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::file::HostOffset;
    use crate::layer::Extent;

    fn owned(depth: usize, kind: ExtentKind, length: u64) -> Owned {
        Owned { depth: Some(depth), extent: Extent { kind, length } }
    }

    #[test]
    fn neighbours_are_joined_if_they_go_on_in_guest_and_host_alike() {
        let data = |host| ExtentKind::Data(HostOffset(host));
        let runs = [
            owned(0, data(100), 10),
            owned(0, data(110), 5),
            // Elsewhere in the file; then in another layer.
            owned(0, data(200), 10),
            owned(1, data(210), 10),
            owned(1, ExtentKind::Zero(None), 7),
            owned(1, ExtentKind::Zero(None), 7),
            owned(0, ExtentKind::Zero(None), 7),
        ];
        let joined: Vec<Owned> = joined(runs.into_iter().map(Ok), Owned::join).map(Result::unwrap).collect();
        let lengths: Vec<u64> = joined.iter().map(|run| run.extent.length).collect();
        assert_eq!(lengths, [15, 10, 10, 14, 7]);
    }

    #[test]
    fn an_error_ends_it() {
        let mut range = 0..30;
        let ask = |at: GuestOffset, left: u64| match at.0 {
            10 => Err(Error::corrupt("damaged")),
            _ => Ok(left.min(10)),
        };
        let all: Vec<_> = std::iter::from_fn(|| step(&mut range, ask, |length| *length)).collect();
        assert!(matches!(&all[..], [Ok(10), Err(_)]), "{all:?}");
        let none = joined(all.into_iter(), |_, _| true).map(Result::ok).collect::<Vec<_>>();
        assert_eq!(none, [None]);
    }

    #[test]
    fn a_range_is_cut_at_the_end_of_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Chain::open(file.path()).unwrap();
        let covered = |range: (Bound<GuestOffset>, Bound<GuestOffset>)| {
            let runs = disk.extents(range, Detail::Owner).map(Result::unwrap);
            runs.map(|(at, owned)| (at.0, owned.extent.length)).collect::<Vec<_>>()
        };
        let at = GuestOffset;
        assert_eq!(covered((Bound::Unbounded, Bound::Unbounded)), [(0, 1 << 20)]);
        assert_eq!(covered((Bound::Included(at(512)), Bound::Included(at(1023)))), [(512, 512)]);
        assert_eq!(covered((Bound::Excluded(at(511)), Bound::Excluded(at(1024)))), [(512, 512)]);
        assert_eq!(covered((Bound::Included(at((1 << 20) - 1)), Bound::Unbounded)), [((1 << 20) - 1, 1)]);
        for nothing in [1 << 20, u64::MAX] {
            assert_eq!(covered((Bound::Included(at(nothing)), Bound::Unbounded)), []);
        }
        assert_eq!(Chain::default().extents(.., Detail::Owner).count(), 0);
    }
}
