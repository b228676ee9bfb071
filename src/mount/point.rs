//! The directory to mount on: whether it will do, in words that say what to do about it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::chain::is_inside;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::errno;

/// Checks that `image` can be mounted on the directory `path`; returns its real path.
pub(super) fn check(path: &Path, image: &Path) -> Result<PathBuf> {
    let real = path.canonicalize().map_err(|e| cannot_use(e, path))?;
    if !real.is_dir() {
        return Err(Error::invalid("the mount point is not a directory").path(path));
    }
    if breaks_the_system(&real) {
        let error = Error::new(ErrorKind::NotPermitted, "a mount here would hide what the system needs");
        return Err(error.path(path).hint("mount on a directory of its own: `mkdir -p DIR`"));
    }
    if let Some(source) = mounted_on(&real) {
        // Attributes may come from the kernel's cache; a dead server is found out by this.
        std::fs::read_dir(&real).map_err(|e| cannot_use(e, path))?;
        let what = format!("'{source}' is mounted here already");
        let busy = Error::new(ErrorKind::Busy, what).path(path);
        return Err(busy.hint(format!("take it down first: `rebasefs umount {}`", in_shell(path))));
    }
    // By its real path; one that cannot be found is reported better by who opens it.
    if image.canonicalize().is_ok_and(|image| is_inside(&image, &real)) {
        let what = "the mount would hide the image and the files beside it";
        return Err(Error::invalid(what)
            .path(path)
            .hint("mount on a directory that does not contain the image"));
    }
    Ok(real)
}

/// What no system goes on without. Links (`/bin`) have been followed.
const NEEDED: [&str; 27] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/dev/mqueue",
    "/dev/pts",
    "/dev/shm",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/root",
    "/run",
    "/run/lock",
    "/sbin",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/sbin",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/tmp",
];

/// Whether a directory is one that the system needs, or lies where the kernel itself has files.
fn breaks_the_system(real: &Path) -> bool {
    NEEDED.iter().any(|needed| real == Path::new(needed))
        || real.starts_with("/proc")
        || real.starts_with("/sys")
}

fn cannot_use(error: io::Error, path: &Path) -> Error {
    let hint = match error.raw_os_error() {
        Some(errno::ENOTCONN) => {
            format!("a server died here; clean up with `rebasefs umount {}`", in_shell(path))
        }
        Some(errno::ENOENT) => format!("create the directory first: `mkdir -p {}`", in_shell(path)),
        _ => return Error::io(error, "cannot use the mount point").path(path),
    };
    Error::io(error, "cannot use the mount point").path(path).hint(hint)
}

/// A path as a word of a command that can be copied into a shell.
pub(super) fn in_shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    shlex::try_quote(&text).map_or_else(|_| text.to_string(), std::borrow::Cow::into_owned)
}

/// A line of the kernel's table of mounts.
#[derive(Debug)]
pub(super) struct Entry {
    /// The kernel's number of the mount.
    pub id: u64,
    /// That of the mount that it lies in.
    pub parent: u64,
    /// `MAJOR:MINOR` of what is mounted. Bind mounts of it have the same.
    pub device: String,
    /// The directory that it is mounted on.
    pub mountpoint: PathBuf,
    /// The type: `fuse.rebasefs`.
    pub kind: String,
    /// What is mounted: the image's path, unless `fsname` says otherwise.
    pub source: String,
    /// What the file system itself says of the mount: `rw,user_id=0,…`.
    pub options: String,
}

impl Entry {
    /// Whether it is one of FUSE's.
    pub(super) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }

    /// The value of one of the options: `user_id`.
    pub(super) fn option(&self, key: &str) -> Option<&str> {
        self.options.split(',').find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
    }
}

/// The source of the FUSE file system that is mounted exactly here. Others may be mounted over.
fn mounted_on(real: &Path) -> Option<String> {
    let table = table(Path::new(OWN_TABLE)).unwrap_or_default();
    table.into_iter().find(|entry| entry.is_fuse() && entry.mountpoint == real).map(|entry| entry.source)
}

/// The table of mounts that this process sees.
pub(super) const OWN_TABLE: &str = "/proc/self/mountinfo";

/// All mounts of such a table; of those on the same directory the topmost is the last.
pub(super) fn table(file: &Path) -> io::Result<Vec<Entry>> {
    let table = std::fs::read(file)?;
    Ok(table.split(|&byte| byte == b'\n').filter_map(entry).collect())
}

/// `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD…] - TYPE SOURCE OPTIONS`, see proc(5).
fn entry(line: &[u8]) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let text = |field: &[u8]| unescape(field).to_string_lossy().into_owned();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let [id, parent, device, _, mountpoint, ..] = fields[..] else { return None };
    let [kind, source, options] = fields.get(dash + 1..dash + 4)? else { return None };
    Some(Entry {
        id: number(id)?,
        parent: number(parent)?,
        device: text(device),
        mountpoint: unescape(mountpoint).into(),
        kind: text(kind),
        source: text(source),
        options: text(options),
    })
}

/// `\040` → space.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = (*first == b'\\')
            .then(|| tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}

/// Whether a path can be handed to the kernel at all.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(Error::invalid("the path contains a NUL byte"));
    }
    std::path::absolute(path).map_err(|e| Error::io(e, "cannot make the path absolute").path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] =
        b"36 35 0:52 / /mnt/my\\040disk rw,nosuid shared:1 - fuse.rebasefs /vm/a.qcow2 rw,user_id=0";

    #[test]
    fn a_fuse_mount_is_found_where_it_is() {
        let found = entry(LINE).unwrap();
        assert!(found.is_fuse());
        assert_eq!((found.id, found.parent, found.device.as_str()), (36, 35, "0:52"));
        assert_eq!(found.mountpoint, Path::new("/mnt/my disk"));
        assert_eq!((found.source.as_str(), found.option("user_id")), ("/vm/a.qcow2", Some("0")));
        assert!(!entry(b"36 35 8:1 / /mnt rw - ext4 /dev/sda1 rw").unwrap().is_fuse());
        assert!(entry(b"").is_none());
    }

    #[test]
    fn what_will_not_do_is_said_clearly() {
        let dir = tempfile::tempdir().unwrap();
        let said = |path: &Path| check(path, Path::new("/nowhere")).unwrap_err().to_string();
        assert!(said(&dir.path().join("missing")).contains("create the directory first"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(said(&file).contains("not a directory"));
        for needed in ["/", "/proc", "/sys/kernel", "/dev", "/usr/lib", "/tmp/.."] {
            assert!(said(Path::new(needed)).contains("what the system needs"), "{needed}");
        }
        let hidden = check(dir.path(), &file).unwrap_err().to_string();
        assert!(hidden.contains("would hide the image"), "{hidden}");
    }
}
