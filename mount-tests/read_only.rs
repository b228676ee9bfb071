//! What cannot be written says so when it is opened for writing, not when the first write comes.

use crate::control::old_and_new;
use crate::mounted::Mounted;
use crate::scratch::{LoopDevice, LoopMount, Scratch};

const EROFS: Option<i32> = Some(30);

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

/// Root may open any file elsewhere; who is refused here falls back to reading.
#[test]
fn what_is_for_reading_cannot_be_opened_for_writing() {
    let s = old_and_new();
    s.qemu_img("snapshot -c before cow.qcow2");
    for (options, disk) in [("", EROFS), ("--rw", None)] {
        let mounted = Mounted::with(&s, "cow.qcow2", options);
        let open = |name: &str, options: &std::fs::OpenOptions| {
            options.open(mounted.path(name)).err().and_then(|e| e.raw_os_error())
        };
        for name in ["layers/1.raw", "snapshots/before.raw", "ctl/status", "ctl/map", "ctl/chain"] {
            for truncate in [false, true] {
                let error = open(name, std::fs::File::options().write(true).truncate(truncate));
                assert_eq!(error, EROFS, "{name}");
            }
            let error = open(name, std::fs::File::options().read(true).write(true));
            assert_eq!(error, EROFS, "{name}");
            assert_eq!(open(name, std::fs::File::options().read(true)), None, "{name}");
        }
        for name in ["disk.raw", "layers/0.raw"] {
            assert_eq!(open(name, std::fs::File::options().read(true).write(true)), disk, "{name}");
        }
        assert_eq!(open("ctl/rebase", std::fs::File::options().write(true)), None);
    }
}

/// Without `-o ro`: mount(8) tries to write, and then does not.
#[test]
fn mount_falls_back_to_reading() {
    let s = Scratch::new();
    s.ok("mkdir", "files");
    s.write("files/hello", b"world\n");
    s.ok("mke2fs", "-q -t ext4 -d files fs.img 4M");
    s.write("layout", b"label: dos\nsize=1M\nsize=4M\n");
    s.ok("truncate", "-s 8M disk.img");
    s.ok("bash", "-c sfdisk${IFS}-q${IFS}disk.img<layout");
    s.ok("dd", "if=fs.img of=disk.img bs=1M seek=2 conv=notrunc status=none");
    s.qemu_img("convert -O qcow2 disk.img cow.qcow2");
    for options in ["", "--rw"] {
        let mounted = Mounted::with(&s, "cow.qcow2", options);
        let guest = LoopMount::new(&s, &mounted.path("partitions/2.raw"), "noatime");
        assert_eq!(std::fs::read(guest.path().join("hello")).unwrap(), b"world\n");
        assert_eq!(std::fs::write(guest.path().join("new"), "").unwrap_err().raw_os_error(), EROFS);
    }
}
