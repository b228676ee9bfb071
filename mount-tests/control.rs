//! Control files: what a write to `ctl/backing` does, how it fails, and who may stop it.

mod circles;
mod difference;
mod names;
mod rebase;
mod times;

mod wait;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, Command, Stdio};

use crate::mounted::{Mounted, is_running, open_dev_fuse, wait_until};
use crate::scratch::{Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// ```text
/// base:    11 11 -- 22 -- 77 33 33
/// new:     11 99 -- 22 66 -- 33 88
/// overlay: -- 44 -- -- 55 -- -- --
/// ```
pub fn old_and_new() -> Scratch {
    let scratch = Scratch::new();
    draw_old_and_new(&scratch);
    scratch
}

pub fn draw_old_and_new(scratch: &Scratch) {
    scratch.draw_raw("base.raw", CLUSTER, "11 11 -- 22 -- 77 33 33");
    scratch.draw_raw("new.raw", CLUSTER, "11 99 -- 22 66 -- 33 88");
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    scratch.draw("cow.qcow2", CLUSTER, "-- 44 -- -- 55 -- -- --");
}

/// The backing file and its format, as qemu-img finds them in the header.
fn backing(scratch: &Scratch) -> (String, String) {
    let info = scratch.qemu_img("info -U --output=json cow.qcow2");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let word = |key: &str| info[key].as_str().unwrap_or_default().to_owned();
    (word("backing-filename"), word("backing-filename-format"))
}

#[test]
fn a_line_in_backing_rebases_and_nothing_else_changes() {
    let scratch = old_and_new();
    let (base, new) = (std::fs::read(scratch.path("base.raw")), std::fs::read(scratch.path("new.raw")));
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    assert_eq!(mounted.shell("echo new.raw > ctl/backing"), (Some(0), String::new()));
    assert_eq!(mounted.bytes(), before);
    assert_eq!(mounted.says("backing"), "new.raw\n");
    assert_eq!(mounted.status("state"), "done");
    // Cluster 5, which is a hole in the new one, and 7 differ; 1 and 4 are the overlay's own.
    assert_eq!(mounted.status("bytes-copied"), (2 * CLUSTER).to_string());
    mounted.unmount();
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), before);
    assert_eq!(backing(&scratch), ("new.raw".to_owned(), "raw".to_owned()));
    scratch.check_clean("cow.qcow2");
    assert_eq!(std::fs::read(scratch.path("base.raw")).unwrap(), base.unwrap());
    assert_eq!(std::fs::read(scratch.path("new.raw")).unwrap(), new.unwrap());
}

#[test]
fn the_word_flatten_flattens_and_an_empty_line_does_not() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    let (code, said) = mounted.shell("NEW=; LC_ALL=C; echo $NEW > ctl/backing");
    assert!(code == Some(1) && said.contains("Invalid argument"), "{said}");
    assert!(mounted.status("error").contains("an empty line names no backing file"));
    assert_eq!(mounted.says("backing"), "base.raw\n");
    assert_eq!(mounted.shell("echo ./flatten > ctl/backing").0, Some(1));
    assert!(mounted.status("error").contains("flatten: cannot open: No such file"));
    std::fs::copy(scratch.path("new.raw"), scratch.path("flatten")).unwrap();
    assert_eq!(mounted.shell("echo ./flatten > ctl/backing").0, Some(0));
    assert_eq!(mounted.says("backing"), "./flatten\n");
    assert_eq!(mounted.shell("echo flatten > ctl/backing"), (Some(0), String::new()));
    assert_eq!((mounted.bytes(), mounted.says("backing")), (before.clone(), String::new()));
    assert_eq!(mounted.says("chain").lines().count(), 1);
    mounted.unmount();
    std::fs::remove_file(scratch.path("base.raw")).unwrap();
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), before);
    scratch.check_clean("cow.qcow2");
}

#[test]
fn a_name_without_newline_counts_when_the_file_is_closed() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    assert_eq!(mounted.shell("printf new > ctl/backing").0, Some(0), "printf cannot know of a failing close");
    assert!(mounted.status("error").contains("No such file"), "{}", mounted.says("status"));
    assert_eq!(mounted.shell("printf new.raw > ctl/backing"), (Some(0), String::new()));
    assert_eq!(mounted.says("backing"), "new.raw\n");
}

#[test]
fn a_name_may_come_in_pieces_and_with_spaces_and_accents() {
    let scratch = old_and_new();
    std::fs::copy(scratch.path("new.raw"), scratch.path(" é n.raw")).unwrap();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let mut file = File::options().write(true).open(mounted.path("ctl/backing")).unwrap();
    file.write_all(" é".as_bytes()).unwrap();
    file.write_all(b" n.raw").unwrap();
    // A process that we start has a copy of the open file until it executes its program.
    scratch.ok("true", "");
    assert_eq!(mounted.says("backing"), "base.raw\n");
    file.write_all(b"\n").unwrap();
    assert_eq!(mounted.says("backing"), " é n.raw\n");
    // The same opening serves for another command.
    file.write_all(b"base.raw\n").unwrap();
    assert_eq!(mounted.says("backing"), "base.raw\n");
}

#[test]
fn a_line_may_be_written_with_every_usual_tool() {
    let scratch = old_and_new();
    scratch.write("line", b"new.raw\n");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    for (number, way) in [
        "echo new.raw > ctl/backing",
        "echo new.raw >> ctl/backing",
        "printf %s new.raw > ctl/backing",
        "echo new.raw | tee ctl/backing > /dev/null",
        "cp ../line ctl/backing",
        "cat ../line > ctl/backing",
        "dd if=../line of=ctl/backing bs=3 status=none",
        "truncate -s 0 ctl/backing && cat ../line 1<> ctl/backing",
        "python3 -c 'open(\"ctl/backing\", \"w\").write(\"new.raw\\n\")'",
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(mounted.shell(way), (Some(0), String::new()), "{way}");
        assert_eq!(mounted.says("backing"), "new.raw\n", "{way}");
        assert_eq!(
            mounted.shell(&format!("echo {} > ctl/backing", ["base.raw", "flatten"][number % 2])).0,
            Some(0)
        );
    }
    assert_eq!(mounted.bytes(), before);
}

#[test]
fn opening_and_closing_is_no_command() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for line in
        [": > ctl/backing", ": >> ctl/backing", "printf '' > ctl/backing", "cat ctl/backing ctl/status"]
    {
        assert_eq!(mounted.shell(line).0, Some(0), "{line}");
    }
    assert_eq!(mounted.status("state"), "idle");
    assert_eq!(mounted.says("backing"), "base.raw\n");
}

/// Mounts as the user nobody, for whom permissions count.
fn mounted_by_nobody(scratch: &Scratch) -> Mounted {
    open_dev_fuse();
    scratch.ok("mkdir", "mnt");
    scratch.ok("chmod", "777 . mnt");
    let mountpoint = scratch.path("mnt");
    nobody(scratch, &format!("{} mount cow.qcow2 {}", rebasefs(), mountpoint.display()));
    Mounted::found(mountpoint)
}

fn nobody(scratch: &Scratch, line: &str) -> String {
    scratch.ok("setpriv", &format!("--reuid 65534 --regid 65534 --clear-groups {line}"))
}

#[test]
fn an_unreadable_file_is_refused() {
    let scratch = old_and_new();
    scratch.ok("chmod", "666 cow.qcow2");
    scratch.ok("chmod", "600 new.raw");
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let _mounted = mounted_by_nobody(&scratch);
    scratch.write("try", b"#!/bin/sh\nLC_ALL=C; echo new.raw > mnt/ctl/backing 2> said; cat mnt/ctl/status");
    let status = nobody(&scratch, "sh try");
    assert!(status.contains("new.raw: cannot open for reading: Permission denied"), "{status}");
    assert_eq!(std::fs::read(scratch.path("cow.qcow2")).unwrap(), image);
}

#[test]
fn an_image_that_cannot_be_written_is_mounted_for_reading() {
    let scratch = old_and_new();
    scratch.ok("chmod", "444 cow.qcow2");
    let _mounted = mounted_by_nobody(&scratch);
    assert_eq!(nobody(&scratch, "stat -c %a mnt/ctl/backing"), "444\n");
    assert_eq!(nobody(&scratch, "stat -c %s mnt/disk.raw"), "524288\n");
}

#[test]
fn on_a_read_only_file_system_a_rebase_is_refused_with_the_reason() {
    let scratch = old_and_new();
    scratch.ok("mkdir", "ro mnt");
    scratch.ok("mount", "--bind -o ro . ro");
    let mountpoint = scratch.path("mnt");
    let mounted_it = scratch.run(rebasefs(), &format!("mount ro/cow.qcow2 {}", mountpoint.display()));
    let answer = (mounted_it.code == Some(0)).then(|| {
        let mounted = Mounted::found(mountpoint);
        (mounted.rebase("new.raw").unwrap_err().kind(), mounted.status("error"))
    });
    scratch.ok("umount", "ro");
    let (kind, error) = answer.unwrap_or_else(|| panic!("{}", mounted_it.stderr));
    assert_eq!(kind, ErrorKind::ReadOnlyFilesystem);
    assert!(error.contains("opened for reading only"), "{error}");
}

/// A backing file whose reader waits: it lies in the mount of another server, which is stopped.
pub struct Stalled {
    mounted: Mounted,
}

impl Stalled {
    /// The file to name is [`Self::name`].
    pub fn new(scratch: &Scratch) -> Self {
        scratch.qemu_img("convert -f raw -O qcow2 new.raw slow.qcow2");
        let mounted = Mounted::new(scratch, "slow.qcow2");
        mounted.signal("STOP");
        Self { mounted }
    }

    pub fn name(&self) -> String {
        self.mounted.path("disk.raw").display().to_string()
    }

    pub fn go_on(&self) {
        self.mounted.signal("CONT");
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        self.go_on();
    }
}

/// A shell that waits at `echo NAME > ctl/backing`, once the rebase runs.
pub fn waiting_writer(mounted: &Mounted, name: &str) -> Child {
    let line = format!("exec 2>&1; echo {name} > ctl/backing; echo ended with $?");
    // Also where whoever runs the tests ignores signals.
    let writer = Command::new("env")
        .args(["--default-signal=INT,TERM", "bash", "-c", &line])
        .current_dir(mounted.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the rebase runs", || mounted.status("state") == "running");
    writer
}

pub fn output_of(mut writer: Child) -> String {
    let mut said = String::new();
    writer.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    writer.wait().unwrap();
    said
}

#[test]
fn reads_go_on_while_a_rebase_runs() {
    let scratch = old_and_new();
    let stalled = Stalled::new(&scratch);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let writer = waiting_writer(&mounted, &stalled.name());
    assert_eq!(mounted.bytes(), scratch.guest_bytes("qcow2", "cow.qcow2"));
    assert_eq!(mounted.says("backing"), "base.raw\n");
    stalled.go_on();
    assert_eq!(output_of(writer), "ended with 0\n");
    assert_eq!(mounted.says("backing"), stalled.name() + "\n");
}

#[test]
fn a_second_writer_is_told_that_the_first_is_at_work() {
    let scratch = old_and_new();
    let stalled = Stalled::new(&scratch);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let open_before = File::options().write(true).open(mounted.path("ctl/backing")).unwrap();
    let writer = waiting_writer(&mounted, &stalled.name());
    assert_eq!((&open_before).write(b"new.raw\n").unwrap_err().kind(), ErrorKind::ResourceBusy);
    for line in
        ["echo new.raw > ctl/backing", "echo new.raw >> ctl/backing", "echo new.raw | tee ctl/backing"]
    {
        let (_, said) = mounted.shell(line);
        assert!(said.contains("Device or resource busy"), "{line}: {said}");
    }
    let refused = mounted.status("refused");
    assert!(refused.contains("busy: rebase onto") && refused.contains("ctl/cancel"), "{refused}");
    stalled.go_on();
    assert_eq!(output_of(writer), "ended with 0\n");
}

/// What a stopped rebase leaves: old backing file, same bytes, no error; and it can be done again.
fn stopped_and_sound(scratch: &Scratch, mounted: &Mounted, before: &[u8]) {
    assert_eq!(mounted.status("state"), "cancelled");
    assert_eq!(mounted.says("backing"), "base.raw\n");
    assert_eq!(mounted.bytes(), before);
    mounted.rebase("new.raw").unwrap();
    assert_eq!(mounted.bytes(), before);
    scratch.check_clean("-U cow.qcow2");
}

#[test]
fn trap_14_cancel_stops_a_rebase() {
    let scratch = old_and_new();
    let stalled = Stalled::new(&scratch);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    let writer = waiting_writer(&mounted, &stalled.name());
    assert_eq!(mounted.shell("echo > ctl/cancel"), (Some(0), String::new()));
    assert_eq!(mounted.status("state"), "stopping");
    stalled.go_on();
    let said = output_of(writer);
    assert!(said.contains("Interrupted system call") && said.contains("ended with 1"), "{said}");
    stopped_and_sound(&scratch, &mounted, &before);
}

#[test]
fn what_a_failed_rebase_has_copied_is_not_copied_again() {
    let s = Scratch::new();
    s.draw_raw("base.raw", CLUSTER, &"11 ".repeat(64));
    s.draw_raw("new.raw", CLUSTER, &"99 ".repeat(64));
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    s.qemu_img("create -q -f qcow2 broken.qcow2 4M");
    s.draw("broken.qcow2", CLUSTER, &("99 ".repeat(63) + "c99"));
    // Behind header, refcount table and block, L1 and L2 table, and 63 clusters: what cannot be inflated.
    s.poke("broken.qcow2", 68 * CLUSTER as u64, &[0xff; 16]);
    let mounted = Mounted::new(&s, "cow.qcow2");
    let error = mounted.rebase("broken.qcow2").unwrap_err();
    assert!(error.to_string().contains("Structure needs cleaning"), "{error}");
    mounted.rebase("new.raw").unwrap();
    let copied: u64 = mounted.status("bytes-copied").parse().unwrap();
    assert!(copied < 1 << 20, "{copied} bytes were copied");
    assert_eq!(mounted.bytes(), vec![0x11; 64 * CLUSTER]);
    s.check_clean("-U cow.qcow2");
}

#[test]
fn force_share_is_not_for_writing() {
    let scratch = old_and_new();
    let _mounted = Mounted::new(&scratch, "cow.qcow2");
    let said = scratch.rebasefs_fails(1, "rebase -U -b new.raw -F raw cow.qcow2");
    assert!(said.contains("is in use by another process"), "{said}");
    assert_eq!(backing(&scratch).0, "base.raw");
}

#[test]
fn signals_to_the_writer_stop_a_rebase() {
    for signal in ["INT", "TERM", "KILL"] {
        let scratch = old_and_new();
        let stalled = Stalled::new(&scratch);
        let mounted = Mounted::new(&scratch, "cow.qcow2");
        let before = mounted.bytes();
        let writer = waiting_writer(&mounted, &stalled.name());
        scratch.ok("kill", &format!("-s {signal} {}", writer.id()));
        wait_until("the server has noticed", || mounted.status("state") == "stopping");
        stalled.go_on();
        output_of(writer);
        stopped_and_sound(&scratch, &mounted, &before);
    }
}

#[test]
fn a_writer_that_ignores_a_signal_is_not_interrupted() {
    let scratch = old_and_new();
    let stalled = Stalled::new(&scratch);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let line = format!("trap '' INT; echo {} > ctl/backing", stalled.name());
    let mut writer = Command::new("bash").args(["-c", &line]).current_dir(mounted.path("")).spawn().unwrap();
    wait_until("the rebase runs", || mounted.status("state") == "running");
    scratch.ok("kill", &format!("-s INT {}", writer.id()));
    stalled.go_on();
    assert_eq!(writer.wait().unwrap().code(), Some(0));
    assert_eq!(mounted.status("state"), "done");
}

#[test]
fn a_signal_to_the_server_lets_the_rebase_stop_cleanly() {
    let scratch = old_and_new();
    let before = scratch.guest_bytes("qcow2", "cow.qcow2");
    let stalled = Stalled::new(&scratch);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let writer = waiting_writer(&mounted, &stalled.name());
    mounted.signal("TERM");
    wait_until("the server has noticed", || mounted.status("state") == "stopping");
    assert!(is_running(mounted.server()));
    stalled.go_on();
    let said = output_of(writer);
    assert!(said.contains("Interrupted system call"), "{said}");
    mounted.wait_until_gone();
    assert_eq!(backing(&scratch).0, "base.raw");
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), before);
    scratch.check_clean("cow.qcow2");
}

#[test]
fn files_of_the_old_chain_are_let_go() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for name in ["new.raw", "base.raw", "new.raw"] {
        mounted.rebase(name).unwrap();
    }
    let files = std::fs::read_dir(format!("/proc/{}/fd", mounted.server())).unwrap();
    let open: Vec<_> = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok()).collect();
    assert!(!open.contains(&scratch.path("base.raw")), "{open:?}");
    // Nor is it locked; the new one is.
    scratch.qemu_io("raw", "base.raw", &["write 0 512"]);
    let ended = scratch.run_args("qemu-io", &["-f", "raw", "-c", "write 0 512", "new.raw"]);
    assert!(ended.stderr.contains("lock"), "{}{}", ended.stdout, ended.stderr);
}

#[test]
fn no_reader_ever_sees_another_byte() {
    let scratch = Scratch::new();
    let cells = |step: usize| (0..64).map(|n| format!("{:02x}", n % step + 1)).collect::<Vec<_>>().join(" ");
    scratch.draw_raw("base.raw", CLUSTER, &cells(7));
    scratch.draw_raw("new.raw", CLUSTER, &cells(5));
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let expected = mounted.bytes();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    assert!(uncached(&mounted, expected.len()) == expected);
                }
            });
        }
        for name in ["new.raw", "base.raw", "flatten"] {
            mounted.rebase(name).unwrap();
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    mounted.unmount();
    scratch.check_clean("cow.qcow2");
}

/// `disk.raw` as the server gives it now, past the page cache.
fn uncached(mounted: &Mounted, length: usize) -> Vec<u8> {
    uncached_file(mounted, "disk.raw", length)
}

/// The same of any file.
pub fn uncached_file(mounted: &Mounted, name: &str, length: usize) -> Vec<u8> {
    const O_DIRECT: i32 = 0o40000;
    let disk = File::options().read(true).custom_flags(O_DIRECT).open(mounted.path(name)).unwrap();
    let mut bytes = vec![0; length + 4096];
    let skip = bytes.as_ptr().align_offset(4096);
    disk.read_exact_at(&mut bytes[skip..skip + length], 0).unwrap();
    bytes[skip..skip + length].to_vec()
}

#[test]
fn a_dead_mount_is_explained_and_auto_unmount_leaves_none() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    mounted.signal("KILL");
    wait_until("the server is dead", || !is_running(mounted.server()));
    let said = scratch.rebasefs_fails(1, "mount cow.qcow2 cow.qcow2.mnt");
    assert!(said.contains("a server died here"), "{said}");
    mounted.unmount();
    let mounted = Mounted::with(&scratch, "cow.qcow2", "-o allow_other,auto_unmount");
    mounted.signal("KILL");
    mounted.wait_until_gone();
}
