//! What a writer of the mounted disk finds: errors, holes, times, size, locks.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::mounted::Mounted;
use crate::scratch::Scratch;

const CLUSTER: usize = 65536;

/// ```text
/// base:    11 22 -- 44
/// overlay: -- -- 33 --
/// ```
fn scratch() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("base.raw", CLUSTER, "11 22 -- 44");
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    s.draw("cow.qcow2", CLUSTER, "-- -- 33 --");
    s
}

fn writable(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn errno(result: std::io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

const EPERM: Option<i32> = Some(1);
const ENOSPC: Option<i32> = Some(28);
const EROFS: Option<i32> = Some(30);

#[test]
fn the_disk_is_for_reading_unless_it_was_asked_for() {
    let s = scratch();
    let mounted = Mounted::new(&s, "cow.qcow2");
    // Root may open any file elsewhere.
    let opened = File::options().write(true).open(mounted.path("disk.raw"));
    assert_eq!(errno(opened), EROFS);
    assert_eq!(std::fs::metadata(mounted.path("disk.raw")).unwrap().mode() & 0o777, 0o444);
}

#[test]
fn holes_blocks_and_times_follow_what_is_written() {
    let s = scratch();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let disk = writable(&mounted.path("disk.raw"));
    let before = disk.metadata().unwrap();
    assert_eq!((before.blocks(), before.mode() & 0o777), (4 * CLUSTER as u64 / 512, 0o644));
    s.ok("fallocate", &format!("-p -o 65536 -l 65536 {}", mounted.path("disk.raw").display()));
    assert_eq!(disk.metadata().unwrap().blocks(), 3 * CLUSTER as u64 / 512);
    s.ok("fallocate", &format!("-z -o 131072 -l 65536 {}", mounted.path("disk.raw").display()));
    let after = disk.metadata().unwrap();
    assert_eq!(after.blocks(), 2 * CLUSTER as u64 / 512);
    assert!(after.modified().unwrap() > before.modified().unwrap());
    let map = s.ok("qemu-img", &format!("map --output=json -f raw {}", mounted.path("disk.raw").display()));
    assert!(
        map.contains(r#""start": 65536, "length": 131072, "depth": 0, "present": true, "zero": true"#),
        "{map}"
    );
    disk.write_all_at(b"x", 65536).unwrap();
    assert_eq!(disk.metadata().unwrap().blocks(), 3 * CLUSTER as u64 / 512);
    drop(disk);
    mounted.unmount();
    s.check_clean("cow.qcow2");
    s.draw_raw("truth.raw", CLUSTER, "11 -- -- 44");
    s.poke("truth.raw", 65536, b"x");
    s.same("truth.raw", "cow.qcow2");
}

#[test]
fn a_disk_keeps_its_size_and_has_an_end() {
    let s = scratch();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let disk = writable(&mounted.path("disk.raw"));
    assert_eq!(errno(disk.set_len(1 << 20)), EPERM);
    disk.set_len(4 * CLUSTER as u64).unwrap();
    assert_eq!(errno(disk.write_at(b"x", 4 * CLUSTER as u64)), ENOSPC);
    // Blocks of a file are set aside by writing to them.
    s.ok("fallocate", &format!("-x -l 4096 {}", mounted.path("disk.raw").display()));
    disk.sync_all().unwrap();
    assert_eq!(mounted.bytes().len(), 4 * CLUSTER);
}

#[test]
fn a_disk_that_may_grow_grows_by_zeros_whatever_lies_below() {
    let s = Scratch::new();
    for (options, old) in
        [("cluster_size=512", 40_000 / 512 * 512), ("compat=0.10", 100 << 10), ("cluster_size=64k", 1 << 20)]
    {
        // The backing file is longer than the disk.
        s.draw_raw("base.raw", CLUSTER, &["11"; 64].join(" "));
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw cow.qcow2 {old}"));
        s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x22 4096 4096"]);
        let mut truth = s.guest_bytes("qcow2", "cow.qcow2");
        let mounted = Mounted::with(&s, "cow.qcow2", "--rw --grow");
        let disk = writable(&mounted.path("disk.raw"));
        assert_eq!(errno(disk.set_len(512)), EPERM);
        disk.set_len(3 << 20).unwrap();
        disk.write_all_at(&[0x33; 8192], (3 << 20) - 8192).unwrap();
        truth.resize((3 << 20) - 8192, 0);
        truth.resize(3 << 20, 0x33);
        assert_eq!(disk.metadata().unwrap().len(), 3 << 20);
        assert!(mounted.bytes() == truth, "{options}");
        drop(disk);
        mounted.unmount();
        s.check_clean("cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == truth, "{options}");
    }
}

/// The old backing file ends with the disk, the new one goes on, and nothing holds what was added.
#[test]
fn what_a_disk_has_grown_by_stays_zeros_on_a_longer_backing_file() {
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
        let s = Scratch::new();
        s.draw_raw("base.raw", CLUSTER, "11 11");
        s.draw_raw("new.raw", CLUSTER, "11 22 33 44 55 66");
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw cow.qcow2"));
        s.qemu_img("snapshot -c one cow.qcow2");
        let mut truth = s.guest_bytes("qcow2", "cow.qcow2");
        let mounted = Mounted::with(&s, "cow.qcow2", "--rw --grow");
        writable(&mounted.path("disk.raw")).set_len(5 * CLUSTER as u64).unwrap();
        truth.resize(5 * CLUSTER, 0);
        mounted.rebase("new.raw").unwrap();
        mounted.unmount();
        s.check_clean("cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == truth, "{options}");
        s.qemu_img("snapshot -a one cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == truth[..2 * CLUSTER], "{options}");
    }
}

#[test]
fn the_image_is_locked_and_a_raw_one_is_refused() {
    let s = scratch();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    assert_ne!(s.run("qemu-img", "info cow.qcow2").code, Some(0));
    mounted.rebase("flatten").unwrap();
    assert_ne!(s.run("qemu-img", "info cow.qcow2").code, Some(0), "the lock is gone after a rebase");
    mounted.unmount();
    s.qemu_img("info cow.qcow2");
    let said = s.rebasefs_fails(1, "mount --rw base.raw cow.qcow2.mnt");
    assert!(said.contains("write to the file itself"), "{said}");
    let said = s.rebasefs_fails(1, "mount --grow cow.qcow2 cow.qcow2.mnt");
    assert!(said.contains("--rw"), "{said}");
}

#[test]
fn bitmaps_that_should_have_recorded_a_write_are_marked_and_others_are_not() {
    let s = scratch();
    s.qemu_img("bitmap --add cow.qcow2 records");
    s.qemu_img("bitmap --add --disable cow.qcow2 rests");
    let flags = |s: &Scratch, name: &str| {
        let info = s.qemu_img("info --output=json cow.qcow2");
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
        let found = bitmaps.into_iter().find(|bitmap| bitmap["name"] == name).unwrap();
        found["flags"].to_string()
    };
    Mounted::with(&s, "cow.qcow2", "--rw").unmount();
    assert_eq!(flags(&s, "records"), r#"["auto"]"#);
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    writable(&mounted.path("disk.raw")).write_all_at(b"x", 0).unwrap();
    mounted.unmount();
    assert_eq!(flags(&s, "records"), r#"["in-use","auto"]"#);
    assert_eq!(flags(&s, "rests"), "[]");
    s.check_clean("cow.qcow2");
}

#[test]
fn a_full_disk_reaches_the_writer_and_what_was_written_before_stays() {
    let s = scratch();
    let small = s.path("small");
    std::fs::create_dir(&small).unwrap();
    s.ok("mount", &format!("-t tmpfs -o size=4M none {}", small.display()));
    let base = s.path("base.raw");
    s.qemu_img(&format!("create -q -f qcow2 -b {} -F raw small/cow.qcow2 16M", base.display()));
    let mounted = Mounted::with(&s, "small/cow.qcow2", "--rw");
    let disk = writable(&mounted.path("disk.raw"));
    let block = vec![0x66; CLUSTER];
    let places = (0..256).map(|n| n * CLUSTER as u64);
    let written = places.clone().take_while(|at| disk.write_all_at(&block, *at).is_ok()).count();
    assert!((32..64).contains(&written), "{written} clusters in 4 MiB");
    assert_eq!(errno(disk.write_at(&block, written as u64 * CLUSTER as u64)), ENOSPC);
    // There is room for what is there already, and for what gives room back.
    disk.write_all_at(&block, 0).unwrap();
    disk.sync_all().unwrap();
    let hole = (8 * CLUSTER, mounted.path("disk.raw"));
    s.ok("fallocate", &format!("-p -o 0 -l {} {}", hole.0, hole.1.display()));
    disk.sync_all().unwrap();
    disk.write_all_at(&block, written as u64 * CLUSTER as u64).unwrap();
    drop(disk);
    mounted.unmount();
    std::fs::copy(s.path("small/cow.qcow2"), s.path("cow.qcow2")).unwrap();
    s.ok("umount", &small.display().to_string());
    let bytes = s.guest_bytes("qcow2", "cow.qcow2");
    let end = (written + 1) * CLUSTER;
    assert!(
        bytes[..hole.0].iter().all(|byte| *byte == 0) && bytes[hole.0..end].iter().all(|byte| *byte == 0x66)
    );
    s.check_clean("cow.qcow2");
}

#[test]
fn an_image_that_was_not_closed_is_repaired_and_a_damaged_one_refused() {
    let s = scratch();
    let incompatible_bits = 79;
    s.poke("cow.qcow2", incompatible_bits, &[1]);
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    writable(&mounted.path("disk.raw")).write_all_at(b"x", 0).unwrap();
    mounted.unmount();
    assert!(!s.qemu_img("info cow.qcow2").contains("dirty"));
    s.check_clean("cow.qcow2");
    s.poke("cow.qcow2", incompatible_bits, &[2]);
    let said = s.rebasefs_fails(1, "mount --rw cow.qcow2 cow.qcow2.mnt");
    assert!(said.contains("marked as corrupt") && said.contains("check -r all"), "{said}");
}

#[test]
fn a_partition_shows_what_is_written_to_the_disk() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 cow.qcow2 4M");
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    assert!(!mounted.path("partitions/1.raw").exists());
    // A partition table of the PC: one of type 0x83, from sector 2048 on, with 2048 sectors.
    let mut table = [0; 512];
    table[450] = 0x83;
    table[454..458].copy_from_slice(&2048u32.to_le_bytes());
    table[458..462].copy_from_slice(&2048u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = writable(&mounted.path("disk.raw"));
    disk.write_all_at(&table, 0).unwrap();
    let partition = File::open(mounted.path("partitions/1.raw")).unwrap();
    for byte in [0x11, 0x22] {
        disk.write_all_at(&[byte; 512], 1 << 20).unwrap();
        let mut found = [0; 512];
        partition.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, [byte; 512]);
    }
    assert_eq!(partition.metadata().unwrap().len(), 1 << 20);
    assert_eq!(errno(writable(&mounted.path("layers/0.raw")).set_len(512)), EPERM);
}
