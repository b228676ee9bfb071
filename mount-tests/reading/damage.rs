//! Random damage to the metadata of real images: reading may fail or show other bytes, it never
//! panics, hangs or takes all memory. Seeded.

use std::sync::Arc;

use rebasefs::chain::{Chain, Opener};
use rebasefs::file::Access;
use rebasefs::layer::{Detail, Format, GuestOffset};

use crate::random_chain::Random;
use crate::scratch::Scratch;

/// Does all that reading can do with `a.qcow2`, whatever comes of it.
fn read_all_that_can_be_read(s: &Scratch) -> rebasefs::Result<()> {
    // The format is given: with its magic bytes damaged, the image would be taken for raw.
    let chain = Opener::new().chain(&s.path("a.qcow2"), Some(Format::Qcow2), Access::ReadOnly)?;
    let read = read_view(&chain);
    let top = chain.top().unwrap().as_qcow2().unwrap();
    for snapshot in top.snapshots()? {
        let _ =
            top.at_snapshot(&snapshot).and_then(|view| read_view(&Chain::new([Arc::new(view) as Arc<_>])));
    }
    read
}

fn read_view(chain: &Chain) -> rebasefs::Result<()> {
    let mut buffer = vec![0; 10_000];
    let mut result = Ok(());
    for at in (0..2 << 20).step_by(buffer.len()) {
        result = chain.read_at(GuestOffset(at), &mut buffer).and(result);
    }
    let (mut at, size) = (0, chain.virtual_size());
    for _ in 0..1000 {
        if at >= size {
            break;
        }
        at += chain.extent_at(GuestOffset(at), size - at, Detail::Holes)?.extent.length;
    }
    result
}

/// Overwrites one to three spots of the metadata: single bits, bytes, extreme values.
fn damage(random: &mut Random, bytes: &mut [u8], metadata: &[u64]) {
    for _ in 0..=random.below(3) {
        let area = random.pick(metadata) as usize;
        let at = area + random.below(128) as usize;
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at..at + 4].fill(0xff),
            _ => bytes[at / 8 * 8..][..8].copy_from_slice(&random.next().to_be_bytes()),
        }
    }
}

fn no_damage_makes_reading_panic(options: &str, seed: u64) {
    let s = Scratch::new();
    s.qemu_img(&format!("create -q -f qcow2 -o cluster_size=16k,{options} a.qcow2 1M"));
    s.draw("a.qcow2", 16384, "11 -- zz c12 c13 za -- --");
    s.qemu_img("snapshot -c one a.qcow2");
    s.draw("a.qcow2", 16384, "-- 21 -- -- -- -- 22 zz");
    let whole = std::fs::read(s.path("a.qcow2")).unwrap();
    let u64_at = |at: u64| u64::from_be_bytes(whole[at as usize..][..8].try_into().unwrap());
    let (l1, snapshots) = (u64_at(40), u64_at(64));
    let offset = 0x00ff_ffff_ffff_fe00;
    let metadata = [0, l1, u64_at(l1) & offset, snapshots, u64_at(u64_at(snapshots)) & offset];
    let mut random = Random::new(seed);
    let mut refused = 0;
    for _ in 0..400 {
        let mut bytes = whole.clone();
        damage(&mut random, &mut bytes, &metadata);
        s.write("a.qcow2", &bytes);
        refused += u32::from(read_all_that_can_be_read(&s).is_err());
    }
    assert!(refused > 50, "most damage is noticed, {refused} of 400 here");
}

#[test]
fn no_damage_makes_reading_panic_version_3() {
    no_damage_makes_reading_panic("compat=1.1", 1);
}

#[test]
fn no_damage_makes_reading_panic_version_2() {
    no_damage_makes_reading_panic("compat=0.10", 2);
}

#[test]
fn no_damage_makes_reading_panic_subclusters_and_zstd() {
    no_damage_makes_reading_panic("extended_l2=on,compression_type=zstd", 3);
}
