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
pub(super) struct Entry {
    /// The type: `fuse` or `fuse.rebasefs`.
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
    entries(real).into_iter().find(Entry::is_fuse).map(|entry| entry.source)
}

/// All that is mounted exactly here, the topmost last.
pub(super) fn entries(real: &Path) -> Vec<Entry> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|&byte| byte == b'\n').filter_map(|line| entry(line, real)).collect()
}

/// `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD…] - TYPE SOURCE OPTIONS`, see proc(5).
fn entry(line: &[u8], mountpoint: &Path) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let text = |field: &[u8]| unescape(field).to_string_lossy().into_owned();
    let [kind, source, options] = fields.get(dash + 1..dash + 4)? else { return None };
    let entry = Entry { kind: text(kind), source: text(source), options: text(options) };
    (unescape(fields.get(4)?) == mountpoint.as_os_str()).then_some(entry)
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
        let found = entry(LINE, Path::new("/mnt/my disk")).unwrap();
        assert!(found.is_fuse());
        assert_eq!((found.source.as_str(), found.option("user_id")), ("/vm/a.qcow2", Some("0")));
        assert!(entry(LINE, Path::new("/mnt")).is_none());
        let ext4 = b"36 35 8:1 / /mnt rw - ext4 /dev/sda1 rw";
        assert!(!entry(ext4, Path::new("/mnt")).unwrap().is_fuse());
        assert!(entry(b"", Path::new("/mnt")).is_none());
    }

    #[test]
    fn what_will_not_do_is_said_clearly() {
        let dir = tempfile::tempdir().unwrap();
        let said = |path: &Path| check(path, Path::new("/nowhere")).unwrap_err().to_string();
        assert!(said(&dir.path().join("missing")).contains("create the directory first"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(said(&file).contains("not a directory"));
        let hidden = check(dir.path(), &file).unwrap_err().to_string();
        assert!(hidden.contains("would hide the image"), "{hidden}");
    }
}
