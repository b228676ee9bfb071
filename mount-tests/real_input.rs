//! The main job on real input: file systems full of real files, written to by a real kernel, mounted
//! from `disk.raw`, and rebased with `echo` while they are mounted.
//!
//! ```text
//! tree      real files                 old.raw    mkfs, filled with the tree
//! guest.raw old.raw, then written to   cow.qcow2  what differs, as an overlay of old.raw
//! new.raw   old.raw, then overwritten here and there
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::mounted::Mounted;
use crate::scratch::{LoopMount, Scratch};

const MIB: u64 = 1 << 20;

/// A file system to make images of.
struct FileSystem {
    name: &'static str,
    /// Bytes of the disk, and of the files to put on it.
    size: u64,
    files: u64,
    /// Makes it in `old.raw` with what is in `tree`; `None`: the files are copied in afterwards.
    filled: Option<&'static str>,
    empty: &'static str,
    /// How to mount it without writing.
    read_only: &'static str,
}

#[test]
fn ext4() {
    read_and_rebase(&FileSystem {
        name: "ext4",
        size: 512 * MIB,
        files: 300 * MIB,
        filled: Some("mkfs.ext4 -q -F -d tree old.raw"),
        empty: "",
        read_only: "ro,noload",
    });
}

#[test]
fn xfs() {
    read_and_rebase(&FileSystem {
        name: "xfs",
        size: 320 * MIB,
        files: 60 * MIB,
        filled: None,
        empty: "mkfs.xfs -q old.raw",
        // The guest's and this one have the same UUID; never both at once, but tests run in parallel.
        read_only: "ro,norecovery,nouuid",
    });
}

#[test]
fn btrfs() {
    read_and_rebase(&FileSystem {
        name: "btrfs",
        size: 256 * MIB,
        files: 60 * MIB,
        filled: Some("mkfs.btrfs -q --rootdir tree old.raw"),
        empty: "",
        read_only: "ro",
    });
}

fn read_and_rebase(filesystem: &FileSystem) {
    let scratch = Scratch::new();
    make_images(&scratch, filesystem);
    let [guest, old, new] = ["guest.raw", "old.raw", "new.raw"].map(|name| hash(&scratch.path(name)));
    assert!(old != new && guest != old, "the images differ, or nothing is tested");

    let mount = Mounted::new(&scratch, "cow.qcow2");
    let disk = mount.path("disk.raw");
    assert_eq!(hash_served(&disk), guest, "before");
    {
        let guest_sees = LoopMount::new(&scratch, &disk, filesystem.read_only);
        scratch.ok("diff", &format!("-r -x lost+found tree {}", guest_sees.path().display()));
        for during in hashes_during_rebase(&mount) {
            assert_eq!(during, guest, "during");
        }
        scratch.ok("diff", &format!("-r -x lost+found tree {}", guest_sees.path().display()));
    }
    assert_eq!(hash_served(&disk), guest, "after");
    assert_eq!(mount.says("backing"), "new.raw\n");
    mount.unmount();

    scratch.check_clean("cow.qcow2");
    scratch.same("cow.qcow2", "guest.raw");
    let info: serde_json::Value =
        serde_json::from_str(&scratch.qemu_img("info --output=json cow.qcow2")).unwrap();
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&"new.raw".into(), &"raw".into())
    );
    assert_eq!((hash(&scratch.path("old.raw")), hash(&scratch.path("new.raw"))), (old, new), "untouched");
}

/// Tells the mount to rebase, as a person would; returns the hashes of `disk.raw` as it was read
/// meanwhile.
fn hashes_during_rebase(mount: &Mounted) -> Vec<String> {
    thread::scope(|scope| {
        let rebase = scope.spawn(|| mount.shell("echo new.raw > ctl/backing"));
        let mut hashes = vec![];
        while !rebase.is_finished() || hashes.is_empty() {
            hashes.push(hash_served(&mount.path("disk.raw")));
        }
        assert_eq!(rebase.join().unwrap(), (Some(0), String::new()));
        hashes
    })
}

/// A digest of what the mount answers now: past the page cache.
fn hash_served(disk: &Path) -> String {
    digest(&format!("dd if={} iflag=direct bs=1M status=none", disk.display()))
}

fn hash(file: &Path) -> String {
    digest(&format!("cat {}", file.display()))
}

/// BLAKE2, which takes a fifth of the time of SHA-256 where the processor has no instructions for it.
fn digest(reader: &str) -> String {
    let pipeline = format!("set -o pipefail; {reader} | b2sum");
    let output = Command::new("bash").args(["-c", &pipeline]).output().expect("running bash");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn make_images(scratch: &Scratch, filesystem: &FileSystem) {
    copy_real_files(&scratch.path("tree"), filesystem.files);
    make_base(scratch, filesystem);
    copy(scratch, "old.raw", "guest.raw");
    {
        let guest = LoopMount::new(scratch, &scratch.path("guest.raw"), "rw");
        for place in [guest.path(), &scratch.path("tree")] {
            write_as_a_guest(scratch, place);
        }
    }
    // The overlay that a guest leaves which makes these changes: the clusters that differ.
    scratch.qemu_img("create -q -f qcow2 -b guest.raw -F raw cow.qcow2");
    scratch.qemu_img("rebase -b old.raw -F raw cow.qcow2");

    copy(scratch, "old.raw", "new.raw");
    let overwritten = vec![0x5a; 70_000];
    for at in (0..filesystem.size - MIB).step_by(3 << 20) {
        scratch.poke("new.raw", at, &overwritten);
    }
}

fn make_base(scratch: &Scratch, filesystem: &FileSystem) {
    let old = scratch.path("old.raw");
    fs::File::create(&old).and_then(|file| file.set_len(filesystem.size)).unwrap();
    let (program, line) = filesystem.filled.unwrap_or(filesystem.empty).split_once(' ').unwrap();
    scratch.ok(program, line);
    if filesystem.filled.is_none() {
        let mounted = LoopMount::new(scratch, &old, "rw");
        scratch.ok("cp", &format!("-r tree/. {}", mounted.path().display()));
    }
    let found = scratch.ok("blkid", "-p -o value -s TYPE old.raw");
    assert_eq!(found.trim(), filesystem.name);
}

/// What a guest does to its disk: new files, files gone, files longer, files overwritten.
fn write_as_a_guest(scratch: &Scratch, root: &Path) {
    let root = root.display();
    let script = format!(
        "set -e; cd {root}; cp -r 1 copied; rm -r 2; \
         find 3 -type f -size +8k | sort | head -n 40 | while read -r file; do \
           echo appended >> \"$file\"; printf changed | dd of=\"$file\" bs=4096 seek=1 conv=notrunc status=none; \
         done; sync -f ."
    );
    let ended = scratch.run_args("bash", &["-c", &script]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{script}");
}

fn copy(scratch: &Scratch, from: &str, to: &str) {
    scratch.ok("cp", &format!("--sparse=always {from} {to}"));
}

/// Copies real files, in numbered directories of about 8 MiB, until there are so many bytes: some
/// that are small, then large ones. Where there is a Rust toolchain there are enough of them.
fn copy_real_files(tree: &Path, bytes: u64) {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().expect("running rustc");
    let sysroot = PathBuf::from(String::from_utf8(sysroot.stdout).unwrap().trim());
    let places = [("/usr/share/doc".as_ref(), 24 * MIB), (&*sysroot, bytes), ("/usr/share".as_ref(), bytes)];
    let mut copied = 0;
    for (place, enough) in places {
        copied += copy_files_of(place, tree, copied, enough);
    }
    assert!(copied >= bytes, "only {copied} bytes of files found in /usr/share and {}", sysroot.display());
}

/// Copies files of a directory until there are `enough` bytes with those that are there; returns how
/// many were copied now.
fn copy_files_of(place: &Path, tree: &Path, already: u64, enough: u64) -> u64 {
    let mut files = vec![];
    list_files(place, &mut files);
    let mut total = already;
    for (file, length) in files {
        // What would fill the disk by itself is left out.
        if total >= enough || total + length > enough + 16 * MIB {
            continue;
        }
        let directory = tree.join((1 + total / (8 * MIB)).to_string());
        fs::create_dir_all(&directory).unwrap();
        let name = file.file_name().unwrap().to_string_lossy();
        fs::copy(&file, directory.join(format!("{total}-{name}"))).unwrap();
        total += length;
    }
    total - already
}

/// The regular files under a directory with their lengths, in an order that does not change.
fn list_files(directory: &Path, files: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut entries: Vec<_> = entries.map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let metadata = entry.metadata().unwrap();
        if metadata.is_file() {
            files.push((entry.path(), metadata.len()));
        } else if metadata.is_dir() {
            list_files(&entry.path(), files);
        }
    }
}
