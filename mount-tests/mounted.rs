//! A real mount for a test: made by the program, taken down and waited for when the test ends.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::time::{Duration, Instant};

use crate::scratch::{Scratch, rebasefs};

/// How long anything may take that should happen soon, on a machine that is busy with other things; a test
/// that waits longer has failed.
pub const SOON: Duration = Duration::from_secs(120);

/// An image of a [`Scratch`], mounted in `NAME.mnt` beside it by a server in the background.
pub struct Mounted {
    mountpoint: PathBuf,
    /// The server, which lives until the mount is gone.
    server: u32,
    /// When it was started: numbers of processes are used again.
    started: Option<u64>,
}

impl Mounted {
    /// Mounts `image` as a user would, with `rebasefs mount`.
    pub fn new(scratch: &Scratch, image: &str) -> Self {
        Self::with(scratch, image, "")
    }

    /// The same with further options.
    pub fn with(scratch: &Scratch, image: &str, options: &str) -> Self {
        open_dev_fuse();
        let mountpoint = scratch.path(format!("{image}.mnt"));
        std::fs::create_dir_all(&mountpoint).expect("making the mount point");
        scratch.rebasefs(&format!("mount {options} {image} {}", mountpoint.display()));
        Self::found(mountpoint)
    }

    /// A mount that the test has made by itself, with an absolute path.
    pub fn found(mountpoint: PathBuf) -> Self {
        let server =
            server_of(&mountpoint).unwrap_or_else(|| panic!("no server of {}", mountpoint.display()));
        Self { mountpoint, server, started: started(server) }
    }

    /// A file in the mount: `disk.raw`, `ctl/backing`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// All bytes of `disk.raw`.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path("disk.raw")).expect("reading disk.raw")
    }

    /// What a control file says.
    pub fn says(&self, file: &str) -> String {
        std::fs::read_to_string(self.path("ctl").join(file)).expect("reading a control file")
    }

    /// The value of a key in `ctl/status`, empty if there is none.
    pub fn status(&self, key: &str) -> String {
        let status = self.says("status");
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
        line.unwrap_or_default().trim_start().to_owned()
    }

    /// `echo NAME > ctl/backing`: writes a line in one piece, as a shell does.
    pub fn rebase(&self, backing: &str) -> std::io::Result<()> {
        std::fs::write(self.path("ctl/backing"), format!("{backing}\n"))
    }

    /// Runs a shell command in the mount; returns its exit code and what it wrote to standard
    /// error. In bash: the `echo` of dash says "I/O error" whatever the error is.
    pub fn shell(&self, line: &str) -> (Option<i32>, String) {
        let output = Command::new("bash").args(["-c", line]).current_dir(&self.mountpoint).output();
        let output = output.expect("running bash");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The process that serves.
    pub fn server(&self) -> u32 {
        self.server
    }

    /// Sends the server a signal.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.server.to_string()]).status();
        assert!(status.expect("running kill").success());
    }

    /// Waits until mount and server are gone.
    pub fn wait_until_gone(&self) {
        let (server, mountpoint) = (self.server, &self.mountpoint);
        wait_until("the server has ended", || !is_running(server) || started(server) != self.started);
        wait_until("the mount is gone", || !is_mounted(mountpoint));
        // A dead mount would answer ENOTCONN.
        let left = std::fs::read_dir(mountpoint).expect("reading the mount point afterwards");
        assert_eq!(left.count(), 0);
    }

    /// Unmounts and waits for the server to end, as dropping does.
    pub fn unmount(self) {
        drop(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if is_mounted(&self.mountpoint) {
            // A process that another test is starting at this moment has copies of our open files
            // until it executes its program.
            let umount = || Command::new("umount").arg(&self.mountpoint).output().expect("running umount");
            let start = Instant::now();
            let is_done = loop {
                if umount().status.success() {
                    break true;
                }
                if start.elapsed() > SOON {
                    break false;
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            if !is_done {
                let _ = Command::new("umount").arg("--lazy").arg(&self.mountpoint).status();
                assert!(std::thread::panicking(), "{} is still in use", self.mountpoint.display());
            }
        }
        if !std::thread::panicking() {
            self.wait_until_gone();
        }
    }
}

/// Waits for what should happen soon.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether something is mounted exactly here; asks the kernel's table, not the server.
pub fn is_mounted(mountpoint: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("reading the mount table");
    table.lines().any(|line| line.split(' ').nth(4) == mountpoint.to_str())
}

/// Whether a process runs; one that has ended but was not waited for does not. Its first thread may
/// have ended when others still have its files open.
pub fn is_running(process: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return false };
    threads.filter_map(Result::ok).any(|thread| {
        let status = std::fs::read_to_string(thread.path().join("stat"));
        status.is_ok_and(|status| !status.contains(") Z ") && !status.contains(") X "))
    })
}

/// When a process was started, in clock ticks since the machine was (`proc_pid_stat(5)`, field 22).
fn started(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, after_name) = status.rsplit_once(") ")?;
    after_name.split(' ').nth(19)?.parse().ok()
}

/// The rebasefs process that was started with this absolute mount point.
fn server_of(mountpoint: &Path) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").expect("reading /proc").filter_map(Result::ok);
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(|number: &u32| {
        let command = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        let mut words = command.split(|&byte| byte == 0);
        words.next() == Some(rebasefs().as_bytes())
            && words.any(|word| word == mountpoint.as_os_str().as_bytes())
            && is_running(*number)
    })
}

/// Ordinary users need /dev/fuse. Distributions make it 0666; minimal machines leave it at 0600.
pub fn open_dev_fuse() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mode = std::fs::Permissions::from_mode(0o666);
        File::open("/dev/fuse").and_then(|device| device.set_permissions(mode)).expect("chmod of /dev/fuse");
    });
}
