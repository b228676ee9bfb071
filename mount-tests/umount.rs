//! `rebasefs umount` where somebody is in the way: servers that do not answer, mounts that live on
//! elsewhere, processes that use them, users who put something else there.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use crate::mounted::{Mounted, is_mounted, open_dev_fuse, wait_until};
use crate::scratch::{AS_NOBODY, Scratch, rebasefs};
use crate::traced::{injecting, let_go_on, slow_down};

const CLUSTER: usize = 65536;

fn image() -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", CLUSTER, "11 -- 22 33");
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    scratch
}

/// The same for `nobody`, who may run the program that lies there.
fn image_of_nobody() -> Scratch {
    let scratch = image();
    open_dev_fuse();
    std::fs::copy(rebasefs(), scratch.path("rebasefs")).unwrap();
    std::fs::create_dir(scratch.path("mnt")).unwrap();
    scratch.ok("chown", "-R 65534:65534 .");
    scratch.ok("chmod", "755 .");
    scratch
}

/// QEMU gets its write lock.
fn is_free(scratch: &Scratch) {
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x66 0 64k"]);
}

/// Ends a process with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn stopped(server: u32) {
    assert!(Command::new("kill").args(["-s", "STOP", &server.to_string()]).status().unwrap().success());
    wait_until("the server is stopped", || {
        let status = std::fs::read_to_string(format!("/proc/{server}/status")).unwrap();
        status.contains("State:\tT")
    });
}

#[test]
fn a_stopped_server_is_named_and_not_waited_for() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    stopped(mounted.server());
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    let words = format!("its server (process {}) was stopped", mounted.server());
    assert!(said.contains(&words), "{said}");
    assert!(!is_mounted(&scratch.path("cow.qcow2.mnt")));
    mounted.signal("CONT");
    mounted.wait_until_gone();
    is_free(&scratch);
}

#[test]
fn lazily_nothing_is_asked_of_the_server() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let open = std::fs::File::open(mounted.path("disk.raw")).unwrap();
    stopped(mounted.server());
    scratch.rebasefs("unmount --lazy cow.qcow2.mnt");
    mounted.signal("CONT");
    assert_eq!(open.metadata().unwrap().len(), 4 * CLUSTER as u64);
    drop(open);
    mounted.wait_until_gone();
}

/// Root unmounts the mount of a user who has stopped the server.
#[test]
fn root_does_not_hang_in_the_mount_of_a_user() {
    let scratch = image_of_nobody();
    let words = [AS_NOBODY, &["./rebasefs", "mount", "cow.qcow2"]].concat();
    let mountpoint = scratch.path("mnt");
    scratch.ok(words[0], &format!("{} {}", words[1..].join(" "), mountpoint.display()));
    let table = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(table.contains(&format!(" {} fuse.rebasefs ", mountpoint.display())), "{table}");
    let server = scratch.ok("pgrep", &format!("-f {}", mountpoint.display()));
    let server: u32 = server.trim().parse().unwrap();
    stopped(server);
    let said = scratch.rebasefs_fails(1, "umount mnt");
    assert!(said.contains(&format!("process {server}) was stopped")), "{said}");
    assert!(!is_mounted(&mountpoint));
    scratch.ok("kill", &format!("-s CONT {server}"));
    wait_until("the server has ended", || !crate::mounted::is_running(server));
    is_free(&scratch);
}

/// While root waits for a rebase to stop, its user puts a link in the place of the mount, which leads to another.
#[test]
fn another_mount_than_the_one_that_was_found_stays() {
    let scratch = larger();
    scratch.qemu_img("create -q -f qcow2 other.qcow2 1M");
    let (mounted, other) = (Mounted::new(&scratch, "cow.qcow2"), Mounted::new(&scratch, "other.qcow2"));
    slowly(&mounted);
    let writer = writes(&scratch, "new.raw");
    wait_until("the rebase copies", || mounted.status("phase") == "copy");
    // The first call is not made: the mount is busy, and rebasefs stops there.
    let inject = injecting("umount2", "error=EBUSY:signal=SIGSTOP:when=1");
    let mut umount = Command::new("strace");
    umount.args(inject).args(["-o", "trace", "-D", rebasefs(), "umount", "cow.qcow2.mnt"]);
    let mut umount = umount.current_dir(scratch.path("")).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it has stopped", || {
        std::fs::read_to_string(scratch.path("trace")).is_ok_and(|trace| trace.contains("stopped by SIGSTOP"))
    });
    scratch.ok("umount", "--lazy cow.qcow2.mnt");
    std::fs::remove_dir(scratch.path("cow.qcow2.mnt")).unwrap();
    std::os::unix::fs::symlink("other.qcow2.mnt", scratch.path("cow.qcow2.mnt")).unwrap();
    let mut said = String::new();
    let mut stderr = umount.stderr.take().unwrap();
    assert_eq!(let_go_on(umount.id(), &mut umount).code(), Some(1));
    stderr.read_to_string(&mut said).unwrap();
    assert!(said.contains("another mount than a moment ago is there"), "{said}");
    assert!(is_mounted(&scratch.path("other.qcow2.mnt")));
    assert!(!writer.wait_with_output().unwrap().status.success());
    std::fs::remove_file(scratch.path("cow.qcow2.mnt")).unwrap();
    std::fs::create_dir(scratch.path("cow.qcow2.mnt")).unwrap();
    mounted.wait_until_gone();
    other.unmount();
}

/// An image whose rebase onto `new.raw` copies 64 MiB; it takes half a minute in [`slowly`].
pub fn larger() -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", CLUSTER, &"11 ".repeat(1024));
    scratch.draw_raw("new.raw", CLUSTER, &"-- ".repeat(1024));
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    scratch
}

/// Lets each write of the server take half a second.
pub fn slowly(mounted: &Mounted) {
    slow_down(mounted.server(), "pwrite64", 500);
}

/// `echo NAME > ctl/backing`, which waits.
fn writes(scratch: &Scratch, name: &str) -> Child {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("echo {name} > cow.qcow2.mnt/ctl/backing")]);
    command.current_dir(scratch.path("")).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_running_rebase_is_stopped() {
    let scratch = larger();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.says("backing");
    slowly(&mounted);
    let writer = writes(&scratch, "new.raw");
    wait_until("the rebase copies", || mounted.status("phase") == "copy");
    scratch.rebasefs("umount cow.qcow2.mnt");
    let output = writer.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("Interrupted system call"), "{said}");
    mounted.wait_until_gone();
    let said = scratch.qemu_img("info --output=json cow.qcow2");
    assert!(said.contains(&format!("\"backing-filename\": \"{}\"", before.trim())), "{said}");
    assert!(matches!(scratch.run("qemu-img", "check -q cow.qcow2").code, Some(0 | 3)));
}

#[test]
fn who_uses_it_is_named() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let mut command = Command::new("sleep");
    let user = Ends(command.arg("600").current_dir(mounted.path("ctl")).spawn().unwrap());
    let words = format!("process {} (", user.0.id());
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    assert!(said.contains("busy, used by ") && said.contains(&words), "{said}");
    drop(user);
    let open = std::fs::File::open(mounted.path("disk.raw")).unwrap();
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    assert!(said.contains(&format!("process {} (", std::process::id())), "{said}");
    drop(open);
    let device = crate::scratch::LoopDevice::attach(&mounted.path("disk.raw"));
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    assert!(said.contains(&format!("loop device {}", device.path())), "{said}");
}

#[test]
fn of_a_bind_mount_only_that_is_taken_down() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    std::fs::create_dir(scratch.path("bound")).unwrap();
    scratch.ok("mount", "--bind cow.qcow2.mnt bound");
    let ended = scratch.run(rebasefs(), "umount bound");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("on '{}', too", scratch.path("cow.qcow2.mnt").display())));
    assert!(!is_mounted(&scratch.path("bound")));
    assert_eq!(mounted.bytes().len(), 4 * CLUSTER);
    scratch.rebasefs("umount cow.qcow2.mnt");
    mounted.wait_until_gone();
    is_free(&scratch);
}

/// It is in the way of no other test: what others have mounted is taken down there at once.
#[test]
fn who_has_it_mounted_in_another_name_space_is_named() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let script = "findmnt -lno TARGET -t fuse,fuse.rebasefs | grep -vxF \"$PWD/cow.qcow2.mnt\" \
                  | xargs -rd '\\n' -n 1 umount -l; touch ready; exec sleep 600";
    let mut command = Command::new("unshare");
    let command = command.args(["-m", "sh", "-c", script]).current_dir(scratch.path(""));
    let holder = Ends(command.spawn().unwrap());
    wait_until("the name space is there", || scratch.path("ready").exists());
    let mut command = Command::new(rebasefs());
    let command = command.args(["umount", "cow.qcow2.mnt"]).current_dir(scratch.path(""));
    let mut umount = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = umount.stderr.take().unwrap();
    let (mut said, mut byte) = (Vec::new(), [0]);
    // The warning is a line.
    while !said.ends_with(b"\n") && stderr.read(&mut byte).unwrap() == 1 {
        said.push(byte[0]);
    }
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains(&format!("process {} (sleep) has it mounted", holder.0.id())), "{said}");
    assert!(!is_mounted(&scratch.path("cow.qcow2.mnt")));
    drop(holder);
    assert!(umount.wait().unwrap().success());
    mounted.wait_until_gone();
    is_free(&scratch);
}

#[test]
fn users_need_no_path() {
    let scratch = image_of_nobody();
    for command in ["mount cow.qcow2 mnt", "umount mnt", "mount cow.qcow2 mnt", "umount --lazy mnt"] {
        let words = [AS_NOBODY, &["env", "PATH=", "./rebasefs"]].concat();
        scratch.ok(words[0], &format!("{} {command}", words[1..].join(" ")));
    }
    assert!(!is_mounted(&scratch.path("mnt")));
}

#[test]
fn without_proc_it_says_so() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let script = format!("mount -t tmpfs none /proc; {} umount cow.qcow2.mnt", rebasefs());
    let ended = scratch.run_args("unshare", &["-m", "sh", "-c", &script]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("cannot see what is mounted without /proc"), "{}", ended.stderr);
    assert!(mounted.bytes().len() == 4 * CLUSTER);
}

#[test]
fn the_type_is_always_the_same() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let listed = scratch.ok("findmnt", &format!("-no FSTYPE {}", mounted.path("").display()));
    assert_eq!(listed.trim(), "fuse.rebasefs");
}

#[test]
fn a_place_that_the_system_needs_is_refused() {
    let scratch = image();
    for place in ["/", "/proc", "/sys", "/dev", "/proc/self", "/sys/kernel", "/usr", "/etc", "/dev/shm"] {
        let said = scratch.rebasefs_fails(1, &format!("mount cow.qcow2 {place}"));
        assert!(said.contains("would hide what the system needs"), "{said}");
    }
}

/// What cannot be made durable at the end is no success.
#[test]
fn what_the_server_could_not_make_durable_is_told() {
    let scratch = image();
    let mounted = Mounted::with(&scratch, "cow.qcow2", "--rw");
    scratch.ok("dd", "if=/dev/zero of=cow.qcow2.mnt/disk.raw bs=64k count=1 conv=notrunc status=none");
    let inject = injecting("fdatasync", "error=EIO");
    let mut strace = Command::new("strace");
    let strace = strace.args(inject).args(["-p", &mounted.server().to_string()]);
    let _strace = Ends(strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_until("strace is attached", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", mounted.server())).unwrap();
        !status.contains("TracerPid:\t0\n")
    });
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    assert!(said.contains("failed: ") && said.contains("Input/output error"), "{said}");
    mounted.wait_until_gone();
}
