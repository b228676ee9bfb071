//! How often each host cluster is pointed to, in memory that follows what is pointed to and not
//! the size of the file.
//!
//! Pure: no I/O. A count takes one byte until it exceeds 254; sixty-four neighbours share an entry.

use std::collections::HashMap;

const CHUNK: u64 = 64;
/// Stands for "look among the large ones".
const LARGE: u8 = u8::MAX;

/// Counts by cluster number; all are zero at first.
#[derive(Debug, Default)]
pub struct Counts {
    chunks: HashMap<u64, [u8; CHUNK as usize]>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// How often `cluster` is pointed to.
    pub fn of(&self, cluster: u64) -> u64 {
        match self.chunks.get(&(cluster / CHUNK)) {
            None => 0,
            Some(chunk) => self.value(cluster, chunk[(cluster % CHUNK) as usize]),
        }
    }

    /// Adds `times`, but not beyond `limit`. Returns how much of it was too much.
    pub fn add(&mut self, cluster: u64, times: u64, limit: u64) -> u64 {
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert([0; CHUNK as usize]);
        let slot = &mut chunk[(cluster % CHUNK) as usize];
        let before = match *slot {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        };
        let wanted = before.saturating_add(times);
        let now = wanted.min(limit);
        match u8::try_from(now) {
            Ok(small) if small < LARGE => *slot = small,
            _ => {
                *slot = LARGE;
                self.large.insert(cluster, now);
            }
        }
        wanted - now
    }

    /// Every cluster that is pointed to, in order, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut keys: Vec<u64> = self.chunks.keys().copied().collect();
        keys.sort_unstable();
        keys.into_iter().flat_map(|key| {
            let chunk = &self.chunks[&key];
            let clusters = (key * CHUNK..).zip(chunk);
            clusters.map(|(cluster, &slot)| (cluster, self.value(cluster, slot))).filter(|&(_, n)| n > 0)
        })
    }

    fn value(&self, cluster: u64, slot: u8) -> u64 {
        match slot {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_on_both_sides_of_a_byte() {
        let mut counts = Counts::default();
        for (cluster, times) in [(7, 1), (7, 253), (8, 255), (1 << 50, 1), (8, 65_000)] {
            assert_eq!(counts.add(cluster, times, u64::MAX), 0);
        }
        let all: Vec<_> = counts.iter().collect();
        assert_eq!(all, [(7, 254), (8, 65_255), (1 << 50, 1)]);
        assert_eq!(counts.of(9), 0);
    }

    #[test]
    fn what_exceeds_the_limit_is_handed_back() {
        let mut counts = Counts::default();
        assert_eq!(counts.add(3, 1, 1), 0);
        assert_eq!(counts.add(3, 2, 1), 2);
        assert_eq!(counts.of(3), 1);
    }
}
