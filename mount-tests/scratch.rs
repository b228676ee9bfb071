//! A scratch directory to make images in, and the programs that tests run there.
//!
//! A failing command panics with its words, its output and what lies in the directory. A missing
//! tool is a failure that says what to install, never a skip.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::mounted::{open_dev_fuse, wait_until};

/// What starts a program as whoever runs the tests, or as an ordinary user.
pub const AS_ROOT: &[&str] = &[];
pub const AS_NOBODY: &[&str] = &["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];

/// A directory that is removed with the test.
pub struct Scratch(tempfile::TempDir);

/// What a command printed, and how it ended.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("rebasefs-").tempdir().expect("a temporary directory"))
    }

    /// One in this directory, which may be another file system.
    pub fn within(directory: &Path) -> Self {
        Self(tempfile::tempdir_in(directory).expect("a temporary directory"))
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a command in the directory, whatever comes of it. `line` is split at white space.
    pub fn run(&self, program: impl AsRef<OsStr>, line: &str) -> Ended {
        self.run_args(program, &line.split_whitespace().collect::<Vec<_>>())
    }

    /// The same with arguments that may contain spaces.
    pub fn run_args(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Ended {
        let program = program.as_ref();
        let output = Command::new(program).args(arguments).current_dir(self.0.path()).output();
        let Output { status, stdout, stderr } = output.unwrap_or_else(|e| {
            let program = program.to_string_lossy();
            panic!("cannot run {program}: {e}; scripts/test installs what the tests need")
        });
        Ended { code: status.code(), stdout: text(&stdout), stderr: text(&stderr) }
    }

    /// Runs a script that lies beside this file in the directory, which anybody may use then; `as_whom`
    /// is what starts a program as somebody.
    pub fn script(&self, as_whom: &[&str], name: &str, arguments: &[&str]) -> Ended {
        open_dev_fuse();
        self.ok("chmod", "777 .");
        // An ordinary user may not be able to read our source.
        let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/mount-tests")).join(name);
        std::fs::copy(script, self.path(name)).expect("copying a script");
        let line = [as_whom, &["bash", name], arguments].concat();
        self.run_args(line[0], &line[1..])
    }

    /// Runs a command that must succeed; returns what it printed.
    pub fn ok(&self, program: impl AsRef<OsStr>, line: &str) -> String {
        let ended = self.run(program.as_ref(), line);
        self.demand(ended.code == Some(0), program.as_ref(), line, &ended);
        ended.stdout
    }

    fn demand(&self, is_right: bool, program: &OsStr, line: &str, ended: &Ended) {
        if is_right {
            return;
        }
        let listing = self.run("ls", "-lnsR").stdout;
        let Ended { code, stdout, stderr } = ended;
        let program = program.to_string_lossy();
        panic!("{program} {line}\nended with {code:?}\n{stdout}{stderr}\nin\n{listing}");
    }

    /// Runs rebasefs, which must succeed; returns what it printed.
    pub fn rebasefs(&self, line: &str) -> String {
        self.ok(rebasefs(), line)
    }

    /// Runs rebasefs, which must fail with this exit code; returns its message.
    pub fn rebasefs_fails(&self, code: i32, line: &str) -> String {
        let ended = self.run(rebasefs(), line);
        self.demand(ended.code == Some(code), rebasefs().as_ref(), line, &ended);
        ended.stderr
    }

    pub fn qemu_img(&self, line: &str) -> String {
        self.ok("qemu-img", line)
    }

    /// Runs qemu-io commands (`"write -P 0x11 0 64k"`) on an image.
    pub fn qemu_io(&self, format: &str, image: &str, commands: &[&str]) -> String {
        let mut arguments = vec!["-f", format, image];
        arguments.extend(commands.iter().flat_map(|command| ["-c", *command]));
        let ended = self.run_args("qemu-io", &arguments);
        // qemu-io reports failing commands on its standard output, with exit code 0 in old versions.
        let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
        self.demand(is_right, "qemu-io".as_ref(), &arguments.join(" "), &ended);
        ended.stdout
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).expect("writing a file of the test");
    }

    /// Overwrites bytes of a file, as damage or as what no tool writes.
    pub fn poke(&self, name: &str, at: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(self.path(name));
        let file = file.expect("opening a file of the test");
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).expect("damaging a file of the test");
    }

    /// Cuts so many bytes off the end of a file.
    pub fn cut(&self, name: &str, bytes: u64) {
        let file = std::fs::File::options().write(true).open(self.path(name));
        let file = file.expect("opening a file of the test");
        let size = file.metadata().expect("a file has a size").len();
        file.set_len(size - bytes).expect("cutting a file of the test");
    }

    /// The guest-visible bytes of an image, as `qemu-img convert` sees them.
    pub fn guest_bytes(&self, format: &str, image: &str) -> Vec<u8> {
        let raw = format!("{image}.convert.raw");
        self.qemu_img(&format!("convert -U -f {format} -O raw {image} {raw}"));
        let bytes = std::fs::read(self.path(&raw)).expect("reading what was converted");
        std::fs::remove_file(self.path(&raw)).expect("removing what was converted");
        bytes
    }

    /// `qemu-img check` finds neither errors nor leaks.
    pub fn check_clean(&self, image: &str) {
        let said = self.qemu_img(&format!("check -f qcow2 {image}"));
        assert!(said.contains("No errors were found"), "{image}: {said}");
    }

    /// `qemu-img compare` finds the guest-visible bytes of two images identical.
    pub fn same(&self, first: &str, second: &str) {
        self.qemu_img(&format!("compare -U {first} {second}"));
    }

    /// Draws a raw file: one byte in hexadecimal a cluster, `--` for a hole.
    pub fn draw_raw(&self, name: &str, cluster: usize, picture: &str) {
        let cells: Vec<&str> = picture.split_whitespace().collect();
        let file = std::fs::File::create(self.path(name)).expect("creating a raw file");
        file.set_len((cells.len() * cluster) as u64).expect("sizing a raw file");
        for (number, cell) in cells.iter().enumerate().filter(|(_, cell)| **cell != "--") {
            let bytes = vec![u8::from_str_radix(cell, 16).expect("a cell is a byte"); cluster];
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, (number * cluster) as u64)
                .expect("drawing a raw file");
        }
    }

    /// Draws into an existing qcow2 image with qemu-io, a cell a cluster:
    ///
    /// | cell | the cluster |
    /// |---|---|
    /// | `--` | is left alone |
    /// | `11` | is filled with this byte (hexadecimal) |
    /// | `c11` | the same, compressed |
    /// | `zz` | is written with zeros (`write -z`) |
    /// | `za` | the same after data was written: zeros that keep their place in the file |
    /// | `zu` | the same, giving the place back (`write -z -u`) |
    /// | `..` | is discarded after data was written |
    pub fn draw(&self, image: &str, cluster: usize, picture: &str) {
        let cells = picture.split_whitespace().enumerate();
        let commands: Vec<String> =
            cells.flat_map(|(number, cell)| drawing(cell, number * cluster, cluster)).collect();
        if !commands.is_empty() {
            self.qemu_io("qcow2", image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

/// The qemu-io commands that draw one cell.
fn drawing(cell: &str, at: usize, length: usize) -> Vec<String> {
    let write = |options: &str| format!("write -q {options} {at} {length}");
    let data = write("-P 0xff");
    match cell {
        "--" => vec![],
        "zz" => vec![write("-z")],
        "za" => vec![data, write("-z")],
        "zu" => vec![data, write("-z -u")],
        ".." => vec![data, format!("discard -q {at} {length}")],
        _ => match cell.strip_prefix('c').filter(|byte| byte.len() == 2) {
            Some(byte) => vec![write(&format!("-c -P 0x{byte}"))],
            None => vec![write(&format!("-P 0x{cell}"))],
        },
    }
}

/// The program under test.
pub fn rebasefs() -> &'static str {
    env!("CARGO_BIN_EXE_rebasefs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file as a block device, detached with the value.
pub struct LoopDevice(String);

impl LoopDevice {
    pub fn attach(file: &Path) -> Self {
        Self::with(file, &[])
    }

    /// The same with these options of losetup.
    pub fn with(file: &Path, options: &[&str]) -> Self {
        let output = Command::new("losetup").args(["-f", "--show"]).args(options).arg(file).output();
        let Output { status, stdout, stderr } = output.expect("losetup is needed; scripts/test installs it");
        assert!(status.success(), "losetup {}: {}", file.display(), text(&stderr));
        Self(text(&stdout).trim().to_owned())
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What was attached for reading only would stay so for whoever is given the device next.
        let _ = Command::new("blockdev").args(["--setrw", &self.0]).status();
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A file system in a file, mounted by the kernel through a loop device.
pub struct LoopMount(PathBuf, PathBuf);

impl LoopMount {
    pub fn new(scratch: &Scratch, file: &Path, options: &str) -> Self {
        let mountpoint = scratch.path("guest.mnt");
        std::fs::create_dir_all(&mountpoint).unwrap();
        scratch.ok("mount", &format!("-o loop,{options} {} {}", file.display(), mountpoint.display()));
        Self(mountpoint, file.to_owned())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn is_attached(&self) -> bool {
        let output = Command::new("losetup").arg("-j").arg(&self.1).output().expect("running losetup");
        !output.stdout.is_empty()
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let umount =
            || Command::new("umount").arg(&self.0).output().expect("running umount").status.success();
        if std::thread::panicking() {
            umount();
        } else {
            // A process that another test is starting has copies of our open files until it executes its
            // program.
            wait_until("the file system can be unmounted", umount);
            wait_until("the loop device is detached", || !self.is_attached());
        }
    }
}
