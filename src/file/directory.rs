//! The directory that an image lies in, held open.
//!
//! A name is only a way to a file, and the way can lead elsewhere a moment later: a symbolic link in it is
//! turned, a directory renamed. What is relative to an image is looked for in the directory in which the
//! image was found, by its descriptor. Reads and writes no file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Identity;
use crate::sys;

/// A directory, held open.
#[derive(Debug)]
pub struct Directory(File);

impl Directory {
    /// The directory that `path` lies in, as its name says (that of a symbolic link, not of the file that it
    /// leads to), and the name that it has there. A relative path begins in `from`, or in the current directory.
    ///
    /// # Errors
    /// There is no such directory, or it cannot be reached.
    pub fn of<'a>(path: &'a Path, from: Option<&Self>) -> io::Result<(Self, &'a Path)> {
        let bytes = path.as_os_str().as_bytes();
        let start = bytes.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        let (directory, name) = match bytes.split_at(start) {
            (b"", name) => (Path::new("."), as_path(name)),
            // A path that ends with a slash is that of a directory.
            (directory, b"") => (as_path(directory), Path::new(".")),
            (directory, name) => (as_path(directory), as_path(name)),
        };
        let opened = open(from, directory, sys::O_PATH | sys::O_DIRECTORY)?;
        Ok((Self(opened), name))
    }

    /// What a name leads to from here: which file it is.
    ///
    /// # Errors
    /// There is none, or it cannot be looked at.
    pub fn identity_of(&self, name: &Path) -> io::Result<Identity> {
        self.open(name, sys::O_PATH)?.metadata().map(|metadata| Identity::of_metadata(&metadata))
    }

    /// Opens what a name leads to from here.
    pub(super) fn open(&self, name: &Path, flags: i32) -> io::Result<File> {
        open(Some(self), name, flags)
    }
}

fn open(from: Option<&Directory>, path: &Path, flags: i32) -> io::Result<File> {
    sys::open_at(from.map(|directory| directory.0.as_fd()), path, flags)
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_where_its_last_part_begins() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("file"), "").unwrap();
        let root = Directory::of(&place.path().join("."), None).unwrap().0;
        let split = |path| Directory::of(Path::new(path), Some(&root)).map(|(_, name)| name.to_owned());
        for (path, name) in [("file", "file"), ("./file", "file"), (".//file", "file"), ("./", ".")] {
            assert_eq!(split(path).unwrap(), Path::new(name), "{path}");
        }
        assert_eq!(split("").unwrap(), Path::new(""));
        assert_eq!(split("file/").unwrap_err().kind(), io::ErrorKind::NotADirectory);
        assert_eq!(split("none/file").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn it_stays_the_same_when_its_name_leads_elsewhere() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        for name in ["one", "two"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("file"), name).unwrap();
        }
        std::os::unix::fs::symlink("one", path("now")).unwrap();
        let (directory, name) =
            Directory::of(&path("now/file"), None).map(|(d, n)| (d, n.to_owned())).unwrap();
        std::fs::remove_file(path("now")).unwrap();
        std::os::unix::fs::symlink("two", path("now")).unwrap();
        assert_eq!(directory.identity_of(&name).unwrap(), Identity::of(&path("one/file")).unwrap());
        let beside = directory.identity_of(Path::new("../two/file")).unwrap();
        assert_eq!(beside, Identity::of(&path("now/file")).unwrap());
    }
}
