//! Reading tables of 8-byte big-endian entries, and remembering pieces of them in bounded memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::entry::L2Entry;
use crate::error::Result;
use crate::file::{HostFile, HostOffset};

/// L2 tables are read and remembered in pieces of at most this many bytes.
const SLICE: usize = 16 << 10;
/// The same, as the length of a range of a file.
pub const SLICE_BYTES: u64 = SLICE as u64;

/// What is remembered is named by the layer (a number of its own) and the host offset.
type Key = (u64, HostOffset);
/// The same of an inflated cluster, with the size of its payload in bytes.
type ClusterKey = (u64, HostOffset, u32);

/// Pieces of L2 tables and inflated clusters of all the layers that share it, at most so many
/// bytes of each.
#[derive(Debug)]
pub struct TableCache {
    slices: Cache<Key, Arc<L2Slice>, Bytes>,
    clusters: Cache<ClusterKey, Arc<[u8]>, Bytes>,
}

#[derive(Clone, Debug)]
struct Bytes;

impl Weighter<Key, Arc<L2Slice>> for Bytes {
    fn weight(&self, _: &Key, slice: &Arc<L2Slice>) -> u64 {
        slice.words.len() as u64 * 8 + 64
    }
}

impl Weighter<ClusterKey, Arc<[u8]>> for Bytes {
    fn weight(&self, _: &ClusterKey, cluster: &Arc<[u8]>) -> u64 {
        cluster.len() as u64
    }
}

impl TableCache {
    /// Bytes of L2 tables remembered.
    const SLICE_BUDGET: u64 = 12 << 20;
    /// Bytes of inflated clusters remembered: at least a few of the largest, of 2 MiB.
    const CLUSTER_BUDGET: u64 = 8 << 20;

    /// An empty one.
    pub fn new() -> Arc<Self> {
        let slices = (Self::SLICE_BUDGET / SLICE_BYTES) as usize;
        // Few, so that the cache is not cut into shards too small for a cluster of 2 MiB.
        let clusters = 16;
        Arc::new(Self {
            slices: Cache::with_weighter(slices, Self::SLICE_BUDGET, Bytes),
            clusters: Cache::with_weighter(clusters, Self::CLUSTER_BUDGET, Bytes),
        })
    }

    /// A number that no other layer of the process has.
    pub(crate) fn next_layer_number() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// The slice at `at`, from memory or from the file.
    pub(crate) fn slice(
        &self,
        layer: u64,
        file: &dyn HostFile,
        at: HostOffset,
        bytes: u64,
    ) -> Result<Arc<L2Slice>> {
        self.slices.get_or_insert_with(&(layer, at), || {
            read_words(file, at, bytes / 8).map(|words| Arc::new(L2Slice { words }))
        })
    }

    /// The inflated cluster at `at` with a payload of at most `size` bytes, from memory or from
    /// `inflate`: once, also when several readers ask at the same time. What a longer payload became says
    /// nothing of a place that is recorded too short.
    pub(crate) fn cluster(
        &self,
        layer: u64,
        (at, size): (HostOffset, u32),
        inflate: impl FnOnce() -> Result<Arc<[u8]>>,
    ) -> Result<Arc<[u8]>> {
        self.clusters.get_or_insert_with(&(layer, at, size), inflate)
    }
}

/// A piece of an L2 table.
#[derive(Debug)]
pub struct L2Slice {
    words: Box<[u64]>,
}

impl L2Slice {
    /// A piece with these words.
    pub fn new(words: Box<[u64]>) -> Self {
        Self { words }
    }

    /// Its words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The same with other words from that index on.
    #[must_use]
    pub fn with(&self, index: usize, words: &[u64]) -> Self {
        let mut changed = self.words.clone();
        changed[index..index + words.len()].copy_from_slice(words);
        Self { words: changed }
    }

    /// The entries from that index to the end of the slice; `size` is 8 or 16 bytes.
    pub fn entries_from(&self, index: u64, size: u64) -> impl Iterator<Item = L2Entry> {
        (index..self.words.len() as u64 * 8 / size).map(move |index| self.entry(index, size))
    }

    /// How many entries from that index on are all zeros; `size` is 8 or 16 bytes.
    pub fn empty_entries_from(&self, index: u64, size: u64) -> u64 {
        let words = &self.words[(index * size / 8) as usize..];
        let empty = words.iter().position(|word| *word != 0).unwrap_or(words.len());
        empty as u64 * 8 / size
    }

    /// The entry with that index in the slice; `size` is 8 or 16 bytes.
    pub fn entry(&self, index: u64, size: u64) -> L2Entry {
        if size == 8 {
            L2Entry { word: self.words[index as usize], bitmap: 0 }
        } else {
            let at = index as usize * 2;
            L2Entry { word: self.words[at], bitmap: self.words[at + 1] }
        }
    }
}

/// Reads `count` big-endian 8-byte words.
pub fn read_words(file: &dyn HostFile, at: HostOffset, count: u64) -> Result<Box<[u64]>> {
    let bytes = count as usize * 8;
    if bytes <= SLICE {
        // Long chains read thousands of them.
        let mut buffer = [0; SLICE];
        file.read_at(at, &mut buffer[..bytes])?;
        return Ok(decode_words(&buffer[..bytes]));
    }
    let mut buffer = vec![0; bytes];
    file.read_at(at, &mut buffer)?;
    Ok(decode_words(&buffer))
}

/// Big-endian bytes to words; what is left over at the end is ignored.
pub fn decode_words(bytes: &[u8]) -> Box<[u64]> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

/// Words to big-endian bytes.
pub fn encode_words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_of_the_largest_clusters_are_remembered() {
        let cache = TableCache::new();
        let mut inflated = 0;
        for _ in 0..10 {
            for number in 0..2 {
                let cluster = cache.cluster(0, (HostOffset(number << 21), 512), || {
                    inflated += 1;
                    Ok(vec![0; 2 << 20].into())
                });
                assert_eq!(cluster.unwrap().len(), 2 << 20);
            }
        }
        assert_eq!(inflated, 2);
    }
}
