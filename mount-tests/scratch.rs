//! A scratch directory to make images in, and the programs that tests run there.
//!
//! A failing command panics with its words, its output and what lies in the directory. A missing
//! tool is a failure that says what to install, never a skip.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
        Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
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

    /// Draws into an existing image with qemu-io: one byte in hexadecimal a cluster, `--` for
    /// what is left alone, `zz` for a zero write.
    pub fn draw(&self, image: &str, cluster: usize, picture: &str) {
        let commands: Vec<String> = picture
            .split_whitespace()
            .enumerate()
            .filter(|(_, cell)| *cell != "--")
            .map(|(number, cell)| match cell {
                "zz" => format!("write -z {} {cluster}", number * cluster),
                _ => format!("write -P 0x{cell} {} {cluster}", number * cluster),
            })
            .collect();
        if !commands.is_empty() {
            self.qemu_io("qcow2", image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

/// The program under test.
pub fn rebasefs() -> &'static str {
    env!("CARGO_BIN_EXE_rebasefs")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}
