//! Image locks, in both directions: what QEMU has open is refused to us, and what we have open is
//! refused to QEMU; readers share. QEMU itself is the other side.

use std::io::{ErrorKind, Read};
use std::process::{Child, Command, Stdio};

use crate::control::old_and_new;
use crate::mounted::{Mounted, wait_until};
use crate::scratch::{Scratch, rebasefs};
use crate::traced::{At, let_go_on};

const WRITING: &str = "-f qcow2 cow.qcow2";
const READING: &str = "-r -f qcow2 cow.qcow2";

/// A QEMU program that has an image open until it is dropped.
pub struct Qemu(Child);

impl Qemu {
    /// `qemu-io` with these arguments, or its message if it cannot open the image.
    fn tries(s: &Scratch, line: &str) -> Result<Self, String> {
        Self::tries_args(s, &line.split_whitespace().map(std::ffi::OsStr::new).collect::<Vec<_>>())
    }

    fn tries_args(s: &Scratch, arguments: &[&std::ffi::OsStr]) -> Result<Self, String> {
        let mut child = Command::new("qemu-io")
            .args(arguments)
            .current_dir(s.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("qemu-io is needed; scripts/test installs it");
        // It asks for commands once the image is open.
        let mut prompt = [0; 8];
        if child.stdout.as_mut().unwrap().read_exact(&mut prompt).is_ok() {
            assert_eq!(&prompt, b"qemu-io>");
            return Ok(Self(child));
        }
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        child.wait().unwrap();
        Err(said)
    }

    /// `qemu-io` that has an image open for writing.
    pub fn opens_for_writing(s: &Scratch, format: &str, image: &std::ffi::OsStr) -> Self {
        Self::tries_args(s, &["-f".as_ref(), format.as_ref(), image])
            .unwrap_or_else(|said| panic!("qemu-io {}: {said}", image.display()))
    }

    /// The same, which must succeed.
    fn opens(s: &Scratch, line: &str) -> Self {
        Self::tries(s, line).unwrap_or_else(|said| panic!("qemu-io {line}: {said}"))
    }

    /// An NBD server that offers the image for writing.
    fn serves(s: &Scratch, line: &str) -> Self {
        let mut child = Command::new("qemu-nbd");
        let child = child.args(["-t", "-k"]).arg(s.path("nbd")).args(line.split_whitespace());
        let qemu = Self(
            child.current_dir(s.path("")).spawn().expect("qemu-nbd is needed; scripts/test installs it"),
        );
        wait_until("qemu-nbd listens", || s.path("nbd").exists());
        qemu
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Its input ends, and with it qemu-io. The server has none.
        drop(self.0.stdin.take());
        if self.0.stdout.is_none() {
            self.0.kill().unwrap();
        }
        self.0.wait().unwrap();
    }
}

/// qemu-io cannot open the image, because of a lock.
fn qemu_is_refused(s: &Scratch, line: &str) {
    match Qemu::tries(s, line) {
        Ok(_) => panic!("qemu-io {line} could open the image"),
        Err(said) => assert!(said.contains("Failed to get") && said.contains("lock"), "{line}: {said}"),
    }
}

/// rebasefs is refused: the message names the file, says why and what to do; the image stays bit
/// for bit what it was.
fn we_are_refused(s: &Scratch, line: &str, file: &str, why: &str) {
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    let said = s.rebasefs_fails(1, line);
    let commands = ["info", "map", "check", "mount"];
    let only_reads = commands.iter().any(|command| line.starts_with(command)) && !line.contains("--rw");
    assert_eq!(said.contains("with `-U`"), only_reads && !line.contains(" -r "), "{line}: {said}");
    let expected = format!("{file}: {why} another process");
    let says_what_to_do = said.contains("stop it first") || said.contains("rebasefs has it mounted");
    assert!(said.contains(&expected) && says_what_to_do, "{line}: {said}");
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image, "{line}: the image has changed");
}

const REBASE: &str = "rebase -b new.raw -F raw cow.qcow2";

#[test]
fn what_qemu_writes_is_refused_to_all_who_do_not_say_force_share() {
    for holder in [Qemu::opens, Qemu::serves] {
        let s = old_and_new();
        s.ok("mkdir", "mnt");
        let writer = holder(&s, WRITING);
        for line in ["mount cow.qcow2 mnt", "check cow.qcow2", "info cow.qcow2", "map cow.qcow2", REBASE] {
            we_are_refused(&s, line, "cow.qcow2", "is open for writing in");
        }
        let unsafely = "rebase -u -b new.raw -F raw cow.qcow2";
        we_are_refused(&s, unsafely, "cow.qcow2", "is open for writing in");
        assert_eq!(std::fs::read_dir(s.path("mnt")).unwrap().count(), 0);
        drop(writer);
        s.rebasefs(REBASE);
        s.check_clean("cow.qcow2");
    }
}

/// Commands that both programs have, from an overlay as it was at first.
const COMMANDS: [&str; 13] = [
    "info -f raw base.raw",
    "map -f raw base.raw",
    "compare -f raw -F raw base.raw base.raw",
    "compare -F raw cow.qcow2 base.raw",
    "info cow.qcow2",
    "info -U cow.qcow2",
    "check cow.qcow2",
    "check -U cow.qcow2",
    "map cow.qcow2",
    "map -U cow.qcow2",
    "compare -U cow.qcow2 cow.qcow2",
    "rebase -U -u -b base.raw -F raw cow.qcow2",
    "rebase -U -b base.raw -F raw cow.qcow2",
];

#[test]
fn with_and_without_force_share_we_are_refused_what_qemu_img_is_refused() {
    for holder in [None, Some(READING), Some(WRITING), Some("-r -f raw base.raw"), Some("-f raw base.raw")] {
        let s = old_and_new();
        let _held = holder.map(|line| Qemu::opens(&s, line));
        for line in COMMANDS {
            let (ours, theirs) = (s.run(rebasefs(), line), s.run("qemu-img", line));
            assert_eq!(ours.code, theirs.code, "{line} while {holder:?}: {}{}", ours.stderr, theirs.stderr);
        }
    }
}

#[test]
fn beside_a_reader_there_may_be_a_mount_but_no_rebase() {
    let s = old_and_new();
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let reader = Qemu::opens(&s, READING);
    we_are_refused(&s, REBASE, "cow.qcow2", "is in use by");
    let mounted = Mounted::new(&s, "cow.qcow2");
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    assert_eq!(mounted.rebase("new.raw").unwrap_err().kind(), ErrorKind::ResourceBusy);
    assert!(mounted.status("error").contains("stop it first"), "{}", mounted.says("status"));
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image);
    assert_eq!(mounted.bytes(), before);
    drop(reader);
    mounted.rebase("new.raw").unwrap();
    assert_eq!(mounted.bytes(), before);
}

#[test]
fn what_is_mounted_can_be_read_by_qemu_but_not_written() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    for _ in 0..2 {
        qemu_is_refused(&s, WRITING);
        qemu_is_refused(&s, "-f raw base.raw");
        Qemu::opens(&s, READING);
        Qemu::opens(&s, "-r -f raw base.raw");
        we_are_refused(&s, REBASE, "cow.qcow2", "is in use by");
        // The same after a rebase that failed and one that went well.
        mounted.rebase("missing.raw").unwrap_err();
        mounted.rebase("base.raw").unwrap();
    }
    mounted.unmount();
    Qemu::opens(&s, WRITING);
    Qemu::opens(&s, "-f raw base.raw");
}

/// Stops a rebase at its first write; the write lock is held then.
const FIRST_WRITE: At = At { system_call: "pwrite64", number: 1, signal: "STOP" };

#[test]
fn while_a_rebase_runs_qemu_cannot_even_read_the_overlay() {
    let s = old_and_new();
    let mut rebase = FIRST_WRITE.command(&s.path(""), REBASE).stdout(Stdio::null()).spawn().unwrap();
    held_by_a_rebase(&s);
    // What is being copied from must not be changed either.
    qemu_is_refused(&s, "-f raw base.raw");
    qemu_is_refused(&s, "-f raw new.raw");
    Qemu::opens(&s, "-r -f raw base.raw");
    assert!(let_go_on(rebase.id(), &mut rebase).success());
    for image in [WRITING, "-f raw base.raw", "-f raw new.raw"] {
        Qemu::opens(&s, image);
    }
}

/// Whether somebody holds the byte that stands for writing, by the kernel's table of locks.
fn is_locked_for_writing(image: &std::path::Path) -> bool {
    let inode = format!(":{}", std::os::unix::fs::MetadataExt::ino(&image.metadata().unwrap()));
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [.., file, first, last] = words[..] else { return false };
        let covers = |byte: u64| {
            first.parse().is_ok_and(|n: u64| n <= byte) && last.parse().is_ok_and(|n: u64| n >= byte)
        };
        file.ends_with(&inode) && covers(101)
    })
}

/// Nobody but who says force-share can open the overlay.
fn held_by_a_rebase(s: &Scratch) {
    // Not by trying: who tries holds a lock for a moment, and the rebase would be refused.
    wait_until("the overlay is locked", || is_locked_for_writing(&s.path("cow.qcow2")));
    qemu_is_refused(s, WRITING);
    qemu_is_refused(s, READING);
    Qemu::opens(s, "-U -r -f qcow2 cow.qcow2");
    we_are_refused(s, "info cow.qcow2", "cow.qcow2", "is open for writing in");
    we_are_refused(s, REBASE, "cow.qcow2", "is open for writing in");
}

#[test]
fn a_rebase_through_the_mount_locks_the_same_and_lets_go_afterwards() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    FIRST_WRITE.attach(mounted.server());
    let line = "echo new.raw > cow.qcow2.mnt/ctl/backing";
    let mut writer = Command::new("sh").args(["-c", line]).current_dir(s.path("")).spawn().unwrap();
    held_by_a_rebase(&s);
    assert!(let_go_on(mounted.server(), &mut writer).success());
    Qemu::opens(&s, READING);
    qemu_is_refused(&s, WRITING);
    // The old backing file is nobody's any more.
    Qemu::opens(&s, "-f raw base.raw");
    qemu_is_refused(&s, "-f raw new.raw");
    mounted.unmount();
    Qemu::opens(&s, WRITING);
    Qemu::opens(&s, "-f raw new.raw");
}

#[test]
fn a_backing_file_that_somebody_writes_is_refused() {
    for (written, line) in [
        ("new.raw", REBASE),
        ("base.raw", REBASE),
        ("base.raw", "mount cow.qcow2 mnt"),
        ("new.raw", "rebase -u -b new.raw cow.qcow2"),
    ] {
        let s = old_and_new();
        s.ok("mkdir", "mnt");
        let _writer = Qemu::opens(&s, &format!("-f raw {written}"));
        we_are_refused(&s, line, written, "is open for writing in");
    }
}

#[test]
fn a_loop_is_seen_also_where_somebody_writes_to_a_file_of_it() {
    let s = old_and_new();
    s.qemu_img("create -q -f qcow2 -b cow.qcow2 -F qcow2 above.qcow2");
    let _writer = Qemu::opens(&s, "-f raw above.qcow2");
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    let said = s.rebasefs_fails(1, "rebase -u -b above.qcow2 -F qcow2 cow.qcow2");
    assert!(said.contains("is the overlay itself"), "{said}");
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image);
}

#[test]
fn a_backing_file_that_others_only_read_stays_shared() {
    let s = old_and_new();
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw other.qcow2");
    s.qemu_img("create -q -f qcow2 -b new.raw -F raw another.qcow2");
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    // A virtual machine runs on another overlay of the same base; one more is mounted.
    let _machine = Qemu::opens(&s, "-f qcow2 other.qcow2");
    let _mounted = Mounted::new(&s, "another.qcow2");
    s.rebasefs(REBASE);
    s.rebasefs("rebase -b base.raw -F raw cow.qcow2");
    assert_eq!(s.guest_bytes("qcow2", "cow.qcow2"), before);
    s.check_clean("cow.qcow2");
}

#[test]
fn an_external_data_file_is_locked_with_its_image() {
    let s = old_and_new();
    s.qemu_img("create -q -f qcow2 -o data_file=data.raw -b base.raw -F raw cow.qcow2");
    let writer = Qemu::opens(&s, "-f raw data.raw");
    we_are_refused(&s, REBASE, "data.raw", "is open for writing in");
    we_are_refused(&s, "info cow.qcow2", "data.raw", "is open for writing in");
    drop(writer);
    // QEMU's raw readers do not mind a writer; ours do.
    let reader = Mounted::new(&s, "data.raw");
    we_are_refused(&s, "check -r all cow.qcow2", "data.raw", "is in use by");
    we_are_refused(&s, REBASE, "data.raw", "is in use by");
    reader.unmount();
    s.rebasefs("check -r all cow.qcow2");
    let mounted = Mounted::new(&s, "cow.qcow2");
    qemu_is_refused(&s, "-f raw data.raw");
    mounted.rebase("new.raw").unwrap();
    mounted.unmount();
    Qemu::opens(&s, "-f raw data.raw");
}

#[test]
fn the_locks_of_a_killed_server_are_gone_with_it() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    mounted.signal("KILL");
    wait_until("QEMU can write again", || Qemu::tries(&s, WRITING).is_ok());
    Qemu::opens(&s, "-f raw base.raw");
}

/// A process that has a lease on a file, as a file server takes it for a client.
struct Lease(Child);

impl Lease {
    /// Takes it. `kind` is what it excludes: `WRLCK` others who open the file, `RDLCK` those who write.
    fn on(s: &Scratch, file: &str, kind: &str) -> Self {
        let program = format!(
            "import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
file = os.open('{file}', os.O_RDONLY)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_{kind})
print('taken', flush=True)
signal.sigwait([signal.SIGIO])
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
print('given back', flush=True)"
        );
        let mut child = Command::new("python3")
            .args(["-c", &program])
            .current_dir(s.path(""))
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is needed; scripts/test installs it");
        let mut said = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut said).expect("taking a lease");
        assert_eq!(&said, b"taken\n");
        Self(child)
    }

    /// Waits until somebody has wanted the file.
    fn awaits_return(mut self) {
        let mut said = String::new();
        self.0.stdout.as_mut().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "given back\n");
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// open(2) waits, too; and QEMU.
#[test]
fn a_lease_is_waited_for() {
    let s = old_and_new();
    for (file, kind, line) in [
        ("cow.qcow2", "WRLCK", "info cow.qcow2"),
        ("base.raw", "WRLCK", "map cow.qcow2"),
        ("cow.qcow2", "RDLCK", "rebase -b new.raw -F raw cow.qcow2"),
        ("base.raw", "WRLCK", "rebase -b base.raw -F raw cow.qcow2"),
        ("old.img", "WRLCK", "create -f qcow2 old.img 1M"),
    ] {
        s.write("old.img", b"old");
        let lease = Lease::on(&s, file, kind);
        s.rebasefs(line);
        lease.awaits_return();
    }
    s.check_clean("cow.qcow2");
    let mounted = Mounted::new(&s, "cow.qcow2");
    let lease = Lease::on(&s, "new.raw", "WRLCK");
    mounted.rebase("new.raw").unwrap_or_else(|e| panic!("{e}: {}", mounted.says("status")));
    lease.awaits_return();
}
