//! The habits of the system: mount(8), fstab, `umount`, messages, manual pages and completions.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::mounted::{Mounted, SOON, is_mounted, open_dev_fuse};
use crate::scratch::{Scratch, rebasefs};
use crate::umount::{larger, slowly};

const HELPER: &str = "/sbin/mount.fuse.rebasefs";

/// The helper, where `mount` looks for it, until the test ends. One test at a time.
struct Helper;

static ONE: Mutex<()> = Mutex::new(());

impl Helper {
    fn install() -> Self {
        open_dev_fuse();
        let _ = std::fs::remove_file(HELPER);
        symlink(rebasefs(), HELPER).expect("installing the helper");
        Self
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(HELPER);
    }
}

fn image() -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", 65536, "11 -- 22 33");
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    scratch.draw("cow.qcow2", 65536, "-- 44 -- --");
    std::fs::create_dir(scratch.path("mnt")).unwrap();
    scratch
}

/// The mount in `mnt`, which has been made, shows what QEMU sees; it is free after `umount`.
fn used_and_unmounted(scratch: &Scratch) {
    let mountpoint = scratch.path("mnt");
    assert_eq!(
        std::fs::read(mountpoint.join("disk.raw")).unwrap(),
        scratch.guest_bytes("qcow2", "cow.qcow2")
    );
    scratch.rebasefs(&format!("umount {}", mountpoint.display()));
    assert!(!is_mounted(&mountpoint));
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x55 0 64k"]);
}

fn table_line(scratch: &Scratch) -> String {
    let mountpoint = scratch.path("mnt").display().to_string();
    let table = std::fs::read_to_string("/proc/mounts").unwrap();
    table.lines().find(|line| line.contains(&mountpoint)).expect("a line of the mount").to_owned()
}

#[test]
fn mount_knows_the_type() {
    let _one = ONE.lock();
    let _helper = Helper::install();
    let scratch = image();
    let log = scratch.path("log");
    let options = format!("ro,allow_other,threads=3,log={}", log.display());
    scratch.ok("mount", &format!("-t fuse.rebasefs cow.qcow2 mnt -o {options}"));
    let line = table_line(&scratch);
    assert!(line.contains(" ro,") && line.contains(",allow_other"), "{line}");
    assert!(log.exists());
    used_and_unmounted(&scratch);
}

#[test]
fn a_line_of_fstab_mounts() {
    let _one = ONE.lock();
    let _helper = Helper::install();
    let scratch = image();
    let (image, mountpoint) = (scratch.path("cow.qcow2"), scratch.path("mnt"));
    let options = "noauto,user,nofail,_netdev,x-systemd.automount,ro,format=qcow2";
    let line = format!("{} {} fuse.rebasefs {options} 0 0\n", image.display(), mountpoint.display());
    scratch.write("fstab", line.as_bytes());
    scratch.ok("mount", &format!("--fstab fstab {}", mountpoint.display()));
    used_and_unmounted(&scratch);
}

#[test]
fn mount_fuse3_finds_the_program_by_its_name() {
    let scratch = image();
    open_dev_fuse();
    std::fs::create_dir(scratch.path("bin")).unwrap();
    symlink(rebasefs(), scratch.path("bin/rebasefs")).unwrap();
    let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", scratch.path("bin").display());
    let (image, mountpoint) = (scratch.path("cow.qcow2"), scratch.path("mnt"));
    let call = format!("rebasefs#{} {} -o ro", image.display(), mountpoint.display());
    scratch.ok("env", &format!("{path} mount.fuse3 {call}"));
    used_and_unmounted(&scratch);
}

#[test]
fn a_mount_for_show_mounts_nothing() {
    let _one = ONE.lock();
    let _helper = Helper::install();
    let scratch = image();
    scratch.ok("mount", "--fake -t fuse.rebasefs cow.qcow2 mnt");
    scratch.ok(HELPER, "cow.qcow2 mnt -f -o rw");
    assert!(!is_mounted(&scratch.path("mnt")));
    let said = scratch.run("mount", "-t fuse.rebasefs cow.qcow2 mnt -o umask=022");
    assert!(
        said.code != Some(0) && said.stderr.contains("unknown mount option 'umask=022'"),
        "{}",
        said.stderr
    );
}

#[test]
fn umount_waits_until_the_image_is_free() {
    let scratch = image();
    for _ in 0..10 {
        let mounted = Mounted::new(&scratch, "cow.qcow2");
        scratch.rebasefs("umount cow.qcow2.mnt");
        // QEMU would say that the image is locked.
        scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x66 0 64k"]);
        mounted.wait_until_gone();
    }
}

#[test]
fn umount_says_what_is_wrong() {
    let scratch = image();
    let said = scratch.rebasefs_fails(1, "umount mnt");
    assert!(said.contains("mnt: rebasefs has mounted nothing here"), "{said}");
    let said = scratch.rebasefs_fails(1, "umount missing");
    assert!(said.contains("missing: cannot find the mount: No such file"), "{said}");
    let said = scratch.rebasefs_fails(1, "umount /proc");
    assert!(said.contains("/proc: rebasefs has mounted nothing here"), "{said}");

    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let open = std::fs::File::open(mounted.path("disk.raw")).unwrap();
    let said = scratch.rebasefs_fails(1, "umount cow.qcow2.mnt");
    assert!(said.contains("busy") && said.contains("rebasefs umount --lazy cow.qcow2.mnt"), "{said}");
    scratch.rebasefs("umount --lazy cow.qcow2.mnt");
    assert_eq!(open.metadata().unwrap().len(), 4 * 65536);
    drop(open);
    mounted.wait_until_gone();
}

#[test]
fn umount_cleans_up_after_a_server_that_died() {
    let scratch = image();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    mounted.signal("KILL");
    crate::mounted::wait_until("the server is dead", || !crate::mounted::is_running(mounted.server()));
    let said = scratch.rebasefs_fails(1, "mount cow.qcow2 cow.qcow2.mnt");
    let command = format!("`rebasefs umount {}`", mounted.path("").display());
    assert!(said.contains(&command.replace("/`", "`")), "{said}");
    scratch.rebasefs("umount cow.qcow2.mnt");
    mounted.wait_until_gone();
}

#[test]
fn users_unmount_what_is_theirs_and_root_all() {
    let scratch = image();
    open_dev_fuse();
    scratch.ok("chown", "-R 65534:65534 .");
    scratch.ok("chmod", "755 .");
    let program = readable_program(&scratch);
    let nobody =
        |line: &str| scratch.run("setpriv", &format!("--reuid 65534 --regid 65534 --clear-groups {line}"));
    let mount = || {
        let ended = nobody(&format!("{program} mount cow.qcow2 mnt"));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    };
    mount();
    assert!(table_line(&scratch).contains(" fuse.rebasefs "), "{}", table_line(&scratch));
    let ended = nobody(&format!("{program} umount mnt"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x55 0 64k"]);
    // Root does not see into the mount of another user, and finds its server all the same.
    mount();
    scratch.rebasefs("umount mnt");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x66 0 64k"]);
    // The other way round it is refused.
    let mountpoint = scratch.path("mnt");
    scratch.rebasefs(&format!("mount -o allow_other cow.qcow2 {}", mountpoint.display()));
    let ended = nobody(&format!("{program} umount mnt"));
    assert!(ended.code == Some(1) && ended.stderr.contains("mnt: cannot unmount: "), "{}", ended.stderr);
    used_and_unmounted(&scratch);
}

/// As debootstrap makes it: fusermount3 mounts there, and refuses to unmount.
#[test]
fn users_unmount_where_there_is_no_mtab() {
    let scratch = image();
    open_dev_fuse();
    scratch.ok("chown", "-R 65534:65534 .");
    scratch.ok("chmod", "755 .");
    let program = readable_program(&scratch);
    let nobody = format!("setpriv --reuid 65534 --regid 65534 --clear-groups {program}");
    for lazy in ["", "--lazy"] {
        let script = format!(
            "mount -t tmpfs none /etc && {nobody} mount cow.qcow2 mnt && {nobody} umount {lazy} mnt\n\
             ! grep -F $PWD/mnt /proc/mounts\n"
        );
        scratch.write("script", script.as_bytes());
        scratch.ok("unshare", "--mount sh -e script");
    }
}

/// A chroot that is made for the program may have neither /dev/null nor any other program.
#[test]
fn root_needs_nothing_but_dev_fuse() {
    let scratch = image();
    let program = rebasefs();
    for lazy in ["", "--lazy"] {
        let script = format!(
            "mount -t tmpfs none /dev && mknod /dev/fuse c 10 229 && {program} mount cow.qcow2 mnt\n\
             PATH=/nowhere {program} umount {lazy} mnt\n\
             ! grep -F $PWD/mnt /proc/mounts\n"
        );
        scratch.write("script", script.as_bytes());
        scratch.ok("unshare", "--mount sh -e script");
    }
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let open = std::fs::File::open(mounted.path("disk.raw")).unwrap();
    let said = scratch.run("env", &format!("PATH=/nowhere {program} umount cow.qcow2.mnt")).stderr;
    assert!(said.contains("busy") && said.contains("--lazy"), "{said}");
    drop(open);
}

/// The program, where others than root may execute it.
fn readable_program(scratch: &Scratch) -> String {
    let copy = scratch.path("rebasefs");
    std::fs::copy(rebasefs(), &copy).expect("copying the program");
    copy.display().to_string()
}

#[test]
fn only_messages_in_a_file_tell_the_time() {
    let scratch = image();
    let has_time = |text: &str| text.starts_with("[20") && text.contains("Z INFO ");
    let serve = |stderr: Stdio| {
        let mut server = Command::new(rebasefs())
            .args(["-v", "mount", "--foreground", "cow.qcow2", "mnt"])
            .current_dir(scratch.path("."))
            .stderr(stderr)
            .spawn()
            .unwrap();
        crate::mounted::wait_until("it is mounted", || is_mounted(&scratch.path("mnt")));
        assert!(Command::new("kill").arg(server.id().to_string()).status().unwrap().success());
        let said = server.stderr.take().map(|pipe| std::io::read_to_string(pipe).unwrap());
        assert!(server.wait().unwrap().success());
        said.unwrap_or_default()
    };
    let piped = serve(Stdio::piped());
    assert!(piped.starts_with("[INFO ") && piped.contains("signal 15: unmounting"), "{piped}");
    serve(std::fs::File::create(scratch.path("file")).unwrap().into());
    let filed = std::fs::read_to_string(scratch.path("file")).unwrap();
    assert!(has_time(&filed), "{filed}");
    let mounted =
        Mounted::with(&scratch, "cow.qcow2", &format!("-v --log {}", scratch.path("log").display()));
    mounted.signal("TERM");
    mounted.wait_until_gone();
    let logged = std::fs::read_to_string(scratch.path("log")).unwrap();
    assert!(has_time(&logged), "{logged}");
}

/// As logrotate does it: the log is moved away, and a new one is made.
#[test]
fn sighup_opens_the_log_anew_and_the_mount_stays() {
    let scratch = image();
    std::fs::create_dir_all(scratch.path("mnt")).unwrap();
    let mount = format!("{} -v mount --log log cow.qcow2 {}", rebasefs(), scratch.path("mnt").display());
    scratch.ok("env", &format!("--default-signal=HUP {mount}"));
    let mounted = Mounted::found(scratch.path("mnt"));
    std::fs::rename(scratch.path("log"), scratch.path("log.1")).unwrap();
    mounted.signal("HUP");
    let log = || std::fs::read_to_string(scratch.path("log")).unwrap_or_default();
    crate::mounted::wait_until("there is a new log", || log().contains("the log was opened anew"));
    mounted.rebase("base.raw").unwrap();
    assert!(log().contains("done"), "{}", log());
    assert!(!std::fs::read_to_string(scratch.path("log.1")).unwrap().contains("done"));
    mounted.unmount();
}

#[test]
fn a_rebase_that_fails_is_one_warning_and_one_that_is_interrupted_none() {
    let scratch = larger();
    let mounted = Mounted::with(&scratch, "cow.qcow2", "--log log");
    let log = || std::fs::read_to_string(scratch.path("log")).unwrap();
    slowly(&mounted);
    let script = "echo new.raw > cow.qcow2.mnt/ctl/backing";
    let mut writer = Command::new("env");
    let writer = writer.args(["--default-signal=INT", "bash", "-c", script]).current_dir(scratch.path(""));
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    crate::mounted::wait_until("the rebase copies", || mounted.status("phase") == "copy");
    assert!(Command::new("kill").args(["-s", "INT", &writer.id().to_string()]).status().unwrap().success());
    assert!(!writer.wait().unwrap().success());
    assert_eq!(mounted.status("state"), "cancelled");
    assert_eq!(log(), "");
    mounted.rebase("missing.raw").unwrap_err();
    let said = log();
    assert!(said.contains(" WARN ") && said.contains("missing.raw") && said.lines().count() == 1, "{said}");
    mounted.unmount();
}

#[test]
fn a_service_says_when_its_mount_stands() {
    let scratch = image();
    open_dev_fuse();
    let manager = UnixDatagram::bind(scratch.path("notify")).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut server = Command::new(rebasefs())
        .args(["mount", "--foreground", "cow.qcow2", "mnt"])
        .current_dir(scratch.path("."))
        .env("NOTIFY_SOCKET", scratch.path("notify"))
        .spawn()
        .unwrap();
    let mut said = [0; 64];
    let length = manager.recv(&mut said).unwrap();
    assert_eq!(&said[..length], b"READY=1");
    used_and_unmounted(&scratch);
    assert!(server.wait().unwrap().success());
}

#[test]
fn every_command_has_a_manual_page_that_man_can_read() {
    let scratch = Scratch::new();
    scratch.rebasefs("generate man man");
    let help = scratch.rebasefs("--help");
    let listed =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"rebase") && names.contains(&"umount"), "{help}");
    for name in names.into_iter().filter(|name| *name != "help") {
        let page: PathBuf = scratch.path(format!("man/rebasefs-{name}.1"));
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{}", page.display());
        // man(1) has no ellipsis, and complains of it, where the locale is C.
        assert!(text.is_ascii(), "{}", page.display());
    }
    let said = scratch.rebasefs_fails(1, "generate man /dev/null/man");
    assert!(said.contains("/dev/null/man: cannot write the manual pages"), "{said}");
}

#[test]
fn completions_are_made_for_the_usual_shells() {
    let scratch = Scratch::new();
    for (shell, words) in
        [("bash", "complete -F _rebasefs"), ("zsh", "#compdef rebasefs"), ("fish", "complete -c rebasefs")]
    {
        let text = scratch.rebasefs(&format!("generate completions {shell}"));
        assert!(text.contains(words) && text.contains("dry-run"), "{shell}");
    }
    scratch.write("completions", scratch.rebasefs("generate completions bash").as_bytes());
    scratch.ok("bash", "-n completions");
    // What is offered behind these words: formats, cache modes, files.
    scratch.write("new.raw", b"");
    for (words, offered) in [
        ("rebase -F ", "raw qcow2"),
        ("create -f q", "qcow2"),
        ("compare -T write", "writeback writethrough"),
        ("rebase -b ne", "new.raw"),
        ("check -r ", "leaks all"),
    ] {
        let script = format!(
            "source completions; COMP_WORDS=(rebasefs {}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
             _rebasefs rebasefs \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\" && echo ${{COMPREPLY[@]}}",
            words.split(' ').map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ")
        );
        let ended = scratch.run_args("bash", &["-c", &script]);
        assert_eq!(ended.stdout.trim(), offered, "{words}: {}", ended.stderr);
    }
}

#[test]
fn a_slip_is_answered_with_what_was_meant() {
    let said = Scratch::new().rebasefs_fails(1, "rebsae -b new.img cow.qcow2");
    assert!(said.contains("'rebase'"), "{said}");
    let said = Scratch::new().rebasefs_fails(1, "mount --forground cow.qcow2 mnt");
    assert!(said.contains("'--foreground'"), "{said}");
}
