//! The one error of the crate: what went wrong, while doing what, to which file, at which offset,
//! and what to do about it.
//!
//! Owns the table from [`ErrorKind`] to errno. Must not know any format or command: callers name
//! what they were doing.

use std::fmt::{self, Write};
use std::io;
use std::path::{Path, PathBuf};

use crate::shown::{OneLine, Shown};
use crate::sys::errno;

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is; decides the errno at a control file and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file that was named does not exist.
    NotFound,
    /// The operating system does not let us open or change a file.
    PermissionDenied,
    /// Files of the mount do not allow it, whoever asks.
    NotPermitted,
    /// A directory where an image was expected.
    IsDirectory,
    /// A FIFO, socket or character device where an image was expected.
    NotAFile,
    /// A chain that contains a file twice.
    Loop,
    /// Another process holds the image.
    Busy,
    /// The image breaks the rules of its format.
    Corrupt,
    /// Valid, but not understood; refused by name, never masked (invariant I6).
    Unsupported,
    /// What was asked for makes no sense.
    InvalidArgument,
    /// A name is longer than the format can store.
    NameTooLong,
    /// No space left: on the file system, or in the image's header cluster.
    NoSpace,
    /// The image or the mount was opened for reading only.
    ReadOnly,
    /// The user stopped it.
    Cancelled,
    /// The operating system failed to read or write; the source tells how.
    Io,
}

impl ErrorKind {
    /// The errno that a writer of a control file gets for this kind.
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => errno::ENOENT,
            Self::PermissionDenied => errno::EACCES,
            Self::NotPermitted => errno::EPERM,
            Self::IsDirectory => errno::EISDIR,
            Self::NotAFile | Self::InvalidArgument => errno::EINVAL,
            Self::Loop => errno::ELOOP,
            Self::Busy => errno::EBUSY,
            // "Structure needs cleaning": the words a user of ext4 or xfs knows for this.
            Self::Corrupt => errno::EUCLEAN,
            Self::Unsupported => errno::EOPNOTSUPP,
            Self::NameTooLong => errno::ENAMETOOLONG,
            Self::NoSpace => errno::ENOSPC,
            Self::ReadOnly => errno::EROFS,
            Self::Cancelled => errno::EINTR,
            Self::Io => errno::EIO,
        }
    }

    fn of_io(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno::ENOENT) => Self::NotFound,
            Some(errno::EACCES | errno::EPERM) => Self::PermissionDenied,
            Some(errno::EISDIR) => Self::IsDirectory,
            Some(errno::ENXIO | errno::ENODEV) => Self::NotAFile,
            Some(errno::ELOOP) => Self::Loop,
            Some(errno::EBUSY | errno::EAGAIN | errno::ETXTBSY) => Self::Busy,
            Some(errno::ENAMETOOLONG) => Self::NameTooLong,
            Some(errno::ENOSPC | errno::EDQUOT | errno::EFBIG) => Self::NoSpace,
            Some(errno::EROFS) => Self::ReadOnly,
            Some(errno::EOPNOTSUPP) => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// An error with its circumstances. Displays as
/// `while REBASING: /vm/cow.qcow2: WHAT WENT WRONG at offset 0x30000: Input/output error (HINT)`,
/// on one line whatever the names in it: what a terminal would obey is escaped.
#[derive(Debug)]
pub struct Error(Box<Circumstances>);

#[derive(Debug)]
struct Circumstances {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    /// What was being done, innermost first.
    doing: Vec<String>,
    hint: Option<String>,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind`; `what` is a clause without capital and full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Circumstances {
            kind,
            what: what.into(),
            path: None,
            offset: None,
            doing: Vec::new(),
            hint: None,
            source: None,
        }))
    }

    /// The image breaks the rules of its format.
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, what)
    }

    /// Valid, but refused because it is not understood.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// What was asked for makes no sense.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, what)
    }

    /// A failure of the operating system; the kind follows from its errno.
    pub fn io(source: io::Error, what: impl Into<String>) -> Self {
        let mut error = Self::new(ErrorKind::of_io(&source), what);
        error.0.source = Some(source);
        error
    }

    /// Names the file, unless a deeper layer has named one already.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Names the byte offset in that file, unless a deeper layer has named one already.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Says what to do about it, unless a deeper layer has said so already. What can be typed stands in
    /// backquotes, and works: `mount-tests/hints` tries all of it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Says what to do about it in place of what a deeper layer knew.
    #[must_use]
    pub(crate) fn better_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = None;
        self.hint(hint)
    }

    /// Adds another thing to do about it.
    #[must_use]
    pub fn or_hint(mut self, other: &str) -> Self {
        let hint = self.0.hint.take().map_or_else(|| other.to_owned(), |hint| format!("{hint}; {other}"));
        self.hint(hint)
    }

    /// Adds what was being done, from the inside out.
    #[must_use]
    pub fn doing(mut self, doing: impl Into<String>) -> Self {
        self.0.doing.push(doing.into());
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file that the error is about, if it is about one.
    pub fn file(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The errno for a process at the other side of the mount: the operating system's own where
    /// there is one, else that of the kind.
    pub fn errno(&self) -> i32 {
        let of_source = self.0.source.as_ref().and_then(io::Error::raw_os_error);
        of_source.unwrap_or_else(|| self.0.kind.errno())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (c, f) = (&self.0, &mut OneLine(f));
        for doing in c.doing.iter().rev() {
            write!(f, "while {doing}: ")?;
        }
        if let Some(path) = &c.path {
            write!(f, "{}: ", path.shown())?;
        }
        f.write_str(&c.what)?;
        if let Some(offset) = c.offset {
            write!(f, " at offset {offset:#x}")?;
        }
        if let Some(source) = &c.source {
            write!(f, ": {}", os_message(source))?;
        }
        match &c.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// The message of the C library alone, without Rust's "(os error 2)".
fn os_message(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// Adds circumstances to the error of a result.
pub(crate) trait Context<T> {
    /// Adds what was being done, from the inside out.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
    /// Names the file, unless a deeper layer has named one already.
    fn path(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.doing(doing()))
    }

    fn path(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| e.path(path))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn display_carries_all_circumstances_in_reading_order() {
        let e = Error::io(io::Error::from_raw_os_error(errno::EIO), "cannot read the L1 table")
            .path("/vm/cow.qcow2")
            .offset(0x30000)
            .hint("run `rebasefs check IMAGE`")
            .doing("opening layer 1")
            .doing("mounting");
        assert_eq!(
            e.to_string(),
            "while mounting: while opening layer 1: /vm/cow.qcow2: cannot read the L1 table at offset \
             0x30000: Input/output error (run `rebasefs check IMAGE`)"
        );
        assert_eq!(e.errno(), errno::EIO);
    }

    #[test]
    fn the_deepest_layer_names_the_file() {
        let e = Error::corrupt("x").path("deep").path("shallow");
        assert_eq!(e.file(), Some(Path::new("deep")));
        assert_eq!(e.errno(), errno::EUCLEAN);
    }

    #[test]
    fn whatever_the_names_it_stays_one_line_that_no_terminal_obeys() {
        let name = <OsStr as OsStrExt>::from_bytes(b"a\nb\xff\x1b[2J");
        let e = Error::invalid("no\nway").path(name).hint("try\ragain").doing("opening \u{9b}0m");
        assert_eq!(e.to_string(), "while opening \\u{9b}0m: a\\nb\\xff\\u{1b}[2J: no\\nway (try\\ragain)");
    }
}
