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
    let real = path.canonicalize().map_err(|e| cannot_use(e).path(path))?;
    if !real.is_dir() {
        return Err(Error::invalid("the mount point is not a directory").path(path));
    }
    if let Some(source) = mounted_on(&real) {
        // Attributes may come from the kernel's cache; a dead server is found out by this.
        std::fs::read_dir(&real).map_err(|e| cannot_use(e).path(path))?;
        let what = format!("'{source}' is mounted here already");
        let busy = Error::new(ErrorKind::Busy, what).path(path);
        return Err(busy.hint("take it down with `umount` first"));
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

fn cannot_use(error: io::Error) -> Error {
    let hint = match error.raw_os_error() {
        Some(errno::ENOTCONN) => "a server died here; clean up with `umount` or `fusermount3 -u`",
        Some(errno::ENOENT) => "create the directory first",
        _ => return Error::io(error, "cannot use the mount point"),
    };
    Error::io(error, "cannot use the mount point").hint(hint)
}

/// The source of the FUSE file system that is mounted exactly here. Others may be mounted over.
fn mounted_on(real: &Path) -> Option<String> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let mut lines = table.split(|&byte| byte == b'\n');
    lines.find_map(|line| fuse_source(line, real))
}

/// `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD…] - TYPE SOURCE OPTIONS`, see proc(5).
fn fuse_source(line: &[u8], mountpoint: &Path) -> Option<String> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let (kind, source) = (fields.get(dash + 1)?, fields.get(dash + 2)?);
    let is_fuse = *kind == b"fuse" || kind.starts_with(b"fuse.");
    let is_here = unescape(fields.get(4)?) == mountpoint.as_os_str();
    (is_fuse && is_here).then(|| unescape(source).to_string_lossy().into_owned())
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
        assert_eq!(fuse_source(LINE, Path::new("/mnt/my disk")).as_deref(), Some("/vm/a.qcow2"));
        assert_eq!(fuse_source(LINE, Path::new("/mnt")), None);
        let ext4 = b"36 35 8:1 / /mnt rw - ext4 /dev/sda1 rw";
        assert_eq!(fuse_source(ext4, Path::new("/mnt")), None);
        assert_eq!(fuse_source(b"", Path::new("/mnt")), None);
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
