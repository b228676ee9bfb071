//! Hostile images at the hands of the program: what a command refuses it leaves as it was, and no
//! image costs more memory than it has a claim to.
//!
//! What opening and reading refuse, and with which words, is in `reading/hostile.rs`.

use std::os::unix::fs::FileExt;

use rebasefs::chain::Opener;
use rebasefs::file::Access;
use rebasefs::layer::qcow2::testing::Live;

use crate::scratch::{Ended, Scratch, rebasefs};

const CLUSTER: u64 = 65536;
/// Where the structures of a new image with clusters of 64 KiB lie.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1: u64 = 3 * CLUSTER;
const L2: u64 = 4 * CLUSTER;
const COPIED: u64 = 1 << 63;

/// An overlay `a.qcow2` of which two clusters are data, and a new backing file that differs.
fn overlay() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("old", CLUSTER as usize, "11 22 33 44 55 66 77 88");
    s.draw_raw("new", CLUSTER as usize, "88 77 66 55 44 33 22 11");
    s.qemu_img("create -q -f qcow2 -b old -F raw a.qcow2");
    s.draw("a.qcow2", CLUSTER as usize, "aa bb");
    s
}

fn poke(s: &Scratch, at: u64, word: u64) {
    s.poke("a.qcow2", at, &word.to_be_bytes());
}

fn set_refcount(s: &Scratch, host: u64, count: u16) {
    s.poke("a.qcow2", REFCOUNT_BLOCK + host / CLUSTER * 2, &count.to_be_bytes());
}

/// A rebase and a reclaim are refused with these words, and not a bit of the image changes.
fn is_left_alone(s: &Scratch, words: &str) {
    let before = std::fs::read(s.path("a.qcow2")).unwrap();
    for line in ["rebase -b new -F raw a.qcow2", "rebase -b  a.qcow2"] {
        let arguments: Vec<&str> = line.split(' ').collect();
        let ended = s.run_args(rebasefs(), &arguments);
        assert_eq!(ended.code, Some(1), "{words}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
        assert!(std::fs::read(s.path("a.qcow2")).unwrap() == before, "{words}: the image has changed");
    }
}

/// ```text
/// overlay: aa -> a structure   (the refcounts say: two users, and cluster 6 is free)
/// ```
#[test]
fn a_structure_that_is_a_piece_of_the_disk_as_well_is_not_written() {
    for (structure, words) in [
        (REFCOUNT_TABLE, "the refcount table is used for something else as well"),
        (REFCOUNT_BLOCK, "refcount block 0 is used 2 times"),
        (L1, "the L1 table is used for something else as well"),
        (L2, "the L2 table is used for something else as well"),
    ] {
        let s = overlay();
        poke(&s, L2 + 8, structure);
        set_refcount(&s, structure, 2);
        set_refcount(&s, 6 * CLUSTER, 0);
        if structure == L2 {
            poke(&s, L1, L2);
        }
        is_left_alone(&s, words);
    }
    // Only a compressed cluster can be said to lie in the header.
    let s = overlay();
    poke(&s, L2 + 8, 1 << 62 | 112);
    set_refcount(&s, 0, 2);
    set_refcount(&s, 6 * CLUSTER, 0);
    is_left_alone(&s, "the header is used for something else as well");
}

/// The same for structures that only some images have, and for guests, too: a guest's first write marks
/// bitmaps in their directory.
///
/// ```text
/// overlay: aa -> a structure   (the refcounts say: two users)
/// ```
#[test]
fn a_bitmap_or_a_snapshot_that_is_a_piece_of_the_disk_as_well_is_not_written() {
    let word = |s: &Scratch, at: u64| {
        let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
        u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
    };
    for what in ["snapshot table", "L1 table of a snapshot", "bitmap directory", "bitmap table"] {
        let s = overlay();
        s.qemu_img("snapshot -c one a.qcow2");
        s.qemu_img("bitmap --add a.qcow2 one");
        // The active disk has a table of its own.
        s.draw("a.qcow2", CLUSTER as usize, "-- -- cc");
        let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
        let bitmaps =
            bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap() as u64;
        let (snapshots, directory) = (word(&s, 64), word(&s, bitmaps + 24));
        let structure = match what {
            "snapshot table" => snapshots,
            "bitmap directory" => directory,
            "bitmap table" => word(&s, directory),
            _ => word(&s, snapshots),
        };
        let l2 = word(&s, word(&s, 40)) & !COPIED;
        poke(&s, l2 + 16, structure);
        set_refcount(&s, structure, 2);
        let words = format!("the {what} is used for something else as well");
        is_left_alone(&s, &words);
        let before = std::fs::read(s.path("a.qcow2")).unwrap();
        let chain = Opener::new().chain(&s.path("a.qcow2"), None, Access::ReadWrite).unwrap();
        let error = Live::open(chain.top().unwrap().as_qcow2().unwrap()).unwrap_err().to_string();
        assert!(error.contains(&words), "{error}");
        drop(chain);
        assert!(std::fs::read(s.path("a.qcow2")).unwrap() == before, "{what}: the image has changed");
        let said = s.run(rebasefs(), "check a.qcow2");
        let said = said.stdout + &said.stderr;
        assert!(said.contains("is used for something else as well"), "{said}");
    }
}

#[test]
fn refcounts_that_lie_are_found_before_anything_is_written() {
    let damage: [(u64, u64, &str); 6] = [
        (L2 + 8, COPIED | 1 << 40, "lies past the end of the file"),
        (L2 + 8, COPIED + 5 * CLUSTER, "cluster 5 refcount=1 reference=2"),
        (L2 + 8, COPIED + 6 * CLUSTER + 4, "has reserved bits set"),
        (L1, COPIED | REFCOUNT_BLOCK, "lies past the end of the file"),
        (REFCOUNT_TABLE, 0, "and refcount 0 contradict each other"),
        (REFCOUNT_TABLE, 1 << 40, "and refcount 0 contradict each other"),
    ];
    for (at, word, words) in damage {
        let s = overlay();
        poke(&s, at, word);
        is_left_alone(&s, words);
    }
    let s = overlay();
    set_refcount(&s, 6 * CLUSTER, 0);
    is_left_alone(&s, "and refcount 0 contradict each other");
}

#[test]
fn snapshots_that_share_an_l1_table_are_refused() {
    let s = overlay();
    s.qemu_img("snapshot -c one a.qcow2");
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
    poke(&s, table, L1);
    is_left_alone(&s, "two L1 tables overlap");
}

/// QEMU refuses to read such a cluster as well. Without it, filling in one guest cluster would
/// overwrite another.
#[test]
fn a_cluster_that_lies_elsewhere_in_an_external_data_file_is_refused() {
    let s = overlay();
    s.qemu_img("create -q -f qcow2 -b old -F raw -o data_file=data a.qcow2");
    s.draw("a.qcow2", CLUSTER as usize, "aa bb");
    poke(&s, L2, COPIED + 2 * CLUSTER);
    s.qemu_img("check a.qcow2");
    let said = s.run("qemu-img", "convert -O raw a.qcow2 out").stderr;
    assert!(said.contains("does not match guest cluster offset"), "{said}");
    let data = std::fs::read(s.path("data")).unwrap();
    is_left_alone(&s, "a cluster does not lie at its guest offset in the external data file");
    assert!(data == std::fs::read(s.path("data")).unwrap());
}

#[test]
fn an_external_data_file_that_snapshots_share_is_not_written() {
    let s = overlay();
    s.qemu_img("snapshot -c one a.qcow2");
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    let snapshots = bytes[60..72].to_vec();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
    let table = bytes[table as usize..].to_vec();
    s.qemu_img("create -q -f qcow2 -b old -F raw -o data_file=data a.qcow2");
    s.draw("a.qcow2", CLUSTER as usize, "aa bb");
    // Behind the four structures and the L2 table: a copy of the L1 table and the snapshot table.
    poke(&s, 5 * CLUSTER, L2);
    s.poke("a.qcow2", 6 * CLUSTER, &table);
    poke(&s, 6 * CLUSTER, 5 * CLUSTER);
    s.poke("a.qcow2", 60, &snapshots);
    poke(&s, 64, 6 * CLUSTER);
    poke(&s, L1, L2);
    set_refcount(&s, L2, 2);
    set_refcount(&s, 5 * CLUSTER, 1);
    set_refcount(&s, 6 * CLUSTER, 1);
    is_left_alone(&s, "with an external data file has snapshots");
}

/// What is filled in would be written to the backing file, whose locks `-U` does not take.
#[test]
fn an_overlay_whose_data_file_is_its_backing_file_is_refused() {
    for (data, backing, target) in [("old", "old", "new"), ("new", "old", "new"), ("old", "mid", "new")] {
        let s = overlay();
        s.qemu_img("create -q -f qcow2 -b old -F raw mid");
        s.qemu_img("create -q -f qcow2 -o data_file=dat a.qcow2 512k");
        s.draw("a.qcow2", CLUSTER as usize, "aa bb");
        let format = if backing == "mid" { "qcow2" } else { "raw" };
        s.rebasefs(&format!("rebase -u -b {backing} -F {format} a.qcow2"));
        let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
        let at = bytes.windows(4).position(|window| window == b"dat\0").unwrap() as u64;
        s.poke("a.qcow2", at, data.as_bytes());
        let before = ["a.qcow2", "old", "new"].map(|name| std::fs::read(s.path(name)).unwrap());
        for options in ["", "-U", "-U --dry-run"] {
            let said = s.rebasefs_fails(1, &format!("rebase {options} -b {target} -F raw a.qcow2"));
            assert!(said.contains("has an external data file in common with"), "{options}: {said}");
        }
        let after = ["a.qcow2", "old", "new"].map(|name| std::fs::read(s.path(name)).unwrap());
        assert!(before == after);
        // Another reference is the way out.
        s.draw_raw("third", CLUSTER as usize, "11 22");
        s.rebasefs("rebase -u -b third -F raw a.qcow2");
    }
}

/// Runs rebasefs with 64 MiB of memory to write to, and a minute.
fn in_little_memory(s: &Scratch, line: &str) -> Ended {
    let ended = s.run("timeout", &format!("60 prlimit --data={} {} {line}", 64 << 20, rebasefs()));
    assert!(matches!(ended.code, Some(0..=4)), "{line}: {:?}: {}", ended.code, ended.stderr);
    ended
}

/// All that opens `a.qcow2` and looks at its tables, in little memory.
fn costs_little(s: &Scratch) {
    for line in [
        "info a.qcow2",
        "map a.qcow2",
        "check a.qcow2",
        "compare a.qcow2 a.qcow2",
        "rebase -b new -F raw a.qcow2",
    ] {
        in_little_memory(s, line);
    }
}

/// Enlarges the file by a hole. Returns where it begins.
fn add_hole(s: &Scratch, bytes: u64) -> u64 {
    let file = std::fs::File::options().write(true).open(s.path("a.qcow2")).unwrap();
    let end = file.metadata().unwrap().len().next_multiple_of(CLUSTER);
    file.set_len(end + bytes).unwrap();
    end
}

#[test]
fn an_l1_table_that_is_a_hole_costs_nothing() {
    let s = overlay();
    let hole = add_hole(&s, 32 << 20);
    s.poke("a.qcow2", 36, &(4u32 << 20).to_be_bytes());
    poke(&s, 40, hole);
    // The last entry of all: a pointer into nowhere.
    poke(&s, hole + (32 << 20) - 8, 1 << 45);
    costs_little(&s);
}

/// 65536 snapshots, each with an L1 table of 32 MiB: one and the same, or each the one behind that
/// of its neighbour.
#[test]
fn snapshots_that_claim_two_tebibytes_of_tables_cost_next_to_nothing() {
    for step in [0, CLUSTER, 32 << 20] {
        let s = overlay();
        let hole = add_hole(&s, (65536 * step).max(32 << 20) + (40 << 20));
        let mut table = Vec::new();
        for number in 0..65536 {
            let l1 = hole + (8 << 20) + number * step;
            table.extend([&l1.to_be_bytes()[..], &(4u32 << 20).to_be_bytes(), &[0; 28]].concat());
        }
        s.poke("a.qcow2", hole, &table);
        s.poke("a.qcow2", 60, &65536u32.to_be_bytes());
        poke(&s, 64, hole);
        for line in ["map a.qcow2", "check a.qcow2", "rebase -b new -F raw a.qcow2"] {
            in_little_memory(&s, line);
        }
    }
}

#[test]
fn a_bitmap_directory_that_is_a_hole_costs_little() {
    let s = overlay();
    s.qemu_img("bitmap --add a.qcow2 one");
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    let extension = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap() as u64;
    let hole = add_hole(&s, 64 << 20);
    poke(&s, extension + 16, 64 << 20);
    poke(&s, extension + 24, hole);
    for count in [1u32, 65535] {
        s.poke("a.qcow2", extension + 8, &count.to_be_bytes());
        let said = in_little_memory(&s, "check a.qcow2").stderr;
        assert!(said.contains("of the bitmap directory has no name"), "{said}");
        in_little_memory(&s, "info a.qcow2");
        in_little_memory(&s, "rebase -b new -F raw a.qcow2");
    }
    poke(&s, extension + 24, hole + (1 << 40));
    in_little_memory(&s, "info a.qcow2");
}

/// Each file names the next: what is opened ends at 4096 layers, however many there are.
#[test]
fn a_chain_of_five_thousand_names_is_refused_in_little_memory() {
    let s = Scratch::new();
    s.qemu_img("create -q -u -f qcow2 -o cluster_size=512 -b f00001 -F qcow2 f00000 512");
    let mut bytes = std::fs::read(s.path("f00000")).unwrap();
    let name = bytes.windows(6).position(|window| window == b"f00001").unwrap();
    for number in 1..5000 {
        bytes[name..name + 6].copy_from_slice(format!("f{:05}", number + 1).as_bytes());
        s.write(&format!("f{number:05}"), &bytes);
    }
    let said = in_little_memory(&s, "map f00000");
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("the chain has more than 4096 layers"), "{}", said.stderr);
}

#[test]
fn a_data_file_that_is_no_file_is_refused_and_not_waited_for() {
    let s = Scratch::new();
    s.ok("mkfifo", "fifo");
    let _socket = std::os::unix::net::UnixListener::bind(s.path("sock")).unwrap();
    std::fs::create_dir(s.path("fold")).unwrap();
    s.qemu_img("create -q -f qcow2 -o data_file=data a.qcow2 1M");
    s.ok("ln", "-s /dev/zero zero");
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    let at = bytes.windows(4).position(|window| window == b"data").unwrap() as u64;
    for name in ["fifo", "sock", "fold", "zero"] {
        s.poke("a.qcow2", at, name.as_bytes());
        for line in ["map a.qcow2", "check a.qcow2", "rebase -u -b new -F raw a.qcow2"] {
            let ended = s.run("timeout", &format!("20 {} {line}", rebasefs()));
            assert!(matches!(ended.code, Some(1 | 2)), "{name}: {line}: {:?}", ended.code);
            assert!(ended.stderr.contains(name), "{line}: {}", ended.stderr);
        }
    }
}

/// A compressed cluster whose frame asks for a window of 2 GiB.
#[test]
fn a_zstd_frame_that_demands_a_huge_window_is_an_error_and_no_memory() {
    let s = overlay();
    s.qemu_img("create -q -f qcow2 -o compression_type=zstd a.qcow2 1M");
    s.draw("a.qcow2", CLUSTER as usize, "c11");
    let file = std::fs::File::open(s.path("a.qcow2")).unwrap();
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 5 * CLUSTER).unwrap();
    assert_eq!(magic, [0x28, 0xb5, 0x2f, 0xfd]);
    for log in [24u8, 27, 31] {
        s.poke("a.qcow2", 5 * CLUSTER + 4, &[0, (log - 10) << 3, 2, 0, 8, 0x5a]);
        let said = in_little_memory(&s, "compare a.qcow2 new").stderr;
        assert!(said.contains("cannot be decompressed"), "2^{log}: {said}");
    }
}
