//! A disk never comes to stand on itself, through however many devices, file systems and mounts.

use std::path::Path;

use super::old_and_new;
use crate::control::names::refused;
use crate::mounted::Mounted;
use crate::rebase::backing_of;
use crate::scratch::{Ended, LoopDevice, Scratch, rebasefs};

const LOOP: &str = "Too many levels of symbolic links";

/// Every way to make `name` the backing file of the mounted `cow.qcow2` is refused, and nothing changes.
fn is_refused_in_every_way(s: &Scratch, mounted: &Mounted, name: &str) {
    let before = mounted.bytes();
    let error = refused(s, mounted, name, LOOP);
    assert!(error.contains("stand"), "{error}");
    for (file, line) in [
        ("rebase", format!("-F raw -b {name}")),
        ("rebase", format!("--dry-run -F raw -b {name}")),
        ("rebase", format!("-u -F raw -b {name}")),
        ("difference", name.to_owned()),
    ] {
        let error = std::fs::write(mounted.path("ctl").join(file), format!("{line}\n")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(40), "{line}: {error}, {}", mounted.says("status"));
    }
    assert!(mounted.bytes() == before, "other bytes");
    assert_eq!(mounted.says("backing"), "base.raw\n");
}

#[test]
fn a_loop_device_on_the_mounted_disk_is_refused() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    let device = LoopDevice::attach(&mounted.path("disk.raw"));
    is_refused_in_every_way(&s, &mounted, device.path());
    // Through a second one, and through an overlay on it.
    let above = LoopDevice::attach(Path::new(device.path()));
    is_refused_in_every_way(&s, &mounted, above.path());
    s.qemu_img(&format!("create -q -u -f qcow2 -b {} -F raw over.qcow2 512k", above.path()));
    let error = refused(&s, &mounted, "over.qcow2", LOOP);
    assert!(error.contains("stands on this mount"), "{error}");
}

#[test]
fn a_file_on_a_file_system_in_the_mounted_disk_is_refused() {
    let s = Scratch::new();
    s.qemu_img("create -q -f raw base.raw 16M");
    s.ok("mkfs.ext4", "-q base.raw");
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let guest = crate::scratch::LoopMount::new(&s, &mounted.path("disk.raw"), "rw");
    let inside = guest.path().join("inside.raw");
    std::fs::write(&inside, vec![0x11; 1 << 20]).unwrap();
    let name = inside.display().to_string();
    let error = std::fs::write(mounted.path("ctl/backing"), format!("{name}\n")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(40), "{error}");
    assert!(mounted.status("error").contains("stands on this mount"), "{}", mounted.says("status"));
    assert_eq!(mounted.says("backing"), "base.raw\n");
    drop(guest);
}

/// One on `base.raw`, the other on `new.raw`.
fn two() -> (Scratch, Mounted, Mounted) {
    let s = old_and_new();
    s.qemu_img("create -q -f qcow2 -b new.raw -F raw other.qcow2");
    let (one, other) = (Mounted::new(&s, "cow.qcow2"), Mounted::new(&s, "other.qcow2"));
    (s, one, other)
}

#[test]
fn two_mounts_do_not_come_to_stand_on_each_other() {
    let (s, one, other) = two();
    // One may stand on the other, and is told what that means.
    let bytes = one.bytes();
    one.rebase("other.qcow2.mnt/disk.raw").unwrap();
    assert!(one.bytes() == bytes);
    let before = other.bytes();
    let error = other.rebase("cow.qcow2.mnt/disk.raw").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(40), "{error}");
    assert!(other.status("error").contains("stands on this mount"), "{}", other.says("status"));
    // Neither through a device, nor by the name alone, nor through a third one.
    let device = LoopDevice::attach(&one.path("disk.raw"));
    let third = s.rebasefs(&format!("create -q -f qcow2 -b {} -F raw third.qcow2", device.path()));
    assert_eq!(third, "");
    let third = Mounted::new(&s, "third.qcow2");
    for line in [
        format!("-F raw -b {}", device.path()),
        format!("-u -F raw -b {}", device.path()),
        "-F raw -b third.qcow2.mnt/disk.raw".to_owned(),
        "-u -F raw -b third.qcow2.mnt/layers/1.raw".to_owned(),
    ] {
        let error = std::fs::write(other.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(40), "{line}: {error}");
    }
    assert!(third.bytes() == bytes && one.bytes() == bytes && other.bytes() == before);
    // The last first: each holds the disk of the one before.
    drop(third);
    drop(device);
    drop(one);
    drop(other);
}

#[test]
fn who_stands_on_another_mount_is_warned() {
    let (s, one, other) = two();
    drop(one);
    let bytes = s.guest_bytes("qcow2", "cow.qcow2");
    let Ended { code, stderr, .. } = s.run(rebasefs(), "rebase -F raw -b other.qcow2.mnt/disk.raw cow.qcow2");
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stderr.matches("lies in another mount of rebasefs").count(), 1, "{stderr}");
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == bytes);
    drop(other);
}

#[test]
fn without_a_mount_an_image_does_not_come_to_stand_on_itself_either() {
    let s = old_and_new();
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    let device = LoopDevice::attach(&s.path("cow.qcow2"));
    let above = LoopDevice::attach(Path::new(device.path()));
    s.qemu_img(&format!("create -q -u -f qcow2 -b {} -F raw over.qcow2 512k", above.path()));
    for name in [device.path(), above.path(), "over.qcow2"] {
        let format = if name == "over.qcow2" { "qcow2" } else { "raw" };
        for line in [
            format!("rebase -F {format} -b {name} cow.qcow2"),
            format!("rebase -u -F {format} -b {name} cow.qcow2"),
            format!("rebase --dry-run -F {format} -b {name} cow.qcow2"),
            format!("create -q -f qcow2 -F {format} -b {name} cow.qcow2"),
        ] {
            let said = s.rebasefs_fails(1, &line);
            assert!(said.contains("the disk would stand on itself"), "{line}: {said}");
            assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image, "{line}: the image has changed");
        }
    }
    // Made by somebody who does not look.
    s.qemu_img(&format!("rebase -u -f qcow2 -F raw -b {} cow.qcow2", above.path()));
    for line in ["map cow.qcow2", "compare cow.qcow2 base.raw", "info --backing-chain cow.qcow2"] {
        let ended = s.run(rebasefs(), line);
        assert!(
            ended.code != Some(0) && ended.stderr.contains("stand on itself"),
            "{line}: {}",
            ended.stderr
        );
    }
    s.ok("mkdir", "mnt");
    let said = s.rebasefs_fails(1, "mount cow.qcow2 mnt");
    assert!(said.contains("stand on itself"), "{said}");
}

/// The file system that an image lies on, as its backing file.
#[test]
fn what_an_image_lies_on_is_no_backing_file_of_it() {
    let s = Scratch::new();
    s.qemu_img("create -q -f raw disk.img 16M");
    s.ok("mkfs.ext4", "-q disk.img");
    s.qemu_img("create -q -f raw base.raw 1M");
    let guest = crate::scratch::LoopMount::new(&s, &s.path("disk.img"), "rw");
    let (image, base, disk) = (guest.path().join("cow.qcow2"), s.path("base.raw"), s.path("disk.img"));
    let (image, base, disk) = (image.display(), base.display(), disk.display());
    let said = s.rebasefs_fails(1, &format!("create -q -f qcow2 -F raw -b {disk} {image}"));
    assert!(said.contains("what the image itself lies on"), "{said}");
    s.rebasefs(&format!("create -q -f qcow2 -F raw -b {base} {image}"));
    for verb in ["rebase", "rebase -u"] {
        let said = s.rebasefs_fails(1, &format!("{verb} -F raw -b {disk} {image}"));
        assert!(said.contains("what the image itself lies on"), "{said}");
    }
    assert_eq!(backing_of(&s, &image.to_string()).0, Some(base.to_string()));
    drop(guest);
}

/// Two partitions of one device are two files; so are an image and its base on one file system in a file.
#[test]
fn what_shares_its_ground_is_no_circle() {
    let s = old_and_new();
    s.qemu_img("create -q -f raw disk.img 64M");
    s.ok("mkfs.ext4", "-q disk.img");
    let guest = crate::scratch::LoopMount::new(&s, &s.path("disk.img"), "rw");
    for name in ["base.raw", "new.raw", "cow.qcow2"] {
        std::fs::copy(s.path(name), guest.path().join(name)).unwrap();
    }
    let device = LoopDevice::attach(&guest.path().join("new.raw"));
    let image = guest.path().join("cow.qcow2");
    let bytes = s.guest_bytes("qcow2", &image.display().to_string());
    s.rebasefs(&format!("rebase -F raw -b {} {}", device.path(), image.display()));
    s.rebasefs(&format!("rebase -F raw -b new.raw {}", image.display()));
    s.rebasefs(&format!("rebase -F raw -b {} {}", s.path("new.raw").display(), image.display()));
    assert!(s.guest_bytes("qcow2", &image.display().to_string()) == bytes);
    drop(device);
    drop(guest);
}
