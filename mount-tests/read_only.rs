//! What cannot be written says so when it is opened for writing, not when the first write comes.

use crate::control::old_and_new;
use crate::mounted::Mounted;
use crate::scratch::{LoopDevice, Scratch};

/// `cow.qcow2` on a device that refuses writes, and what it holds.
fn on_read_only_device(s: &Scratch) -> (LoopDevice, Vec<u8>) {
    let base = s.path("base.raw");
    s.qemu_img(&format!("rebase -u -b {} -F raw cow.qcow2", base.display()));
    // A device has whole sectors only.
    s.ok("truncate", "-s %4096 cow.qcow2");
    (LoopDevice::with(&s.path("cow.qcow2"), &["-r"]), std::fs::read(s.path("cow.qcow2")).unwrap())
}

#[test]
fn a_read_only_device_is_refused_before_anything_is_begun() {
    let s = old_and_new();
    let (device, before) = on_read_only_device(&s);
    let (device, new) = (device.path(), s.path("new.raw"));
    std::fs::create_dir(s.path("mnt")).unwrap();
    for line in [
        format!("mount --rw {device} mnt"),
        format!("rebase -b {} -F raw {device}", new.display()),
        format!("rebase -u -b {} -F raw {device}", new.display()),
        format!("check -r all {device}"),
        format!("create -f qcow2 {device} 1M"),
    ] {
        let said = s.rebasefs_fails(1, &line);
        assert!(said.contains(&format!("{device}: the block device is read-only")), "{line}: {said}");
    }
    s.rebasefs(&format!("rebase --dry-run -b {} -F raw {device}", new.display()));
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == before);
}

#[test]
fn an_image_on_a_read_only_device_is_mounted_for_reading() {
    let s = old_and_new();
    let expected = s.guest_bytes("qcow2", "cow.qcow2");
    let (device, before) = on_read_only_device(&s);
    let mountpoint = s.path("mnt");
    std::fs::create_dir(&mountpoint).unwrap();
    s.rebasefs(&format!("mount {} {}", device.path(), mountpoint.display()));
    let mounted = Mounted::found(mountpoint);
    assert!(mounted.bytes() == expected);
    let error = mounted.rebase(&s.path("new.raw").display().to_string()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(mounted.status("error").contains("the block device is read-only"), "{}", mounted.says("status"));
    mounted.unmount();
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == before);
}
