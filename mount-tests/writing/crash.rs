//! Power cuts while a guest writes: what was flushed is there, what was not is there or is not, sector by
//! sector; snapshots are what they were, and nothing worse than leaks is left.

use std::sync::Arc;

use rebasefs::Progress;
use rebasefs::chain::{Chain, Opener};
use rebasefs::file::Access;
use rebasefs::layer::qcow2::check;
use rebasefs::layer::qcow2::testing::Live;
use rebasefs::layer::{Format, GuestOffset, Reference};

use crate::crash::{every_numbered_cut, moved, open, views};
use crate::memory_file::MemoryFile;
use crate::random_chain::Random;
use crate::scratch::Scratch;

const SHAPES: [(&str, u64); 7] = [
    ("compat=0.10,cluster_size=4k", 192 << 10),
    ("cluster_size=512", 48 << 10),
    ("cluster_size=512,refcount_bits=64", 96 << 10),
    ("cluster_size=4k", 192 << 10),
    ("cluster_size=64k", 1 << 20),
    ("extended_l2=on,cluster_size=16k", 512 << 10),
    ("compression_type=zstd,cluster_size=4k", 128 << 10),
];

/// What a sector may hold after a cut: what it held at the last flush, and all that was written since.
type Allowed = Vec<Vec<u8>>;

/// A guest's writes into `file`: after how many operations on it a flush had ended, and what is allowed
/// from then on.
fn write(file: &MemoryFile, base: &Chain, random: &mut Random) -> Vec<(usize, Allowed)> {
    let live = Arc::new(Live::open(&open(file)).unwrap());
    let chain = base.under(live.clone());
    let size = chain.virtual_size();
    let mut bytes = vec![0; size as usize];
    chain.read_at(GuestOffset(0), &mut bytes).unwrap();
    let sectors = |bytes: &[u8]| bytes.chunks(512).map(|sector| vec![sector[0]]).collect::<Allowed>();
    let mut allowed = sectors(&bytes);
    let mut flushed = vec![(0, allowed.clone())];
    for number in 1..=16u8 {
        let at = random.below(size / 512);
        let length = 1 + random.below((size / 512 - at).min(40));
        let (start, bytes) = (GuestOffset(at * 512), length * 512);
        let byte = match random.below(4) {
            0 => 0,
            _ => 0x80 + number,
        };
        match (byte, random.chance(50)) {
            (0, may_unmap) => live.writer().guest().zero(&chain, start, bytes, may_unmap).unwrap(),
            _ => live.writer().guest().write(&chain, start, &vec![byte; bytes as usize]).unwrap(),
        }
        for sector in at..at + length {
            allowed[sector as usize].push(byte);
            // What was allowed when the last flush ended is allowed with what came after it.
            flushed.last_mut().unwrap().1[sector as usize].push(byte);
        }
        if number % 4 == 0 {
            live.writer().flush().unwrap();
            let mut bytes = vec![0; size as usize];
            chain.read_at(GuestOffset(0), &mut bytes).unwrap();
            allowed = sectors(&bytes);
            flushed.push((file.log().len(), allowed.clone()));
        }
    }
    flushed
}

#[test]
fn no_power_cut_takes_what_a_guest_has_flushed() {
    let mut states = 0;
    for (seed, (options, disk)) in
        (0..).zip(SHAPES).flat_map(|shape| [(2 * shape.0, shape.1), (2 * shape.0 + 1, shape.1)])
    {
        let s = Scratch::new();
        let unit = disk / 16;
        s.qemu_img(&format!("create -q -f raw base {disk}"));
        s.qemu_io("raw", "base", &[&format!("write -q -P 0x11 0 {}", 9 * unit)]);
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b base -F raw cow.qcow2"));
        let compressed = format!("write -q -c -P 0x22 {} {unit}", 2 * unit);
        let data = format!("write -q -P 0x33 {} {}", 5 * unit, 3 * unit);
        s.qemu_io("qcow2", "cow.qcow2", &[&compressed, &data]);
        if seed % 2 == 1 {
            s.qemu_img("snapshot -c one cow.qcow2");
            s.qemu_io("qcow2", "cow.qcow2", &[&format!("write -q -P 0x44 {} {unit}", 6 * unit)]);
        }
        let start = std::fs::read(s.path("cow.qcow2")).unwrap();
        let base = Opener::new().chain(&s.path("base"), None, Access::ReadOnly).unwrap();
        let snapshots = views(&MemoryFile::new(start.clone()), &base)[1..].to_vec();
        let file = MemoryFile::new(start.clone());
        let flushed = write(&file, &base, &mut Random::new(seed));
        states += every_numbered_cut(&start, &file.log(), |number, bytes, what| {
            let (_, allowed) = flushed.iter().rev().find(|(length, _)| *length <= number).unwrap();
            let file = MemoryFile::new(bytes);
            let found = views(&file, &base);
            assert!(found[1..] == snapshots, "{options}: a snapshot has changed: {}", what());
            for (number, (sector, allowed)) in found[0].chunks(512).zip(allowed).enumerate() {
                let is_allowed = allowed.iter().any(|byte| sector.iter().all(|other| other == byte));
                assert!(is_allowed, "{options}: sector {number} {:x} {allowed:x?}: {}", sector[0], what());
            }
            let report = check::check(&open(&file)).unwrap();
            assert!(report.is_sound(), "{options}: {:?}: {}", report.messages, what());
        });
        s.write("cut.qcow2", &file.bytes());
        s.qemu_img("check -q cut.qcow2");
    }
    println!("{states} states that a power cut can leave, none wrong");
    assert!(states >= 5_000, "only {states} states");
}

/// Backing files and disks: an L1 table that is long enough already, one that moves, and zeros that must hide
/// what a longer backing file has behind the old end, in clusters, subclusters and, in version 2, as data.
const GROWING: [(&str, u64, u64); 6] = [
    ("cluster_size=512", 20_480, 400 << 10),
    ("cluster_size=512,refcount_bits=64", 32_256, 2 << 20),
    ("compat=0.10,cluster_size=512", 20_480, 96 << 10),
    ("cluster_size=4k", 100 << 10, 3 << 20),
    ("cluster_size=64k", 640 << 10, 1 << 20),
    ("extended_l2=on,cluster_size=16k", 200 << 10, 24 << 20),
];

#[test]
fn no_power_cut_shows_what_lies_behind_the_end_of_a_disk_that_grows() {
    let mut states = 0;
    for (options, old, new) in GROWING {
        let s = Scratch::new();
        s.qemu_img(&format!("create -q -f raw base {new}"));
        s.qemu_io("raw", "base", &[&format!("write -q -P 0x11 0 {new}")]);
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b base -F raw cow.qcow2 {old}"));
        s.qemu_io("qcow2", "cow.qcow2", &[&format!("write -q -P 0x33 {} 4096", old / 2)]);
        let has_snapshot = !options.starts_with("compat=0.10");
        if has_snapshot {
            s.qemu_img("snapshot -c one cow.qcow2");
        }
        let start = std::fs::read(s.path("cow.qcow2")).unwrap();
        let base = Opener::new().chain(&s.path("base"), None, Access::ReadOnly).unwrap();
        let before = views(&MemoryFile::new(start.clone()), &base);
        let mut larger = before[0].clone();
        larger.resize(new as usize, 0);
        let file = MemoryFile::new(start.clone());
        let chain = base.under(Arc::new(Live::open(&open(&file)).unwrap())).grown(new).unwrap();
        let end = file.log().len();
        // The new bytes can be written, and are as durable as the old ones.
        let live = chain.live().unwrap();
        live.writer().guest().write(&chain, GuestOffset(new - 512), &[0x55; 512]).unwrap();
        live.writer().flush().unwrap();
        states += every_numbered_cut(&start, &file.log(), |number, bytes, what| {
            let file = MemoryFile::new(bytes);
            let mut found = views(&file, &base);
            assert!(found[1..] == before[1..], "{options}: the snapshot has changed: {}", what());
            if number >= end {
                let last = found[0].split_off(new as usize - 512);
                assert!(last.iter().all(|byte| *byte == 0) || last == [0x55; 512], "{options}: {}", what());
                found[0].resize(new as usize, 0);
            }
            let is_right = found[0] == larger || (found[0] == before[0] && number < end);
            assert!(is_right, "{options}: {} bytes: {}", found[0].len(), what());
            let report = check::check(&open(&file)).unwrap();
            assert!(report.is_sound(), "{options}: {:?}: {}", report.messages, what());
        });
        s.write("cut.qcow2", &file.bytes());
        s.check_clean("cut.qcow2");
        larger[new as usize - 512..].fill(0x55);
        assert!(s.guest_bytes("qcow2", "cut.qcow2") == larger, "{options}");
    }
    println!("{states} states while a disk grows, none wrong");
    assert!(states >= 500, "only {states} states");
}

/// A rebase has found a place for a cluster and writes it, when a guest's write to another cluster gives the
/// active disk an L2 table of its own.
#[test]
fn a_table_that_a_guest_gets_meanwhile_has_what_a_rebase_copies() {
    let s = Scratch::new();
    s.write("old", &vec![0x11; 32 << 10]);
    s.write("new", &[[0x11; 2560].as_slice(), &[0x22; 512], &vec![0x11; (32 << 10) - 3072]].concat());
    s.qemu_img("create -q -f qcow2 -o cluster_size=512 -b old -F raw cow.qcow2");
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x33 0 512"]);
    s.qemu_img("snapshot -c one cow.qcow2");
    let file = MemoryFile::new(std::fs::read(s.path("cow.qcow2")).unwrap());
    let opener = Opener::new().force_share();
    let old = opener.chain(&s.path("old"), None, Access::ReadOnly).unwrap();
    let live = Arc::new(Live::open(&open(&file)).unwrap());
    let chain = old.under(live.clone());
    let before = {
        let mut bytes = vec![0; 32 << 10];
        chain.read_at(GuestOffset(0), &mut bytes).unwrap();
        bytes
    };
    let guest = chain.clone();
    file.before_writing(vec![0x11; 512], move || {
        live.writer().guest().write(&guest, GuestOffset(20 << 9), &[0x44; 512]).unwrap();
    });
    let backing = Reference::new(s.path("new"), Format::Raw);
    let rebased = moved(chain, Some(&backing)).run(&Progress::default()).unwrap();
    let mut after = vec![0; 32 << 10];
    rebased.chain.read_at(GuestOffset(0), &mut after).unwrap();
    assert!(after[20 << 9..21 << 9] == [0x44; 512], "the guest has not written meanwhile");
    after[20 << 9..21 << 9].copy_from_slice(&before[20 << 9..21 << 9]);
    assert!(after == before);
}
