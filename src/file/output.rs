//! Files that a command writes beside the images: pictures, differences, manual pages, logs; and whether
//! a new image may take the place of what is there.
//!
//! Overwrites a regular file that is no part of a chain in play and that nobody has open as an image, or
//! makes a new one. A file appears as a whole, or stays what it was.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::{Identity, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// Where a file is to be written, which may be.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    typed: &'a Path,
    place: Place,
}

#[derive(Debug)]
enum Place {
    New,
    /// The regular file, without links.
    Over(PathBuf, Metadata),
    /// `/dev/null`, a terminal: written to as it is.
    Device,
    StandardOutput,
}

impl<'a> Output<'a> {
    /// Checks that `path` may be written beside these files. Writes nothing.
    ///
    /// # Errors
    /// It is one of them, under whichever name, or is open as an image, or is no regular file; or the operating
    /// system does not let us.
    pub fn new(path: &'a Path, in_play: impl IntoIterator<Item = Identity>) -> Result<Self> {
        place(path, in_play).map(|place| Self { typed: path, place }).map_err(|e| e.path(path))
    }

    /// The same, where `-` is the standard output.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn or_standard(path: &'a Path, in_play: impl IntoIterator<Item = Identity>) -> Result<Self> {
        match path == Path::new("-") {
            true => Ok(Self { typed: path, place: Place::StandardOutput }),
            false => Self::new(path, in_play),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// It cannot be written; then it is what it was.
    pub fn write(&self, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        self.try_write(content).map_err(|e| Error::io(e, "cannot write").path(self.typed))
    }

    fn try_write(&self, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let path = match &self.place {
            Place::New => self.typed,
            Place::Over(path, _) => path,
            Place::Device => return content(&mut open(self.typed)?),
            Place::StandardOutput => {
                let mut out = io::stdout().lock();
                return content(&mut out).and_then(|()| out.flush());
            }
        };
        let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let mut beside = tempfile::Builder::new();
        beside.prefix(path.file_name().unwrap_or_default()).suffix(".new");
        // As any new file; what tempfile makes is for the owner alone.
        beside.permissions(Permissions::from_mode(0o666));
        let mut file = beside.tempfile_in(directory)?;
        let mut buffered = BufWriter::new(&mut file);
        content(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        match &self.place {
            Place::Over(_, was) => {
                // Only root can give a file away; the mode comes after that, which would clear some of its bits.
                let _ = fchown(file.as_file(), Some(was.uid()), Some(was.gid()));
                file.as_file().set_permissions(Permissions::from_mode(was.mode() & 0o7777))?;
                file.as_file().sync_all()?;
                if Identity::of(path)? != Identity::of_metadata(was) {
                    return Err(io::Error::other("another file has come into its place"));
                }
                file.persist(path)?;
            }
            _ => {
                file.as_file().sync_all()?;
                file.persist_noclobber(path)?;
            }
        }
        // The name is durable, too; a file system that cannot say so has done its best.
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
        Ok(())
    }
}

/// Opens a log for appending, which is made if it is missing.
///
/// # Errors
/// It is open as an image, or is neither a regular file nor a device like `/dev/null`; or the operating system
/// does not let us.
pub(crate) fn append(path: &Path) -> Result<File> {
    Output::new(path, [])?;
    let file = File::options().create(true).append(true).custom_flags(sys::OPEN_IMAGE).open(path);
    file.map_err(|e| Error::io(e, "cannot open for writing").path(path))
}

/// Checks that a file may be emptied or replaced: it is none of `in_play`.
///
/// # Errors
/// It is one of them.
pub(crate) fn refuse_in_play(file: Identity, in_play: impl IntoIterator<Item = Identity>) -> Result<()> {
    match in_play.into_iter().any(|other| other == file) {
        false => Ok(()),
        true => Err(Error::new(ErrorKind::Loop, "is a file of the chain, and would be overwritten")),
    }
}

fn place(path: &Path, in_play: impl IntoIterator<Item = Identity>) -> Result<Place> {
    let cannot = |e| Error::io(e, "cannot write");
    let metadata = match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return match fs::symlink_metadata(path) {
                Ok(_) => Err(Error::new(ErrorKind::NotFound, "is a symbolic link that leads nowhere")),
                Err(_) => Ok(Place::New),
            };
        }
        found => found.map_err(cannot)?,
    };
    let kind = metadata.file_type();
    if kind.is_char_device() {
        return Ok(Place::Device);
    }
    if kind.is_dir() {
        return Err(Error::new(ErrorKind::IsDirectory, "is a directory, not a file to be written"));
    }
    refuse_in_play(Identity::of_metadata(&metadata), in_play)?;
    if !kind.is_file() {
        let what = "is no regular file, and would be replaced by one";
        return Err(Error::new(ErrorKind::NotAFile, what));
    }
    let file = open(path).map_err(cannot)?;
    if lock::is_held(&file).map_err(|e| Error::io(e, "cannot look for locks on it"))? {
        return Err(Error::new(ErrorKind::Busy, "is open as an image in another process"));
    }
    Ok(Place::Over(fs::canonicalize(path).map_err(cannot)?, metadata))
}

/// Whoever may not write to a file may not replace it either, though the directory would let him.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).custom_flags(sys::OPEN_IMAGE).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) -> Result<()> {
        Output::new(path, [])?.write(|out| out.write_all(text.as_bytes()))
    }

    #[test]
    fn a_file_appears_as_a_whole_or_stays_what_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("f"), directory.path().join("link"));
        write(&path, "first").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("f", &link).unwrap();
        write(&link, "second").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        let fails = |out: &mut dyn Write| {
            out.write_all(b"half")?;
            Err(io::Error::other("no more"))
        };
        Output::new(&path, []).unwrap().write(fails).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_no_file_to_be_written_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("f"), directory.path().join("other"));
        fs::write(&path, "image").unwrap();
        fs::hard_link(&path, &other).unwrap();
        let image = Identity::of(&path).unwrap();
        let error = Output::new(&other, [image]).unwrap_err().to_string();
        assert!(error.contains("other: is a file of the chain"), "{error}");
        let dangling = directory.path().join("dangling");
        std::os::unix::fs::symlink("missing", &dangling).unwrap();
        assert!(write(&dangling, "x").unwrap_err().to_string().contains("leads nowhere"));
        assert!(write(directory.path(), "x").unwrap_err().to_string().contains("is a directory"));
        write(Path::new("/dev/null"), "x").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }
}
