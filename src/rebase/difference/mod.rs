//! Where two chains show a guest other bytes: found once, good for every overlay that moves from one
//! to the other.
//!
//! Owns the ranges and what may be said of them. Says "may differ" too often rather than too seldom:
//! the one costs a look, the other would cost the guest's bytes.

mod find;
mod layers;
mod look;
mod saved;
mod shared;

use std::collections::BTreeMap;

pub(crate) use layers::ChainKey;
pub(crate) use look::look;
pub use shared::Differences;

use crate::layer::GuestOffset;

/// More ranges are not kept: neighbours are joined over the gaps between them.
const MAX_RANGES: usize = 1 << 20;

/// The guest bytes in which two chains may differ. Everywhere else they are equal, also beyond the
/// ends of both, where there are zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Start and end of each; in order, with gaps between them.
    ranges: Vec<(u64, u64)>,
}

impl Difference {
    /// Whether the chains may differ at `at`, and for how long the answer holds, at most `length`
    /// (≥ 1) bytes.
    pub fn at(&self, at: GuestOffset, length: u64) -> (bool, u64) {
        let next = self.ranges.partition_point(|(_, end)| *end <= at.0);
        match self.ranges.get(next) {
            None => (false, length),
            Some((start, _)) if *start > at.0 => (false, length.min(start - at.0)),
            Some((_, end)) => (true, length.min(end - at.0)),
        }
    }

    /// Start and length in bytes of each range in which they may differ, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestOffset, u64)> {
        self.ranges.iter().map(|(start, end)| (GuestOffset(*start), end - start))
    }

    /// How many bytes may differ.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }
}

/// Ranges as they come, in any order.
#[derive(Debug)]
struct Gathered {
    /// End of each by its start; with gaps between them.
    ranges: BTreeMap<u64, u64>,
    /// How many are kept.
    most: usize,
    /// Ranges with no larger gap between them are joined; grows when there are too many.
    gap: u64,
}

impl Gathered {
    fn new(most: usize) -> Self {
        Self { ranges: BTreeMap::new(), most, gap: 0 }
    }

    /// Adds a range that was not there.
    fn add(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        if let Some((before, its_end)) = self.ranges.range(..=start).next_back().map(|(s, e)| (*s, *e))
            && its_end.saturating_add(self.gap) >= start
        {
            (start, end) = (before, end.max(its_end));
        }
        while let Some((next, its_end)) = self.ranges.range(start + 1..).next().map(|(s, e)| (*s, *e))
            && end.saturating_add(self.gap) >= next
        {
            end = end.max(its_end);
            self.ranges.remove(&next);
        }
        self.ranges.insert(start, end);
        while self.ranges.len() > self.most {
            self.coarsen();
        }
    }

    fn coarsen(&mut self) {
        self.gap = (self.gap * 2).max(find::UNIT);
        let ranges = std::mem::replace(self, Self { gap: self.gap, ..Self::new(self.most) }).ranges;
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match joined.last_mut() {
                Some(last) if last.1.saturating_add(self.gap) >= start => last.1 = end,
                _ => joined.push((start, end)),
            }
        }
        self.ranges = joined.into_iter().collect();
    }

    fn finish(self) -> Difference {
        Difference { ranges: self.ranges.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(most: usize, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut gathered = Gathered::new(most);
        ranges.iter().for_each(|(start, end)| gathered.add(*start, *end));
        gathered.finish().ranges
    }

    #[test]
    fn neighbours_are_joined_in_whatever_order_they_come() {
        assert_eq!(gathered(9, &[(20, 30), (0, 10), (40, 50)]), [(0, 10), (20, 30), (40, 50)]);
        assert_eq!(gathered(9, &[(20, 30), (0, 10), (10, 20)]), [(0, 30)]);
        assert_eq!(gathered(9, &[(0, 10), (10, 20), (20, 30)]), [(0, 30)]);
    }

    #[test]
    fn too_many_ranges_are_joined_over_the_smallest_gaps_and_none_is_lost() {
        const UNIT: u64 = find::UNIT;
        let near = [(0, UNIT), (2 * UNIT, 3 * UNIT), (100 * UNIT, 101 * UNIT)];
        assert_eq!(gathered(2, &near), [(0, 3 * UNIT), (100 * UNIT, 101 * UNIT)]);
        let many: Vec<_> = (0..1000u64).map(|n| (n * n * UNIT * 2, (n * n * 2 + 1) * UNIT)).collect();
        let joined = gathered(16, &many);
        assert!(joined.len() <= 16 && joined.is_sorted());
        let difference = Difference { ranges: joined };
        for (start, end) in many {
            assert_eq!(difference.at(GuestOffset(start), end - start), (true, end - start));
        }
    }

    #[test]
    fn an_answer_ends_where_it_stops_being_true() {
        let difference = Difference { ranges: vec![(10, 20), (30, 40)] };
        let at = |at| difference.at(GuestOffset(at), 100);
        assert_eq!((at(0), at(10), at(19)), ((false, 10), (true, 10), (true, 1)));
        assert_eq!((at(20), at(39), at(40)), ((false, 10), (true, 1), (false, 100)));
        assert_eq!(difference.at(GuestOffset(12), 3), (true, 3));
        assert_eq!(Difference::default().at(GuestOffset(0), 7), (false, 7));
        assert_eq!(difference.bytes(), 20);
    }
}
