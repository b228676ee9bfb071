//! What a file stands on: the file system that it lies on, the device under that, the file under a loop
//! device, the disks under a mapped one, the images behind another mount of ours. By any of these ways a
//! disk could come to stand on itself; every read would wait for itself then.
//!
//! Asks the kernel alone (`/sys`, `/proc`, the loop driver) and no server of a file system: one that does
//! not answer stops nobody, and one that lies is not believed. What a server of ours has open is seen in
//! `/proc`; it tells which mount is its own by a memory file of that name, see [`announce`].

use std::collections::{HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::{File, read_dir, read_link, read_to_string};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::file::Identity;
use crate::sys;

/// More files, file systems and devices than this are not followed: no machine has a reason for it.
const MAX_REACHED: usize = 1 << 16;

/// All that some files stand on.
#[derive(Debug, Default)]
pub(super) struct Ground {
    /// Files and block devices.
    files: HashSet<Identity>,
    /// Their file systems (`st_dev`).
    file_systems: HashSet<u64>,
    /// Whether a mount of ours is among them.
    has_mount: bool,
}

impl Ground {
    /// What a file stands on, without itself, unless it stands on itself.
    ///
    /// # Errors
    /// It has no end.
    pub(super) fn of(file: Identity) -> Result<Self> {
        let mut ground = Self::default();
        let mut next = VecDeque::from(ground.below(file, false));
        while let Some(file) = next.pop_front() {
            if !ground.files.insert(file) {
                continue;
            }
            if ground.files.len() > MAX_REACHED {
                let what = format!("stands on more than {MAX_REACHED} files and devices");
                return Err(Error::new(ErrorKind::Loop, what));
            }
            next.extend(ground.below(file, true));
        }
        Ok(ground)
    }

    /// The same of a file that is going to be made in this directory.
    pub(super) fn of_directory(directory: &Path) -> Result<Self> {
        match directory.metadata() {
            Ok(metadata) => Self::of(Identity { device: metadata.dev(), inode: metadata.ino() }),
            // Nothing can be made there.
            Err(_) => Ok(Self::default()),
        }
    }

    /// Whether the file or device is part of it.
    pub(super) fn has(&self, file: Identity) -> bool {
        self.files.contains(&file)
    }

    /// Whether the file system is part of it.
    pub(super) fn has_file_system(&self, device: u64) -> bool {
        self.file_systems.contains(&device)
    }

    /// Whether a mount of ours is part of it.
    pub(super) fn has_mount(&self) -> bool {
        self.has_mount
    }

    /// What is next below a file or device, unless that is known already.
    fn below(&mut self, file: Identity, is_reached: bool) -> Vec<Identity> {
        if file.is_block_device() {
            below_device(file.inode)
        } else if self.file_systems.insert(file.device) {
            self.below_file_system(file.device, is_reached)
        } else {
            Vec::new()
        }
    }

    /// What a file system stores its files in. Of one that is not mounted in our name space only what is
    /// reached through something else can be a mount of ours.
    fn below_file_system(&mut self, device: u64, is_reached: bool) -> Vec<Identity> {
        if sys::device_numbers(device).0 != 0 {
            return vec![Identity::of_device(device)];
        }
        let mounts: Vec<Mount> = Mount::all().into_iter().filter(|mount| mount.device == device).collect();
        let is_fuse = mounts.iter().any(Mount::is_fuse);
        let may_be_ours = is_fuse || mounts.is_empty() && is_reached;
        if !may_be_ours {
            // Btrfs has a device number of its own.
            let sources = mounts.iter().filter(|mount| mount.source.starts_with("/dev"));
            return sources.filter_map(|mount| Identity::of(&mount.source).ok()).collect();
        }
        let servers = servers(device, mounts.iter().find_map(Mount::user));
        self.has_mount |= !servers.is_empty();
        servers.iter().flat_map(Server::files).collect()
    }
}

/// What a block device is made of.
fn below_device(device: u64) -> Vec<Identity> {
    let (major, minor) = sys::device_numbers(device);
    let Ok(place) = Path::new("/sys/dev/block").join(format!("{major}:{minor}")).canonicalize() else {
        return Vec::new();
    };
    let mut below: Vec<Identity> = Vec::new();
    if place.join("partition").exists() {
        below.extend(place.parent().and_then(number_of));
    }
    if place.join("loop").exists() {
        below.extend(below_loop(&place));
    }
    let disks = read_dir(place.join("slaves")).into_iter().flatten().filter_map(io::Result::ok);
    below.extend(disks.filter_map(|disk| number_of(&disk.path())));
    below
}

/// The device of a directory in `/sys`.
fn number_of(place: &Path) -> Option<Identity> {
    let text = read_to_string(place.join("dev")).ok()?;
    device_number(text.trim()).map(Identity::of_device)
}

/// `MAJOR:MINOR`
fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(sys::device(major.parse().ok()?, minor.parse().ok()?))
}

/// The file behind a loop device. The driver knows it, whatever its path leads to; only who may not open
/// the device has to go by that.
fn below_loop(place: &Path) -> Option<Identity> {
    let by_driver = || {
        let device = File::open(Path::new("/dev").join(place.file_name()?)).ok()?;
        let rdev = device.metadata().ok()?.rdev();
        let (file_system, inode, rdev) = (Some(Identity::of_device(rdev)) == number_of(place))
            .then(|| sys::behind_loop(&device).ok())??;
        Some(match rdev {
            0 => Identity { device: file_system, inode },
            rdev if rdev == file_system => Identity { device: file_system, inode },
            rdev => Identity::of_device(rdev),
        })
    };
    let by_path = || {
        let path = std::fs::read(place.join("loop/backing_file")).ok()?;
        sys::identity_unasked(Path::new(&OsString::from_vec(path.strip_suffix(b"\n")?.to_vec()))).ok()
    };
    by_driver().or_else(|| by_path().map(as_identity))
}

fn as_identity((device, inode, rdev): (u64, u64, u64)) -> Identity {
    if rdev == 0 { Identity { device, inode } } else { Identity::of_device(rdev) }
}

/// How a server's memory file is called.
const MARK: &str = "rebasefs-mount";

/// Lets others find out, as long as the file is kept, that this process serves the mount with this device
/// number, and of which image.
///
/// # Errors
/// The kernel has no memory files.
pub(crate) fn announce(device: u64, image: Identity) -> io::Result<File> {
    sys::memory_file(&mark(device, Some(image)))
}

/// What begins the name of the memory file of a mount, or is all of it.
fn mark(device: u64, image: Option<Identity>) -> String {
    let (major, minor) = sys::device_numbers(device);
    let image = image.map_or(String::new(), |image| format!("{}:{}", image.device, image.inode));
    format!("{MARK} {major}:{minor} {image}")
}

/// A process that serves a mount of ours.
struct Server {
    process: PathBuf,
    /// The mount and its image, as it has announced them.
    device: u64,
    image: Identity,
}

impl Server {
    /// The servers among the processes into which we may look and that belong to one of these users.
    fn all(users: &[u32]) -> Vec<Self> {
        let processes = read_dir("/proc").into_iter().flatten().filter_map(io::Result::ok);
        let is_process = |name: &[u8]| name.iter().all(u8::is_ascii_digit);
        let processes = processes.filter(|entry| is_process(entry.file_name().as_bytes()));
        let mut servers = Vec::new();
        for process in processes.map(|entry| entry.path()) {
            if process.metadata().is_ok_and(|metadata| users.contains(&metadata.uid())) {
                let marks = descriptors(&process).filter_map(|path| read_link(path).ok());
                servers.extend(marks.filter_map(|mark| Self::announced(&process, &mark)));
            }
        }
        servers
    }

    /// `/memfd:rebasefs-mount 0:52 2049:77 (deleted)`
    fn announced(process: &Path, mark: &Path) -> Option<Self> {
        let rest = mark.to_str()?.strip_prefix("/memfd:")?.strip_prefix(MARK)?;
        let mut words = rest.split_ascii_whitespace();
        let device = device_number(words.next()?)?;
        let (image_device, inode) = words.next()?.split_once(':')?;
        let image = Identity { device: image_device.parse().ok()?, inode: inode.parse().ok()? };
        Some(Self { process: process.to_owned(), device, image })
    }

    /// The files and block devices that it has open.
    fn files(&self) -> impl Iterator<Item = Identity> {
        descriptors(&self.process).filter_map(|path| sys::identity_unasked(&path).ok()).map(as_identity)
    }
}

/// The open files of a process, as links in `/proc`.
fn descriptors(process: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let open = read_dir(process.join("fd")).into_iter().flatten().filter_map(io::Result::ok);
    open.map(|entry| entry.path()).take(MAX_REACHED)
}

/// The servers of a mount that belong to root, to us, or to whoever has mounted it: others could call
/// themselves so, too.
fn servers(device: u64, user: Option<u32>) -> Vec<Server> {
    let users = [0, sys::effective_ids().0, user.unwrap_or(0)];
    Server::all(&users).into_iter().filter(|server| server.device == device).collect()
}

/// Where this image is mounted by us, if it is.
fn mount_of(image: Identity) -> Option<PathBuf> {
    let servers = Server::all(&[0, sys::effective_ids().0]);
    let devices: Vec<u64> =
        servers.iter().filter(|server| server.image == image).map(|server| server.device).collect();
    Mount::all().into_iter().find(|mount| devices.contains(&mount.device)).map(|mount| mount.mountpoint)
}

/// The mount of ours that a file lies in, if it does.
fn mount_around(file: Identity) -> Option<PathBuf> {
    let mount = Mount::all().into_iter().find(|mount| mount.device == file.device && mount.is_fuse())?;
    (!servers(file.device, mount.user()).is_empty()).then_some(mount.mountpoint)
}

/// An error about writing to the file at `path`, with a better hint if it is mounted by us, or lies in a mount
/// of ours.
pub(crate) fn or_rebase_mounted(error: Error, path: &Path) -> Error {
    let Ok((device, inode, rdev)) = sys::identity_unasked(path) else { return error };
    let file = as_identity((device, inode, rdev));
    let mountpoint = match error.kind() {
        ErrorKind::Busy => mount_of(file),
        _ => mount_around(file),
    };
    let Some(control) = mountpoint.map(|mountpoint| mountpoint.join("ctl/backing")) else { return error };
    let control = control.to_string_lossy();
    let control = shlex::try_quote(&control).map_or(control.clone(), |quoted| quoted.into_owned().into());
    error.better_hint(format!("rebasefs has it mounted: `echo FILE > {control}` rebases it there"))
}

/// The device number of what is mounted on this real path, the topmost. No server is asked.
pub(crate) fn mounted_at(mountpoint: &Path) -> Option<u64> {
    let here = |mount: &Mount| mount.mountpoint == mountpoint;
    Mount::all().into_iter().rfind(here).map(|mount| mount.device)
}

/// A line of the kernel's table of mounts.
struct Mount {
    device: u64,
    mountpoint: PathBuf,
    kind: String,
    source: PathBuf,
    options: String,
}

impl Mount {
    fn all() -> Vec<Self> {
        let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        table.split(|&byte| byte == b'\n').filter_map(Self::parse).collect()
    }

    /// `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD…] - TYPE SOURCE OPTIONS`, see proc(5).
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let [kind, source, options] = fields.get(dash + 1..dash + 4)? else { return None };
        Some(Self {
            device: device_number(&text(fields.get(2)?))?,
            mountpoint: unescaped(fields.get(4)?),
            kind: text(kind),
            source: unescaped(source),
            options: text(options),
        })
    }

    fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }

    /// Who has mounted it.
    fn user(&self) -> Option<u32> {
        self.options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok())
    }
}

/// `\040` → space.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let octal = digits.filter(|_| *first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_known_by_what_it_announces() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, "x").unwrap();
        let image = Identity::of(&path).unwrap();
        // No file system has this number.
        let device = sys::device(0, 0xf_fff0);
        let us = [sys::effective_ids().0];
        let found = || Server::all(&us).into_iter().find(|server| server.device == device);
        assert!(found().is_none());
        let kept = announce(device, image).unwrap();
        let open = File::open(&path).unwrap();
        let server = found().unwrap();
        assert_eq!(server.image, image);
        assert!(server.files().any(|file| file == image));
        drop((kept, open));
        // A process that another test is starting at this moment has a copy until it executes its program.
        let start = std::time::Instant::now();
        while found().is_some() {
            assert!(start.elapsed().as_secs() < 60, "the mark is still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_line_of_the_mount_table_is_understood() {
        let line =
            b"36 35 0:52 / /mnt/my\\040disk rw,nosuid shared:1 - fuse.rebasefs /vm/a.qcow2 rw,user_id=7";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.device, mount.user()), (sys::device(0, 52), Some(7)));
        assert_eq!((mount.mountpoint.as_path(), mount.is_fuse()), (Path::new("/mnt/my disk"), true));
        assert!(Mount::parse(b"").is_none());
    }

    #[test]
    fn what_is_no_mark_is_no_server() {
        for mark in ["/memfd:x (deleted)", "/memfd:rebasefs-mount 0:1", "/memfd:rebasefs-mount a:1 2:3", "/x"]
        {
            assert!(Server::announced(Path::new("/proc/1"), Path::new(mark)).is_none(), "{mark}");
        }
    }
}
