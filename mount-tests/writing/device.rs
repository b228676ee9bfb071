//! A file system made and used on a loop device over the mounted disk.

use std::path::Path;

use crate::mounted::{Mounted, is_running, wait_until};
use crate::scratch::{AS_NOBODY, AS_ROOT, LoopDevice, LoopMount, Scratch, rebasefs};

/// An overlay of 96 MiB, with a snapshot of an empty disk.
fn overlay(s: &Scratch) {
    s.qemu_img("create -q -f raw base.raw 96M");
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    s.qemu_img("snapshot -c empty cow.qcow2");
}

/// Some hundred files of this project.
fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
}

fn copy_sources(s: &Scratch, to: &Path) {
    s.ok("cp", &format!("-a {} {}", sources().display(), to.display()));
}

fn demand_same_sources(s: &Scratch, copy: &Path) {
    s.ok("diff", &format!("-r {} {}", sources().display(), copy.display()));
}

#[test]
fn a_file_system_on_a_loop_device_is_whole_in_the_image() {
    let s = Scratch::new();
    overlay(&s);
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let device = LoopDevice::attach(&mounted.path("disk.raw"));
    s.ok("mkfs.ext4", &format!("-q {}", device.path()));
    drop(device);
    for round in ["first", "second"] {
        let guest = LoopMount::new(&s, &mounted.path("disk.raw"), "discard");
        copy_sources(&s, &guest.path().join(round));
        s.ok("fstrim", &guest.path().display().to_string());
    }
    let guest = LoopMount::new(&s, &mounted.path("disk.raw"), "discard");
    demand_same_sources(&s, &guest.path().join("first"));
    std::fs::remove_dir_all(guest.path().join("first")).unwrap();
    drop(guest);
    s.ok("e2fsck", &format!("-fn {}", mounted.path("disk.raw").display()));
    mounted.unmount();
    s.check_clean("cow.qcow2");
    s.qemu_img("convert -f qcow2 -O raw cow.qcow2 flat.raw");
    s.ok("e2fsck", "-fn flat.raw");
    let guest = LoopMount::new(&s, &s.path("flat.raw"), "ro");
    demand_same_sources(&s, &guest.path().join("second"));
    assert!(!guest.path().join("first").exists());
    drop(guest);
    s.qemu_img("convert -f qcow2 -l snapshot.name=empty -O raw cow.qcow2 empty.raw");
    s.same("empty.raw", "base.raw");
}

#[test]
fn what_a_file_system_has_synced_survives_a_killed_server() {
    let s = Scratch::new();
    overlay(&s);
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    s.ok("mkfs.ext4", &format!("-q -F {}", mounted.path("disk.raw").display()));
    let directory = s.path("guest");
    std::fs::create_dir(&directory).unwrap();
    s.ok("mount", &format!("-o loop {} {}", mounted.path("disk.raw").display(), directory.display()));
    copy_sources(&s, &directory.join("synced"));
    s.ok("sync", &format!("-f {}", directory.display()));
    copy_sources(&s, &directory.join("lost"));
    mounted.signal("KILL");
    wait_until("the server is dead", || !is_running(mounted.server()));
    s.run("umount", &format!("-l {}", directory.display()));
    s.run("umount", &format!("-l {}", s.path("cow.qcow2.mnt").display()));
    mounted.unmount();
    wait_until("the loop device lets go", || {
        let flat = s.run("losetup", "-a").stdout;
        !flat.contains("disk.raw") || !flat.contains(&s.path("").display().to_string())
    });
    let checked = s.run("qemu-img", "check -f qcow2 cow.qcow2");
    assert!(matches!(checked.code, Some(0 | 3)), "{}{}", checked.stdout, checked.stderr);
    s.qemu_img("convert -f qcow2 -O raw cow.qcow2 flat.raw");
    let replayed = s.run("e2fsck", "-fp flat.raw");
    assert!(matches!(replayed.code, Some(0 | 1)), "{}{}", replayed.stdout, replayed.stderr);
    s.ok("e2fsck", "-fn flat.raw");
    let guest = LoopMount::new(&s, &s.path("flat.raw"), "ro");
    demand_same_sources(&s, &guest.path().join("synced"));
}

/// `disk.sh`: made and filled by somebody while the disk is rebased underneath, then checked and compared.
fn live(as_whom: &[&str]) {
    let s = Scratch::new();
    copy_sources(&s, &s.path("source"));
    let ended = s.script(as_whom, "disk.sh", &[rebasefs(), &s.path("source").display().to_string()]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    println!("{}", ended.stdout);
    assert!(ended.stdout.ends_with("no difference\n"));
}

#[test]
fn root_fills_a_file_system_while_it_is_rebased_underneath() {
    live(AS_ROOT);
}

#[test]
fn an_ordinary_user_fills_a_file_system_while_it_is_rebased_underneath() {
    live(AS_NOBODY);
}
