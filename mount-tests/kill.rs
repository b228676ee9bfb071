//! A rebase that is killed or refused its space at every write: the image reads as before, and the
//! rebase can be started again.

use std::process::Command;

use serde_json::Value;

use crate::interrupted::{held, large};
use crate::mounted::{Mounted, is_running, wait_until};
use crate::scratch::{Scratch, rebasefs};
use crate::traced::{At, failing, injecting, on_one_processor};

const REBASE: &str = "rebase -b new.raw -F raw cow.qcow2";

/// Options, bytes of a cluster, and whether there is a snapshot.
const SHAPES: [(&str, usize, bool); 6] = [
    ("compat=0.10", 65536, false),
    ("compat=0.10,cluster_size=4k", 4096, true),
    ("cluster_size=64k", 65536, true),
    ("cluster_size=512", 512, false),
    ("cluster_size=512,refcount_bits=64", 512, true),
    ("extended_l2=on,cluster_size=16k", 16384, true),
];

/// An overlay that can be put back as it was, and what a guest must see of it at any time.
struct Case {
    scratch: Scratch,
    fresh: Vec<u8>,
    truth: Vec<Vec<u8>>,
    has_snapshot: bool,
}

impl Case {
    /// ```text
    /// base:     11 22 -- 44 55 66 -- -- 99 aa
    /// new:      11 -- 33 44 77 66 -- 88 -- 22
    /// snapshot: -- -- -- -- -- cc -- -- -- --
    /// overlay:  -- -- -- dd -- cc -- -- -- --
    /// ```
    fn new((options, cluster, has_snapshot): (&str, usize, bool)) -> Self {
        let scratch = Scratch::new();
        scratch.draw_raw("base.raw", cluster, "11 22 -- 44 55 66 -- -- 99 aa");
        scratch.draw_raw("new.raw", cluster, "11 -- 33 44 77 66 -- 88 -- 22");
        scratch.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw cow.qcow2"));
        scratch.draw("cow.qcow2", cluster, "-- -- -- -- -- cc -- -- -- --");
        if has_snapshot {
            scratch.qemu_img("snapshot -c s cow.qcow2");
        }
        scratch.draw("cow.qcow2", cluster, "-- -- -- dd -- -- -- -- -- --");
        let fresh = std::fs::read(scratch.path("cow.qcow2")).unwrap();
        let case = Self { scratch, fresh, truth: Vec::new(), has_snapshot };
        Self { truth: case.views(), ..case }
    }

    fn all() -> impl Iterator<Item = Self> {
        SHAPES.into_iter().map(Self::new)
    }

    /// The bytes of the disk, then those of the snapshot.
    fn views(&self) -> Vec<Vec<u8>> {
        let s = &self.scratch;
        let mut views = vec![s.guest_bytes("qcow2", "cow.qcow2")];
        if self.has_snapshot {
            s.qemu_img("convert -f qcow2 -l snapshot.name=s -O raw cow.qcow2 snapshot.raw");
            views.push(std::fs::read(s.path("snapshot.raw")).unwrap());
        }
        views
    }

    fn start_afresh(&self) {
        self.scratch.write("cow.qcow2", &self.fresh);
    }

    /// Same bytes; no errors, leaks at most.
    fn is_sound(&self, when: &str) {
        let checked = self.scratch.run("qemu-img", "check -f qcow2 cow.qcow2");
        assert!(matches!(checked.code, Some(0 | 3)), "{when}: {}{}", checked.stdout, checked.stderr);
        assert!(self.views() == self.truth, "{when}: guest bytes have changed");
    }

    /// Rebases to the end; returns how many bytes were copied or zeroed.
    fn rebase(&self, when: &str) -> u64 {
        let said = self.scratch.rebasefs(&format!("{REBASE} --output=json"));
        self.is_sound(when);
        assert!(self.scratch.qemu_img("info cow.qcow2").contains("backing file: new.raw"), "{when}");
        let report: Value = serde_json::from_str(&said).unwrap();
        report["copied"].as_u64().unwrap() + report["zeroed"].as_u64().unwrap()
    }

    /// Rebases, killed at each call of this kind in turn; returns what each second try had to copy.
    fn killed_at_each(&self, system_call: &'static str) -> Vec<u64> {
        let mut copied = Vec::new();
        loop {
            self.start_afresh();
            let at = At { system_call, number: copied.len() + 1, signal: "KILL" };
            let output = at.command(&self.scratch.path(""), REBASE).output().unwrap();
            match output.status.code() {
                None => {}
                Some(0) => return copied,
                Some(_) => panic!("{at:?}: {}", String::from_utf8_lossy(&output.stderr)),
            }
            self.is_sound(&format!("{at:?}"));
            copied.push(self.rebase(&format!("after {at:?}")));
        }
    }

    /// Kills the server there, which rebases under a mount; what a second mount's rebase has to copy.
    /// `None` if there is no such call.
    fn killed_under_the_mount(&self, at: At) -> Option<u64> {
        let s = &self.scratch;
        self.start_afresh();
        let mountpoint = s.path("mnt");
        let mut mount = on_one_processor();
        let mount = mount.args([rebasefs(), "mount", "cow.qcow2"]).arg(&mountpoint).current_dir(s.path(""));
        assert!(mount.status().unwrap().success());
        let mounted = Mounted::found(mountpoint);
        at.attach(mounted.server());
        if mounted.rebase("new.raw").is_ok() {
            return None;
        }
        wait_until("the server is dead", || !is_running(mounted.server()));
        mounted.unmount();
        self.is_sound(&format!("{at:?}"));
        let again = Mounted::new(s, "cow.qcow2");
        assert!(again.bytes() == self.truth[0], "{at:?}");
        again.rebase("new.raw").unwrap();
        let figure = |key: &str| again.status(key).parse::<u64>().unwrap();
        let copied = figure("bytes-copied") + figure("bytes-zeroed");
        again.unmount();
        self.is_sound(&format!("after {at:?}"));
        Some(copied)
    }
}

#[test]
fn killed_at_any_write_or_sync_it_loses_nothing_and_goes_on_from_there() {
    let mut kills = 0;
    for case in Case::all() {
        let full = case.rebase("uninterrupted");
        let [at_writes, at_syncs] = ["pwrite64", "fdatasync"].map(|call| case.killed_at_each(call));
        for copied in [&at_writes, &at_syncs] {
            // Later is never less; at the header swap nothing is left to copy.
            assert_eq!((copied[0], copied[copied.len() - 1]), (full, 0), "{copied:?}");
            assert!(copied.is_sorted_by(|earlier, later| earlier >= later), "{copied:?}");
        }
        kills += at_writes.len() + at_syncs.len();
    }
    println!("{kills} times killed, nothing lost");
    assert!(kills > 60, "only {kills} times killed");
}

#[test]
fn a_server_killed_at_any_write_or_sync_of_a_rebase_loses_nothing_and_goes_on_from_there() {
    let case = Case::new(SHAPES[2]);
    let full = case.rebase("uninterrupted");
    case.scratch.ok("mkdir", "mnt");
    let mut kills = 0;
    for system_call in ["pwrite64", "fdatasync"] {
        let mut left = Vec::new();
        while let Some(copied) =
            case.killed_under_the_mount(At { system_call, number: left.len() + 1, signal: "KILL" })
        {
            left.push(copied);
        }
        assert_eq!((left[0], left[left.len() - 1]), (full, 0), "{system_call}: {left:?}");
        assert!(left.is_sorted_by(|earlier, later| earlier >= later), "{system_call}: {left:?}");
        kills += left.len();
    }
    println!("a server was {kills} times killed, nothing lost");
    assert!(kills > 8, "only {kills} times killed");
}

/// Several workers copy at the same time. Each counts for itself; nobody knows who is killed where.
#[test]
fn several_workers_killed_at_any_write_or_sync_lose_nothing_and_go_on_from_there() {
    let s = large();
    let (fresh, total) = (std::fs::read(s.path("cow.qcow2")).unwrap(), 16 << 20);
    let mut kills = Vec::new();
    for (system_call, step) in [("pwrite64", 4), ("fdatasync", 1)] {
        for number in (1..).step_by(step) {
            s.write("cow.qcow2", &fresh);
            let killing = injecting(system_call, &format!("signal=SIGKILL:when={number}"));
            let mut rebase = Command::new("strace");
            rebase.args(killing).arg("-D").arg(rebasefs()).args(REBASE.split(' ')).current_dir(s.path(""));
            match rebase.output().unwrap().status.code() {
                None => {}
                Some(0) => break,
                Some(code) => panic!("{system_call} {number}: {code}"),
            }
            let when = format!("{system_call} {number}");
            assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)), "{when}");
            assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; total as usize], "{when}");
            let kept = held(&s);
            let again: Value = serde_json::from_str(&s.rebasefs(&format!("{REBASE} --output json"))).unwrap();
            assert_eq!(again["copied"], total - kept, "{when}");
            assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; total as usize], "{when}");
            assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)), "{when}");
            kills.push(kept);
        }
    }
    println!("{} times killed with several workers, bytes kept: {kills:?}", kills.len());
    assert!(kills.len() > 5 && kills.contains(&total), "{} times killed", kills.len());
}

#[test]
fn a_file_size_limit_is_an_error_like_others() {
    for case in Case::all() {
        let s = &case.scratch;
        let mut refusals = 0;
        for room in (0..).step_by(case.fresh.len() / 8) {
            case.start_afresh();
            let limit = (case.fresh.len() + room).to_string();
            let line = format!("--fsize={limit}:{limit} {} {REBASE}", rebasefs());
            let ended = s.run("prlimit", &line);
            case.is_sound(&format!("limited to {limit} bytes"));
            if ended.code == Some(0) {
                break;
            }
            assert_eq!(ended.code, Some(1), "{}", ended.stderr);
            assert!(ended.stderr.contains("cow.qcow2: cannot write at offset 0x"), "{}", ended.stderr);
            assert!(ended.stderr.contains("File too large"), "{}", ended.stderr);
            case.rebase("without limit");
            refusals += 1;
        }
        assert!(refusals > 0);
    }
}

#[test]
fn a_quota_that_is_exceeded_at_any_write_or_sync_is_an_error_and_loses_nothing() {
    let case = Case::new(SHAPES[2]);
    let mut refusals = 0;
    for system_call in ["pwrite64", "fdatasync"] {
        for number in 1.. {
            case.start_afresh();
            let mut command = failing(&case.scratch.path(""), REBASE, system_call, number, "EDQUOT");
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            case.is_sound(&format!("{system_call} {number}"));
            if output.status.success() {
                break;
            }
            let what = if system_call == "pwrite64" { "cannot write at offset 0x" } else { "cannot sync" };
            assert!(said.contains(&format!("cow.qcow2: {what}")), "{said}");
            assert!(said.contains("quota exceeded"), "{said}");
            case.rebase("without a quota");
            refusals += 1;
        }
    }
    println!("{refusals} times over quota, nothing lost");
    assert!(refusals > 8, "only {refusals}");
}

/// A small file system of its own, in `fs` of a scratch directory.
struct SmallDisk<'a>(&'a Scratch);

impl<'a> SmallDisk<'a> {
    fn new(s: &'a Scratch) -> Self {
        s.ok("truncate", "-s 4M fs.img");
        s.ok("mkfs.ext4", "-q -F -b 1024 -m 0 -O ^has_journal fs.img");
        s.ok("mkdir", "fs");
        s.ok("mount", "-o loop fs.img fs");
        Self(s)
    }

    /// Leaves so many bytes free.
    fn fill_but(&self, free: u64) {
        // It fails, as it shall: the disk is full.
        let filled = self.0.run("dd", "if=/dev/zero of=fs/filler bs=1k conv=fsync");
        assert!(filled.stderr.contains("No space left"), "{}", filled.stderr);
        self.0.cut("fs/filler", free);
        self.0.ok("sync", "-f fs");
    }

    fn empty(&self) {
        self.0.ok("rm", "fs/filler");
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path("fs")).status();
    }
}

/// ```text
/// base: 11 22 33 44 55 66 77 88
/// new:  88 77 66 55 44 33 22 11
/// ```
fn on_a_small_disk(s: &Scratch) -> Vec<u8> {
    s.draw_raw("base.raw", 65536, "11 22 33 44 55 66 77 88");
    s.draw_raw("new.raw", 65536, "88 77 66 55 44 33 22 11");
    s.qemu_img("create -q -f qcow2 -b ../base.raw -F raw fs/cow.qcow2");
    s.guest_bytes("qcow2", "fs/cow.qcow2")
}

#[test]
fn a_full_disk_is_an_error_and_with_space_the_rebase_completes() {
    let s = Scratch::new();
    let disk = SmallDisk::new(&s);
    let truth = on_a_small_disk(&s);
    let line = "rebase -b ../new.raw -F raw fs/cow.qcow2";
    let fresh = std::fs::read(s.path("fs/cow.qcow2")).unwrap();
    for free in (0..400 << 10).step_by(48 << 10) {
        disk.fill_but(free);
        let said = s.rebasefs_fails(1, line);
        assert!(said.contains("fs/cow.qcow2: cannot ") && said.contains("No space left on device"), "{said}");
        disk.empty();
        let checked = s.run("qemu-img", "check fs/cow.qcow2").code;
        assert!(matches!(checked, Some(0 | 3)), "{checked:?}");
        assert!(s.guest_bytes("qcow2", "fs/cow.qcow2") == truth);
        // What was copied is kept; the last time it is gone on from.
        if free < 340 << 10 {
            s.write("fs/cow.qcow2", &fresh);
        }
    }
    s.rebasefs(line);
    assert!(s.guest_bytes("qcow2", "fs/cow.qcow2") == truth);
    assert!(matches!(s.run("qemu-img", "check fs/cow.qcow2").code, Some(0 | 3)));
}

#[test]
fn a_full_disk_under_the_mount_is_told_to_the_writer() {
    let s = Scratch::new();
    let disk = SmallDisk::new(&s);
    let truth = on_a_small_disk(&s);
    s.ok("mkdir", "mnt");
    s.rebasefs(&format!("mount fs/cow.qcow2 {}", s.path("mnt").display()));
    let mounted = Mounted::found(s.path("mnt"));
    disk.fill_but(100 << 10);
    let (_, said) = mounted.shell("echo ../new.raw > ctl/backing");
    assert!(said.contains("No space left on device"), "{said}");
    assert!(mounted.status("error").contains("cow.qcow2: cannot "), "{}", mounted.says("status"));
    assert!(mounted.bytes() == truth);
    disk.empty();
    mounted.rebase("../new.raw").unwrap();
    assert!(mounted.bytes() == truth);
}

/// What has been copied is made durable now and then, not only at the end.
#[test]
fn killed_late_a_large_rebase_keeps_most_of_what_it_has_copied() {
    let s = Scratch::new();
    let (cluster, total) = (2 << 20, 704 << 20);
    s.draw_raw("base.raw", cluster, &"11 ".repeat(total as usize / cluster));
    s.qemu_img(&format!("create -q -f raw new.raw {total}"));
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    let killing = injecting("fdatasync", "signal=SIGKILL:when=4");
    let mut rebase = Command::new("strace");
    rebase.args(killing).arg("-D").arg(rebasefs()).args(REBASE.split(' ')).current_dir(s.path(""));
    assert_eq!(rebase.output().unwrap().status.code(), None);
    assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)));
    s.same("cow.qcow2", "base.raw");
    let kept = held(&s);
    assert!(kept >= 512 << 20, "{kept} bytes are kept");
    let again: Value = serde_json::from_str(&s.rebasefs(&format!("{REBASE} --output json"))).unwrap();
    assert_eq!(again["copied"], total - kept);
    s.same("cow.qcow2", "base.raw");
    assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)));
}
