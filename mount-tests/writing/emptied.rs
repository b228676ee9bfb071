//! Tools that empty a file before they write it, on a disk that keeps its size: what they write is there, zeros
//! where they left something out, and behind their end all is as it was.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::mounted::Mounted;
use crate::scratch::Scratch;

const CLUSTER: usize = 65536;

/// `old` is the disk, `new` is another one of its size with holes, `short` ends in the middle, with a hole.
fn scratch() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("old.raw", CLUSTER, "11 22 33 44 55 66 77 88");
    s.draw_raw("new.raw", CLUSTER, "91 -- -- 94 -- 96 97 --");
    s.draw_raw("short.raw", CLUSTER, "-- a2 -- --");
    s.qemu_img("create -q -f qcow2 -b old.raw -F raw cow.qcow2");
    s
}

/// The bytes of a picture, `--` being zeros.
fn bytes(picture: &str) -> Vec<u8> {
    let cell = |cell: &str| vec![u8::from_str_radix(cell, 16).unwrap_or(0); CLUSTER];
    picture.split_whitespace().flat_map(cell).collect()
}

#[test]
fn every_tool_that_empties_a_file_writes_a_disk() {
    let new = "91 -- -- 94 -- 96 97 --";
    for (line, expected) in [
        ("cp new.raw DISK", new),
        ("cp -a new.raw DISK", new),
        ("cp --sparse=always new.raw DISK", new),
        ("cp --sparse=never new.raw DISK", new),
        ("cat new.raw > DISK", new),
        ("dd if=new.raw of=DISK bs=64k status=none", new),
        ("rsync -aI --inplace --no-owner --no-group new.raw DISK", new),
        ("qemu-img convert -f raw -O raw new.raw DISK", new),
        ("qemu-img convert -n -f raw -O raw new.raw DISK", new),
        ("python3 -c \"import shutil; shutil.copyfile('new.raw', 'DISK')\"", new),
        ("cp short.raw DISK", "-- a2 -- -- 55 66 77 88"),
        ("dd if=new.raw of=DISK bs=64k count=1 status=none", "91 22 33 44 55 66 77 88"),
        (": > DISK", "11 22 33 44 55 66 77 88"),
        ("truncate -s 512K DISK", "11 22 33 44 55 66 77 88"),
    ] {
        let s = scratch();
        let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
        // The kernel has all of it in its cache.
        assert!(mounted.bytes() == bytes("11 22 33 44 55 66 77 88"));
        let script = line.replace("DISK", "cow.qcow2.mnt/disk.raw");
        let ended = s.run_args("bash", &["-c", &script]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{line}");
        assert!(mounted.bytes() == bytes(expected), "{line}");
        mounted.unmount();
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == bytes(expected), "{line}, afterwards");
        s.check_clean("cow.qcow2");
    }
}

#[test]
fn zeros_come_where_an_emptied_file_has_gaps_and_nowhere_else() {
    let s = scratch();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let mut expected = bytes("11 22 33 44 55 66 77 88");
    assert!(mounted.bytes() == expected);
    let emptied = File::options().write(true).truncate(true).open(mounted.path("disk.raw")).unwrap();
    let other = File::options().write(true).open(mounted.path("disk.raw")).unwrap();
    // Gaps that begin and end within pages.
    for (at, length) in [(1000, 10), (5001, 9000), (20_000, 70_000), (3000, 5)] {
        emptied.write_all_at(&vec![0xee; length], at as u64).unwrap();
        expected[at..at + length].fill(0xee);
    }
    expected[..1000].fill(0);
    expected[1010..3000].fill(0);
    expected[3005..5001].fill(0);
    expected[14_001..20_000].fill(0);
    // Who has not emptied it writes as ever.
    other.write_all_at(&[0xdd; 7], 300_000).unwrap();
    expected[300_000..300_007].fill(0xdd);
    assert_eq!(emptied.metadata().unwrap().len(), expected.len() as u64);
    drop(emptied);
    assert!(mounted.bytes() == expected);
    drop(other);
    mounted.unmount();
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == expected);
}

#[test]
fn times_can_be_set_and_what_is_the_same_already() {
    let s = scratch();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let disk = mounted.path("disk.raw");
    let modified = || std::fs::metadata(&disk).unwrap().mtime();
    s.ok("touch", &format!("-d @1000000000 {}", disk.display()));
    assert_eq!(modified(), 1_000_000_000);
    s.ok("touch", &format!("-d @1100000000 {}", mounted.path("ctl/backing").display()));
    s.ok("chmod", &format!("644 {}", disk.display()));
    s.ok("chown", &format!("0:0 {}", disk.display()));
    assert_eq!(modified(), 1_000_000_000);
    for line in ["chmod 600", "chown 1:1"] {
        let said = mounted.shell(&format!("LC_ALL=C {line} disk.raw"));
        assert!(said.0 == Some(1) && said.1.contains("Operation not permitted"), "{line}: {}", said.1);
    }
    let writer = File::options().write(true).open(&disk).unwrap();
    writer.write_all_at(b"x", 0).unwrap();
    assert!(modified() > 1_100_000_000);
    drop(writer);
    s.ok("touch", &format!("-r new.raw {}", disk.display()));
    // The same time and size: nothing to do.
    assert_eq!(s.ok("rsync", &format!("-ai --inplace new.raw {}", disk.display())), "");
    // Others than the writer of the disk cannot be dated.
    let said = mounted.shell("LC_ALL=C touch -d @1 layers/1.raw");
    assert!(said.0 == Some(1) && said.1.contains("Read-only file system"), "{}", said.1);
}
