//! Damaged L1 tables, snapshot tables and zero entries: `info` and `check` say of them what qemu-img says, and
//! `check -r all` mends what qemu-img mends, with every view as it was and at no moment worse.

use std::sync::Arc;

use rebasefs::chain::Chain;
use rebasefs::file::HostFile;
use rebasefs::layer::qcow2::testing::{Preamble, TableCache};
use rebasefs::layer::qcow2::{Qcow2, check, repair};
use serde_json::Value;

use crate::crash::{every_cut, views};
use crate::memory_file::MemoryFile;
use crate::scratch::{Scratch, rebasefs};

/// Two snapshots and what was written after them, in clusters of 4 KiB.
fn image(options: &str) -> (Scratch, Vec<u8>) {
    let s = Scratch::new();
    s.qemu_img(&format!("create -q -f qcow2 -o {options} i.qcow2 1M"));
    s.qemu_io("qcow2", "i.qcow2", &["write -q -P 1 0 128k"]);
    s.qemu_img("snapshot -c one i.qcow2");
    s.qemu_io("qcow2", "i.qcow2", &["write -q -P 2 0 64k"]);
    s.qemu_img("snapshot -c two i.qcow2");
    s.qemu_io("qcow2", "i.qcow2", &["write -q -P 3 32k 64k", "write -q -z 96k 32k"]);
    let bytes = std::fs::read(s.path("i.qcow2")).unwrap();
    (s, bytes)
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// Where the header says that the L1 table and the snapshot table lie, and the place of these words.
const L1: u64 = 40;
const SNAPSHOTS: u64 = 64;

/// The first L2 table of the active disk.
fn l2(bytes: &[u8]) -> u64 {
    word(bytes, word(bytes, L1)) & 0x00ff_ffff_ffff_fe00
}

/// What is written where.
type Damage = (&'static str, fn(&[u8]) -> (u64, Vec<u8>));

/// What `check` finds is what qemu-img finds.
const FOUND: [Damage; 6] = [
    ("the L1 table lies past the end", |_| (L1, (1u64 << 40).to_be_bytes().into())),
    ("the snapshot table lies past the end", |_| (SNAPSHOTS, (1u64 << 40).to_be_bytes().into())),
    ("there are fewer snapshots than counted", |_| (60, 5u32.to_be_bytes().into())),
    ("the L1 table of a snapshot is not aligned", |bytes| {
        let table = word(bytes, SNAPSHOTS);
        (table, (word(bytes, table) + 512).to_be_bytes().into())
    }),
    ("the L1 table of a snapshot is too large", |bytes| {
        (word(bytes, SNAPSHOTS) + 8, (1u32 << 25).to_be_bytes().into())
    }),
    ("the L1 table of a snapshot is empty", |bytes| (word(bytes, SNAPSHOTS) + 8, vec![0; 4])),
];

#[test]
fn damaged_tables_are_described_and_counted_as_qemu_img_does_it() {
    for (what, damage) in FOUND {
        let (s, bytes) = image("cluster_size=4k");
        let (at, written) = damage(&bytes);
        s.poke("i.qcow2", at, &written);
        let [theirs, ours] = ["qemu-img", rebasefs()].map(|program| {
            let ended = s.run(program, "check -f qcow2 --output=json i.qcow2");
            let json: Value = serde_json::from_str(&ended.stdout)
                .unwrap_or_else(|_| panic!("{what}: {program}: {}", ended.stderr));
            // The two disagree on where an image ends that has a table beyond all else.
            let counts = ["corruptions", "leaks", "check-errors"].map(|key| json[key].clone());
            (ended.code, counts)
        });
        assert_eq!(ours, theirs, "{what}");
        let [theirs, ours] = ["qemu-img", rebasefs()].map(|program| s.run(program, "info i.qcow2"));
        assert_eq!((ours.code, ours.stdout), (theirs.code, theirs.stdout), "{what}: {}", ours.stderr);
        // Whoever would read or write it is refused, and the image stays what it was.
        let before = std::fs::read(s.path("i.qcow2")).unwrap();
        s.rebasefs_fails(1, "rebase --backing= i.qcow2");
        assert!(std::fs::read(s.path("i.qcow2")).unwrap() == before, "{what}");
    }
}

/// What `check -r all` mends so that all is as it was.
const MENDED: [Damage; 4] = [
    ("there are fewer snapshots than counted", |_| (60, 5u32.to_be_bytes().into())),
    // The clusters that it led to by chance hold no byte of it.
    ("zeros have a place that is none", |bytes| {
        let entry = l2(bytes) + 8 * 24;
        (entry, (word(bytes, entry) | 0x8000_0000_0000_0201).to_be_bytes().into())
    }),
    ("the snapshots lack extra data", |bytes| {
        // The table anew, behind the old one in its cluster: as version 2 has it, without extra data.
        let table = word(bytes, SNAPSHOTS) as usize;
        let mut entries = Vec::new();
        let mut at = table;
        for _ in 0..2 {
            let entry = &bytes[at..];
            let extra = u32::from_be_bytes(entry[36..40].try_into().unwrap()) as usize;
            let names = usize::from(entry[13]) + usize::from(entry[15]);
            entries.extend([&entry[..36], &[0; 4], &entry[40 + extra..][..names]].concat());
            entries.resize(entries.len().next_multiple_of(8), 0);
            at += (40 + extra + names).next_multiple_of(8);
        }
        (table as u64, entries)
    }),
    ("a snapshot has more extra data than may be", |bytes| {
        let table = word(bytes, SNAPSHOTS) as usize;
        let extra = u32::from_be_bytes(bytes[table + 36..][..4].try_into().unwrap()) as usize;
        // So that the padding of the entry stays what it is.
        let grown = 1496 - extra;
        let mut all = bytes[table..table + 40 + extra].to_vec();
        all[36..40].copy_from_slice(&1496u32.to_be_bytes());
        all.extend(vec![0xee; grown]);
        all.extend(&bytes[table + 40 + extra..][..600]);
        (table as u64, all)
    }),
];

#[test]
fn what_qemu_img_mends_is_mended_and_every_view_reads_as_before() {
    for (what, damage) in MENDED {
        for options in ["cluster_size=4k", "cluster_size=4k,refcount_bits=64"] {
            let (s, bytes) = image(options);
            let truth = views(&MemoryFile::new(bytes.clone()), &Chain::default());
            let (at, written) = damage(&bytes);
            s.poke("i.qcow2", at, &written);
            let damaged = std::fs::read(s.path("i.qcow2")).unwrap();
            assert_ne!(s.run("qemu-img", "check -q i.qcow2").code, Some(0), "{what} is no damage");
            let ended = s.run(rebasefs(), "check -r all i.qcow2");
            assert_eq!(ended.code, Some(0), "{what}: {}{}", ended.stdout, ended.stderr);
            s.check_clean("i.qcow2");
            let mended = std::fs::read(s.path("i.qcow2")).unwrap();
            assert!(views(&MemoryFile::new(mended), &Chain::default()) == truth, "{what}");
            assert!(s.guest_bytes("qcow2", "i.qcow2") == truth[0], "{what}");
            for (number, name) in ["one", "two"].iter().enumerate() {
                s.qemu_img(&format!("convert -f qcow2 -l snapshot.name={name} -O raw i.qcow2 {name}.raw"));
                assert!(std::fs::read(s.path(format!("{name}.raw"))).unwrap() == truth[number + 1], "{what}");
            }
            no_cut_makes_it_worse(&damaged, &truth, what);
        }
    }
}

/// One field that hides snapshots: qemu-img drops them, and frees what they held.
const HIDING: [Damage; 5] = [
    ("the snapshot table lies past the end", |_| (SNAPSHOTS, (1u64 << 40).to_be_bytes().into())),
    ("the snapshot table lies in a cluster of zeros", |bytes| {
        // The last cluster of the refcount block is never all in use.
        (SNAPSHOTS, (word(bytes, word(bytes, 48)) + 3584).next_multiple_of(8).to_be_bytes().into())
    }),
    ("the extra data of a snapshot reaches over the next", |bytes| {
        (word(bytes, SNAPSHOTS) + 36, 2000u32.to_be_bytes().into())
    }),
    ("the extra data of a snapshot is too short", |bytes| (word(bytes, SNAPSHOTS) + 36, vec![0; 4])),
    ("an entry is zeros", |bytes| (word(bytes, SNAPSHOTS), vec![0; 72])),
];

#[test]
fn a_snapshot_that_one_damaged_field_hides_is_not_freed() {
    for (what, damage) in HIDING {
        let (s, bytes) = image("cluster_size=4k");
        let truth = views(&MemoryFile::new(bytes.clone()), &Chain::default());
        let (at, written) = damage(&bytes);
        s.poke("i.qcow2", at, &written);
        for _ in 0..2 {
            let ended = s.run(rebasefs(), "check -r all i.qcow2");
            assert_ne!(ended.code, Some(0), "{what}: {}", ended.stdout);
        }
        s.poke("i.qcow2", at, &bytes[at as usize..][..written.len()]);
        let now = std::fs::read(s.path("i.qcow2")).unwrap();
        assert!(views(&MemoryFile::new(now), &Chain::default()) == truth, "{what}");
        assert_ne!(s.run("qemu-img", "check -q i.qcow2").code, Some(2), "{what}");
    }
}

/// Whatever a power cut leaves of the repair can be repaired, and reads as before.
fn no_cut_makes_it_worse(damaged: &[u8], truth: &[Vec<u8>], what: &str) {
    let file = MemoryFile::new(damaged.to_vec());
    repair::repair(&open(&file), repair::Repair::All).unwrap();
    let states = every_cut(damaged, &file.log(), |bytes, cut| {
        let file = MemoryFile::new(bytes);
        let again = repair::repair(&open(&file), repair::Repair::All).unwrap();
        assert!(again.left.is_sound() && again.left.leaks == 0, "{what}: {}: {:?}", cut(), again.left);
        assert!(check::check(&open(&file)).unwrap().is_sound(), "{what}: {}", cut());
        assert!(views(&file, &Chain::default()) == truth, "{what}: {}", cut());
    });
    println!("{what}: {states} states that a power cut can leave, all repaired");
    assert!(states > 20, "only {states} states");
}

fn open(file: &MemoryFile) -> Qcow2 {
    let preamble = Preamble::read(file).unwrap();
    let file: Arc<dyn HostFile> = Arc::new(file.clone());
    Qcow2::open(file, None, preamble, TableCache::new()).unwrap()
}
