//! Random chains, each from its seed.

use super::reads_like_qemu;
use crate::random_chain::{Random, grow};
use crate::scratch::Scratch;

fn random_chains_read_like_qemu(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let s = Scratch::new();
        let mut random = Random::new(seed);
        let depth = 1 + random.below(6) as usize;
        let size = random.pick(&[100_352, 1 << 20, 2 << 20, 3 << 20]);
        let layers = grow(&s, &mut random, "layer", None, depth, size);
        reads_like_qemu(&s, layers[0].format, &layers[0].name, &format!("seed {seed}: {layers:#?}"));
    }
}

#[test]
fn random_chains_read_like_qemu_seeds_0_to_49() {
    random_chains_read_like_qemu(0..50);
}

#[test]
fn random_chains_read_like_qemu_seeds_50_to_99() {
    random_chains_read_like_qemu(50..100);
}
