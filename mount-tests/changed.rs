//! Somebody changes a backing file while it is in use: the mount says so, and a rebase does not
//! swap the header.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::control::{draw_old_and_new, old_and_new};
use crate::mounted::{Mounted, wait_until};
use crate::scratch::{LoopMount, Scratch};
use crate::traced::{At, let_go_on};

const CLUSTER: usize = 65536;
const REBASE: &str = "rebase -b new.raw -F raw cow.qcow2";

/// Writes what is there already.
fn write_again(s: &Scratch, name: &str) {
    let first = std::fs::read(s.path(name)).unwrap()[..512].to_vec();
    s.poke(name, 0, &first);
}

/// Puts a copy of a file in its place.
fn replace(s: &Scratch, name: &str) {
    s.ok("cp", &format!("{name} copy"));
    s.ok("mv", &format!("copy {name}"));
}

/// What somebody does to a backing file, and the words for it.
type Deed = (&'static str, fn(&Scratch, &str));

const DEEDS: [Deed; 4] = [
    (", mtime 20", write_again),
    ("size 458752, mtime 20", |s, name| s.cut(name, CLUSTER as u64)),
    ("replaced by another file", replace),
    ("not there any more", |s, name| drop(s.ok("mv", &format!("{name} elsewhere")))),
];

#[test]
fn a_backing_file_that_has_changed_is_named_in_status_and_once_in_the_log() {
    for (words, deed) in DEEDS.into_iter().chain([("ctime 20", touch as fn(&Scratch, &str))]) {
        let s = old_and_new();
        s.qemu_img("create -q -f qcow2 -b base.raw -F raw middle.qcow2");
        s.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
        let mounted = Mounted::with(&s, "top.qcow2", &format!("--log {}", s.path("log").display()));
        let _ = mounted.bytes();
        assert_eq!(mounted.status("changed"), "");
        deed(&s, "base.raw");
        let changed = format!("{} (", s.path("base.raw").display());
        for _ in 0..3 {
            let said = mounted.status("changed");
            assert!(said.starts_with(&changed) && said.contains(words), "{words}: {said}");
        }
        let log = std::fs::read_to_string(s.path("log")).unwrap();
        assert_eq!(log.matches("has changed while it is mounted").count(), 1, "{log}");
        // Nothing is the matter with another file.
        std::fs::write(mounted.path("ctl/rebase"), "-u -F raw -b new.raw\n").unwrap();
        assert_eq!((mounted.status("changed"), mounted.status("state")), (String::new(), "done".to_owned()));
        mounted.unmount();
        s.check_clean("top.qcow2");
    }
}

fn touch(s: &Scratch, name: &str) {
    s.ok("chmod", &format!("600 {name}"));
}

/// Runs a rebase, to whose backing files somebody does this when it has begun to write: exit code
/// and standard error.
fn rebased_meanwhile(s: &Scratch, deed: impl FnOnce()) -> (Option<i32>, String) {
    let size = || s.path("cow.qcow2").metadata().unwrap().len();
    let before = size();
    let at = At { system_call: "pwrite64", number: 1, signal: "STOP" };
    let mut rebase = at.command(&s.path(""), REBASE);
    let mut rebase = rebase.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("something is written", || size() != before);
    deed();
    let code = let_go_on(rebase.id(), &mut rebase).code();
    let mut said = String::new();
    rebase.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (code, said)
}

#[test]
fn a_rebase_does_not_swap_onto_what_changed_meanwhile() {
    for (words, deed) in DEEDS {
        for name in ["base.raw", "new.raw"] {
            // Our own copy of the old one is open.
            let is_harmless =
                name == "base.raw" && ["replaced", "not there"].iter().any(|w| words.starts_with(w));
            let s = old_and_new();
            let (whole, before) = (std::fs::read(s.path(name)).unwrap(), s.guest_bytes("qcow2", "cow.qcow2"));
            let (code, said) = rebased_meanwhile(&s, || deed(&s, name));
            if is_harmless {
                assert_eq!((code, said.as_str()), (Some(0), ""), "{name}: {words}");
                assert!(s.guest_bytes("qcow2", "cow.qcow2") == before, "{name}: {words}");
                continue;
            }
            assert_eq!(code, Some(1), "{name}: {words}: {said}");
            let is_named = said.contains(&format!("{name} (")) && said.contains(words);
            let is_explained = said.contains("has changed while it was being compared")
                && said.contains("(nobody may write to a backing file; when nobody does, start it again)");
            assert!(is_named && is_explained || said.contains("cut short"), "{name}: {words}: {said}");
            assert!(s.qemu_img("info cow.qcow2").contains("backing file: base.raw"));
            s.check_clean("cow.qcow2");
            s.write(name, &whole);
            assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
            s.rebasefs(REBASE);
            assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
        }
    }
}

#[test]
fn a_new_mode_or_a_look_does_not_stop_a_rebase() {
    let s = old_and_new();
    let ended = rebased_meanwhile(&s, || {
        touch(&s, "base.raw");
        s.ok("ln", "new.raw link");
        s.ok("cat", "base.raw new.raw");
    });
    assert_eq!(ended, (Some(0), String::new()));
}

/// Writes as somebody who sets the modification time back.
fn write_secretly(s: &Scratch, name: &str, at: u64, byte: u8) {
    let modified = std::fs::metadata(s.path(name)).unwrap().modified().unwrap();
    s.poke(name, at, &[byte; 512]);
    let file = std::fs::File::options().write(true).open(s.path(name)).unwrap();
    file.set_times(std::fs::FileTimes::new().set_modified(modified)).unwrap();
}

/// The change time moves, and all is compared again: the first clusters were compared before.
#[test]
fn a_write_that_sets_the_time_back_is_compared_again() {
    let s = old_and_new();
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let equal = equal_cluster(&s);
    let ended = rebased_meanwhile(&s, || write_secretly(&s, "new.raw", equal * CLUSTER as u64, 0xee));
    assert_eq!(ended, (Some(0), String::new()));
    s.check_clean("cow.qcow2");
    assert!(s.qemu_img("info cow.qcow2").contains("backing file: new.raw"));
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
}

/// A cluster of data in which old and new backing file are equal.
fn equal_cluster(s: &Scratch) -> u64 {
    let [old, new] = ["base.raw", "new.raw"].map(|name| std::fs::read(s.path(name)).unwrap());
    let pairs = old.chunks(CLUSTER).zip(new.chunks(CLUSTER));
    let place = pairs.into_iter().position(|(old, new)| old == new && old[0] != 0);
    place.expect("a cluster that is equal") as u64
}

/// What was packed for everybody to build alike has a time of 0, which is a time.
#[test]
fn a_write_to_a_file_from_1970_is_seen() {
    for name in ["base.raw", "new.raw"] {
        let s = old_and_new();
        for name in ["base.raw", "new.raw"] {
            s.ok("touch", &format!("-d @0 {name}"));
        }
        let (code, said) = rebased_meanwhile(&s, || write_again(&s, name));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("has changed while it was being compared"), "{said}");
    }
}

/// Times are whole seconds there: a write in the second of the last one moves none of them.
#[test]
fn a_write_in_the_same_second_is_seen_where_times_are_whole_seconds() {
    let disk = Scratch::new();
    disk.write("disk", &[]);
    std::fs::File::options().write(true).open(disk.path("disk")).unwrap().set_len(64 << 20).unwrap();
    disk.ok("mkfs.ext4", "-q -I 128 disk");
    let mount = LoopMount::new(&disk, &disk.path("disk"), "rw");
    for name in ["base.raw", "new.raw"] {
        let s = Scratch::within(mount.path());
        draw_old_and_new(&s);
        let (code, said) = rebased_meanwhile(&s, || write_again(&s, name));
        assert_eq!(code, Some(1), "{name}: {said}");
        assert!(said.contains("has changed while it was being compared"), "{name}: {said}");
        assert!(s.qemu_img("info cow.qcow2").contains("backing file: base.raw"));
    }
}

/// A process that has mapped a file, and writes to the same page of it each time that it is told to.
struct Mapped(Child);

impl Mapped {
    fn new(path: &Path) -> Self {
        let script = "import mmap, sys\n\
                      file = open(sys.argv[1], 'r+b')\n\
                      page = mmap.mmap(file.fileno(), 4096)\n\
                      for number in iter(lambda: sys.stdin.buffer.read(1), b''):\n    \
                          page[100:101] = number\n    \
                          print('.', end='', flush=True)\n";
        let mut python = Command::new("python3");
        let python = python.args(["-c", script]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self(python.spawn().expect("python3 is needed; scripts/test installs it"))
    }

    fn write(&mut self, byte: u8) {
        self.0.stdin.as_mut().unwrap().write_all(&[byte]).unwrap();
        self.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Somebody has mapped the file and written to a page of it. What he writes there next moves no time unless
/// the page was written back.
#[test]
fn a_write_through_an_old_mapping_is_seen() {
    let disk = Scratch::new();
    disk.write("disk", &[]);
    std::fs::File::options().write(true).open(disk.path("disk")).unwrap().set_len(64 << 20).unwrap();
    disk.ok("mkfs.ext4", "-q disk");
    let mount = LoopMount::new(&disk, &disk.path("disk"), "rw");
    for name in ["base.raw", "new.raw"] {
        let s = Scratch::within(mount.path());
        draw_old_and_new(&s);
        let mut mapped = Mapped::new(&s.path(name));
        mapped.write(b'1');
        let (code, said) = rebased_meanwhile(&s, || mapped.write(b'2'));
        assert_eq!(code, Some(1), "{name}: {said}");
        assert!(said.contains("has changed while it was being compared"), "{name}: {said}");
    }
}
