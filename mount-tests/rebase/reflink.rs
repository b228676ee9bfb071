//! Backing files that share extents of their file system: what lies in the same place is equal.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::rebase_keeps_everything;
use crate::scratch::{LoopMount, Scratch};

const MIB: u64 = 1 << 20;

/// A file system with a scratch directory in it.
struct Shared {
    here: Scratch,
    _mount: LoopMount,
    _disk: Scratch,
}

/// Two raw files of 32 MiB, one made from the other by sharing its extents, of which some have
/// been written to since, and an overlay; in a file system of their own.
fn shared(make: &str, options: &str) -> Shared {
    let scratch = Scratch::new();
    let disk = std::fs::File::create(scratch.path("disk")).unwrap();
    disk.set_len(512 * MIB).unwrap();
    scratch.ok(make, "-q disk");
    let mount = LoopMount::new(&scratch, &scratch.path("disk"), options);
    let here = Scratch::within(mount.path());
    let bytes: Vec<u8> = (0..32 * MIB).map(|at| (at / 4096 * 31 + at % 251) as u8).collect();
    here.write("old", &bytes);
    here.ok("cp", "--reflink=always old new");
    here.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    here.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x77 5M 1M"]);
    // Not on the disk yet when it is looked for there.
    let new = OpenOptions::new().write(true).open(here.path("new")).unwrap();
    for at in [0, 3 * MIB + 512, 5 * MIB, 20 * MIB] {
        new.write_all_at(&[0xee; 512], at).unwrap();
    }
    Shared { here, _mount: mount, _disk: scratch }
}

fn compared(scratch: &Scratch) -> u64 {
    let said = scratch.rebasefs("rebase --dry-run --output=json -b new -F raw cow.qcow2");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    said["compared"].as_u64().unwrap()
}

fn what_is_shared_is_not_read(make: &str) {
    let shared = shared(make, "rw");
    let scratch = &shared.here;
    let looked_at = compared(scratch);
    assert!((3 << 16..8 * MIB).contains(&looked_at), "{looked_at} bytes were compared");
    rebase_keeps_everything(scratch, "--verify -b new -F raw", &["old", "new"]);
}

#[test]
fn on_btrfs_what_is_shared_is_not_read() {
    what_is_shared_is_not_read("mkfs.btrfs");
}

#[test]
fn on_xfs_what_is_shared_is_not_read() {
    what_is_shared_is_not_read("mkfs.xfs");
}

/// The place of a compressed extent does not say which of its bytes are meant.
#[test]
fn compressed_extents_of_btrfs_are_read() {
    let shared = shared("mkfs.btrfs", "rw,compress-force=zstd");
    let scratch = &shared.here;
    assert_eq!(compared(scratch), 31 * MIB);
    rebase_keeps_everything(scratch, "-b new -F raw", &["old", "new"]);
}

/// The same extents at other places of the disk are not the same disk.
#[test]
fn extents_that_have_moved_are_told_apart() {
    for make in ["mkfs.btrfs", "mkfs.xfs"] {
        let shared = shared(make, "rw");
        let scratch = &shared.here;
        std::fs::remove_file(scratch.path("new")).unwrap();
        for (from, to) in [(8, 0), (0, 8), (16, 16)] {
            let command = format!("reflink old {from}m {to}m 8m");
            let ended = scratch.run_args("xfs_io", &["-f", "-c", &command, "new"]);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        }
        rebase_keeps_everything(scratch, "--verify -b new -F raw", &["old", "new"]);
        assert!(compared(scratch) < 20 * MIB);
    }
}

/// Bytes in use on the file system that a scratch directory lies in.
fn used(scratch: &Scratch) -> u64 {
    scratch.ok("sync", "-f .");
    let said = scratch.ok("df", "--block-size=1 --output=used .");
    said.lines().last().unwrap().trim().parse().unwrap()
}

#[test]
fn what_is_copied_shares_its_space_with_the_old_backing_file() {
    for make in ["mkfs.btrfs", "mkfs.xfs"] {
        let shared = shared(make, "rw");
        let scratch = &shared.here;
        let before = used(scratch);
        rebase_keeps_everything(scratch, "--verify --backing=", &["old"]);
        // Tables, and what the test itself has written for the oracles and removed again.
        let grown = used(scratch).saturating_sub(before);
        assert!(grown < 8 * MIB, "{make}: 31 MiB were copied and took {grown} bytes");
        // It is a part in the same blocks, not the same file.
        let old = std::fs::read(scratch.path("old")).unwrap();
        scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x99 0 32M"]);
        assert!(old == std::fs::read(scratch.path("old")).unwrap());
    }
}

#[test]
fn clusters_of_any_shape_share_what_they_can() {
    let shared = shared("mkfs.xfs", "rw");
    let scratch = &shared.here;
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=128k",
        "compat=0.10",
        "data_file=data",
    ] {
        let has_data_file = options.contains("data_file");
        for name in ["cow.qcow2", "data"] {
            let _ = std::fs::remove_file(scratch.path(name));
        }
        scratch.qemu_img(&format!("create -q -f qcow2 -o {options} -b old -F raw cow.qcow2"));
        let writes = ["write -q -P 0x77 5000k 999k", "write -q -P 0x78 512 512", "write -q -P 0x79 31M 100k"];
        scratch.qemu_io("qcow2", "cow.qcow2", &writes);
        if !has_data_file {
            scratch.qemu_img("snapshot -c one cow.qcow2");
            scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x7a 5M 3M"]);
        }
        rebase_keeps_everything(scratch, "--verify -b new -F raw", &["old", "new"]);
        rebase_keeps_everything(scratch, "--verify --backing=", &["old", "new"]);
    }
}
