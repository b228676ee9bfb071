//! Full disks, real ones: what is acknowledged has its room, a failed rebase keeps what it has, and fsync
//! and the end of the mount tell the truth.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::mounted::Mounted;
use crate::scratch::{LoopDevice, LoopMount, Scratch, rebasefs};

const MIB: usize = 1 << 20;

/// `ENOSPC`.
const NO_SPACE: Option<i32> = Some(28);

fn leaks(s: &Scratch, image: &str) -> u64 {
    let said = s.run("qemu-img", &format!("check --output=json {image}"));
    assert!(matches!(said.code, Some(0 | 3)), "{}{}", said.stdout, said.stderr);
    let said: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(said["corruptions"].as_u64().unwrap_or(0), 0, "{said}");
    said["leaks"].as_u64().unwrap_or(0)
}

/// A file system of its own with a scratch directory in it.
struct Small {
    here: Scratch,
    _mount: LoopMount,
    _disk: Scratch,
}

fn small(bytes: usize) -> Small {
    let disk = Scratch::new();
    std::fs::File::create(disk.path("disk")).unwrap().set_len(bytes as u64).unwrap();
    disk.ok("mkfs.ext4", "-q -m 0 -O ^has_journal disk");
    let mount = LoopMount::new(&disk, &disk.path("disk"), "rw");
    Small { here: Scratch::within(mount.path()), _mount: mount, _disk: disk }
}

/// An overlay on a file system of 60 MiB, a base of 100 MiB elsewhere.
#[test]
fn a_flatten_that_fills_the_file_system_is_gone_on_with_where_it_stopped() {
    for options in ["cluster_size=4k", "cluster_size=64k"] {
        let elsewhere = Scratch::new();
        let bytes: Vec<u8> = (0..100 * MIB).map(|at| (at / 4096 * 31 + at % 251) as u8 | 1).collect();
        elsewhere.write("base.raw", &bytes);
        let small = small(60 * MIB);
        let s = &small.here;
        // What is in the way.
        s.write("filler", &vec![0xff; 16 * MIB]);
        let base = elsewhere.path("base.raw").display().to_string();
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b {base} -F raw cow.qcow2 40M"));
        let said = s.rebasefs_fails(1, "rebase --backing= cow.qcow2");
        assert!(said.contains("No space left on device") && said.contains("not copied twice"), "{said}");
        let leaked = leaks(s, "cow.qcow2");
        assert!(leaked <= 16, "{options}: {leaked} clusters have leaked");
        let map = s.qemu_img("map --output=json cow.qcow2");
        let map: Vec<Value> = serde_json::from_str(&map).unwrap();
        let length = |extent: &Value| extent["length"].as_u64().unwrap();
        let kept: u64 = map.iter().filter(|extent| extent["depth"] == 0).map(length).sum();
        assert!(kept > 20 << 20, "{options}: only {kept} bytes were kept");
        assert!(s.qemu_img("info cow.qcow2").contains("base.raw"));
        std::fs::remove_file(s.path("filler")).unwrap();
        let said = s.rebasefs("rebase --output=json --backing= cow.qcow2");
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["copied"].as_u64().unwrap() + kept, 40 << 20, "{said}");
        let flat = elsewhere.path("flat.raw");
        s.qemu_img(&format!("convert -f qcow2 -O raw cow.qcow2 {}", flat.display()));
        assert!(std::fs::read(flat).unwrap() == bytes[..40 * MIB]);
        s.qemu_img("check -q -r leaks cow.qcow2");
    }
}

/// Writes pieces of 4 KiB until there is no more room; how many were acknowledged.
fn fill(mounted: &Mounted) -> u64 {
    let disk = OpenOptions::new().write(true).open(mounted.path("disk.raw")).unwrap();
    for number in 0.. {
        if let Err(error) = disk.write_all_at(&[piece(number); 4096], number * 4096) {
            assert_eq!(error.raw_os_error(), NO_SPACE, "{error}");
            disk.sync_all().unwrap();
            return number;
        }
    }
    unreachable!("the disk is larger than what it lies on")
}

fn piece(number: u64) -> u8 {
    (number % 250 + 1) as u8
}

/// All that was acknowledged is in the image, and room can be made by the guest.
fn is_kept(s: &Scratch, image: &str, mounted: Mounted, acknowledged: u64) {
    let disk = OpenOptions::new().write(true).open(mounted.path("disk.raw")).unwrap();
    s.ok("fallocate", &format!("--punch-hole -o 0 -l 65536 {}", mounted.path("disk.raw").display()));
    disk.sync_all().unwrap();
    disk.write_all_at(&[0xee; 4096], 4096).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    let mountpoint = mounted.path("").display().to_string();
    s.rebasefs(&format!("umount {mountpoint}"));
    mounted.unmount();
    s.qemu_img(&format!("check -q -f qcow2 {image}"));
    s.qemu_img(&format!("convert -f qcow2 -O raw {image} flat.raw"));
    let flat = std::fs::read(s.path("flat.raw")).unwrap();
    for number in 0..acknowledged {
        let expected = match number {
            1 => 0xee,
            0..16 => 0,
            _ => piece(number),
        };
        let found = &flat[number as usize * 4096..][..4096];
        assert!(found.iter().all(|byte| *byte == expected), "piece {number} of {acknowledged}");
    }
}

#[test]
fn all_that_is_acknowledged_on_a_full_tmpfs_is_kept() {
    let s = Scratch::new();
    std::fs::create_dir(s.path("full")).unwrap();
    s.ok("mount", &format!("-t tmpfs -o size=1280k none {}", s.path("full").display()));
    let _taken_down = Unmounted(&s);
    s.qemu_img("create -q -f qcow2 -o cluster_size=512 full/cow.qcow2 8M");
    let mounted = Mounted::with(&s, "full/cow.qcow2", "--rw");
    // The mount point lies on the tmpfs, too, and takes nothing.
    let acknowledged = fill(&mounted);
    assert!(acknowledged > 250, "only {acknowledged} pieces");
    is_kept(&s, "full/cow.qcow2", mounted, acknowledged);
}

/// Takes down what is mounted on `full`.
struct Unmounted<'a>(&'a Scratch);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        self.0.run("umount", "--lazy full");
    }
}

#[test]
fn all_that_is_acknowledged_on_a_block_device_that_ends_is_kept() {
    let s = Scratch::new();
    std::fs::File::create(s.path("disk")).unwrap().set_len(128 << 10).unwrap();
    let device = LoopDevice::attach(&s.path("disk"));
    s.qemu_img(&format!("create -q -f qcow2 -o cluster_size=512 {} 8M", device.path()));
    std::fs::create_dir(s.path("device.mnt")).unwrap();
    let mountpoint = s.path("device.mnt");
    s.rebasefs(&format!("mount --rw -f qcow2 {} {}", device.path(), mountpoint.display()));
    let mounted = Mounted::found(mountpoint);
    let acknowledged = fill(&mounted);
    assert!(acknowledged >= 24, "only {acknowledged} pieces");
    is_kept(&s, device.path(), mounted, acknowledged);
}

#[test]
fn after_a_rebase_that_ran_out_of_room_the_guest_writes_on() {
    let elsewhere = Scratch::new();
    elsewhere.write("base.raw", &vec![0x11; 32 * MIB]);
    elsewhere.write("new.raw", &vec![0x22; 32 * MIB]);
    let small = small(16 * MIB);
    let s = &small.here;
    let base = elsewhere.path("base.raw").display().to_string();
    s.qemu_img(&format!("create -q -f qcow2 -b {base} -F raw cow.qcow2"));
    let mounted = Mounted::with(s, "cow.qcow2", "--rw");
    let error = mounted.rebase(elsewhere.path("new.raw").to_str().unwrap()).unwrap_err();
    assert_eq!(error.raw_os_error(), NO_SPACE, "{error}");
    let disk = OpenOptions::new().write(true).open(mounted.path("disk.raw")).unwrap();
    // What was copied has its place.
    disk.write_all_at(b"hello", 0).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    mounted.unmount();
    assert!(leaks(s, "cow.qcow2") <= 16);
    let expected = [b"hello".as_slice(), &vec![0x11; 32 * MIB - 5]].concat();
    s.qemu_img(&format!("convert -f qcow2 -O raw cow.qcow2 {}", elsewhere.path("flat.raw").display()));
    assert!(std::fs::read(elsewhere.path("flat.raw")).unwrap() == expected);
}

/// As many snapshots as a refcount can count, and more than it can count with the active disk.
#[test]
fn a_refcount_that_cannot_count_all_views_is_no_obstacle() {
    for (bits, snapshots) in [(1, 1), (2, 3), (2, 4), (4, 15), (4, 17)] {
        let s = Scratch::new();
        s.write("base.raw", &vec![0x11; MIB]);
        s.write("new.raw", &vec![0x22; MIB]);
        s.qemu_img(&format!("create -q -f qcow2 -o refcount_bits={bits} -b base.raw -F raw cow.qcow2"));
        for number in 0..snapshots {
            s.qemu_img(&format!("snapshot -c {number} cow.qcow2"));
        }
        let said = s.rebasefs("rebase --dry-run --output=json -b new.raw -F raw cow.qcow2");
        let promised: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(promised["copied"].as_u64(), Some(1 << 20), "{said}");
        let ended = s.run(rebasefs(), "rebase -b new.raw -F raw cow.qcow2");
        assert_eq!(ended.code, Some(0), "{bits} bits, {snapshots} snapshots: {}", ended.stderr);
        s.check_clean("cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; MIB]);
        for number in 0..snapshots {
            s.qemu_img(&format!("convert -f qcow2 -l snapshot.name={number} -O raw cow.qcow2 old.raw"));
            assert!(std::fs::read(s.path("old.raw")).unwrap() == vec![0x11; MIB], "{bits} bits: {number}");
        }
    }
}
