//! The whole mounted tree, walked by `tree.sh` with a user's own tools.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control::uncached_file;
use crate::mounted::Mounted;
use crate::scratch::{AS_NOBODY, AS_ROOT, LoopMount, Scratch, rebasefs};

/// What the script says, as somebody: nothing if all is well.
fn walk(as_whom: &[&str]) {
    let ended = Scratch::new().script(as_whom, "tree.sh", &[rebasefs()]);
    let said = ended.stdout + &ended.stderr;
    assert_eq!((ended.code, said.as_str()), (Some(0), ""));
}

#[test]
fn root_walks_the_tree() {
    walk(AS_ROOT);
}

#[test]
fn an_ordinary_user_walks_the_tree() {
    walk(AS_NOBODY);
}

#[test]
fn the_layers_of_a_long_chain_and_many_snapshots_are_all_there() {
    let s = Scratch::new();
    s.draw_raw("0.img", 65536, "10 11 12 13");
    for n in 1..12 {
        let format = if n == 1 { "raw" } else { "qcow2" };
        s.qemu_img(&format!("create -q -f qcow2 -b {}.img -F {format} {n}.img", n - 1));
        s.draw(&format!("{n}.img"), 65536, ["-- 2a", "-- -- 3a", "-- -- -- 4a"][n % 3]);
    }
    for n in 0..40 {
        s.qemu_img(&format!("snapshot -c {n} 11.img"));
        s.draw("11.img", 65536, &format!("{n:02x}"));
    }
    let expected: Vec<_> =
        (0..12).map(|n| s.guest_bytes(if n == 0 { "raw" } else { "qcow2" }, &format!("{n}.img"))).collect();
    let mounted = Mounted::new(&s, "11.img");
    for (depth, bytes) in expected.iter().rev().enumerate() {
        assert_eq!(std::fs::read(mounted.path(&format!("layers/{depth}.raw"))).unwrap(), *bytes);
    }
    assert_eq!(std::fs::read_dir(mounted.path("layers")).unwrap().count(), 12);
    // More than are kept open at a time, twice. Each was taken before the next number was drawn.
    for n in (1..40).chain(1..40) {
        let bytes = std::fs::read(mounted.path(&format!("snapshots/{n}.raw"))).unwrap();
        assert!(bytes[0] == n - 1 && bytes[65536..] == expected[11][65536..], "snapshot {n}");
    }
    assert_eq!(std::fs::read_dir(mounted.path("snapshots")).unwrap().count(), 40);
}

/// Snapshot and disk share tables, which a rebase changes and a reclaim gives back.
#[test]
fn no_reader_of_a_snapshot_ever_sees_another_byte() {
    let s = Scratch::new();
    let cells = |step: usize| (0..64).map(|n| format!("{:02x}", n % step + 1)).collect::<Vec<_>>().join(" ");
    s.draw_raw("base.raw", 65536, &cells(7));
    s.draw_raw("new.raw", 65536, &cells(5));
    s.qemu_img("create -q -f qcow2 -o cluster_size=4k -b base.raw -F raw cow.qcow2");
    s.draw("cow.qcow2", 65536, "-- 2a -- zz");
    s.qemu_img("snapshot -c one cow.qcow2");
    s.draw("cow.qcow2", 65536, "-- -- 3a 3b -- --");
    let mounted = Mounted::new(&s, "cow.qcow2");
    let files = ["snapshots/one.raw", "disk.raw", "layers/0.raw"];
    let expected = files.map(|name| std::fs::read(mounted.path(name)).unwrap());
    let is_over = AtomicBool::new(false);
    let is_the_same = |n: usize| uncached_file(&mounted, files[n], expected[n].len()) == expected[n];
    let rounds = || {
        for line in ["-b new.raw", "-b base.raw --reclaim", "-b new.raw --reclaim", "-b ''"] {
            std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n"))?;
        }
        Ok::<_, std::io::Error>(())
    };
    std::thread::scope(|scope| {
        for n in [0, 0, 1, 2] {
            let (is_over, is_the_same) = (&is_over, &is_the_same);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    assert!(is_the_same(n), "{}", files[n]);
                }
            });
        }
        let done = rounds();
        is_over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|e| panic!("{e}: {}", mounted.says("status")));
    });
    assert!((0..3).all(is_the_same));
    mounted.unmount();
    s.qemu_img("convert -O raw -l snapshot.name=one cow.qcow2 one.raw");
    assert!(std::fs::read(s.path("one.raw")).unwrap() == expected[0]);
    s.check_clean("cow.qcow2");
}

/// With --rw, somebody may divide the disk and write into it by its other name.
#[test]
fn partitions_follow_what_is_written_to_the_disk() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 cow.qcow2 8M");
    s.write("hello", b"world\n");
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    assert!(!mounted.path("partitions").exists());
    let disk = std::fs::File::options().write(true).open(mounted.path("disk.raw")).unwrap();
    assert_eq!(mounted.shell("echo start=2048,size=4M,type=83 | sfdisk -q disk.raw").0, Some(0));
    let partition = std::fs::File::open(mounted.path("partitions/1.raw")).unwrap();
    assert_eq!(partition.metadata().unwrap().len(), 4 << 20);
    let first = || {
        let mut bytes = [0; 4];
        partition.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    for written in [[0; 4], [1; 4], [2; 4]] {
        disk.write_all_at(&written, 1 << 20).unwrap();
        assert_eq!(first(), written);
    }
    s.ok("mkdir", "files");
    s.ok("mv", "hello files");
    s.ok("mke2fs", "-q -t ext4 -d files fs.img 4M");
    assert_eq!(mounted.shell("dd if=../fs.img of=disk.raw bs=1M seek=1 conv=notrunc status=none").0, Some(0));
    let guest = LoopMount::new(&s, &mounted.path("partitions/1.raw"), "ro");
    assert_eq!(std::fs::read(guest.path().join("hello")).unwrap(), b"world\n");
    drop(guest);
    assert_eq!(mounted.shell("echo start=4096,size=1M,type=83 | sfdisk -q disk.raw").0, Some(0));
    assert_eq!(std::fs::metadata(mounted.path("partitions/1.raw")).unwrap().len(), 1 << 20);
}
