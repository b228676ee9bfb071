//! Whether somebody has changed the files of a chain while it is in use.
//!
//! Takes note of sizes and times and compares them later. Nothing is recorded in any image.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::Chain;
use crate::file::{HostFile, Identity, Stamp};
use crate::shown::Shown;
use crate::sys;

/// The files of a chain as they were at one moment. Keeps them open.
#[derive(Debug)]
pub struct Watch(Vec<(Arc<dyn HostFile>, Option<Stamp>)>);

/// In which way a file is not what it was; the gravest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its size or its modification time has moved.
    Written,
    /// Its name leads to another file, or to none.
    Replaced,
    /// Only its change time has moved: it was renamed, linked, given other permissions; or written
    /// to and its modification time set back.
    Touched,
}

/// A file that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The name under which it was opened.
    pub path: PathBuf,
    /// What is the matter.
    pub way: Way,
    /// How it is now.
    now: String,
}

impl Watch {
    /// Takes note of all files of `chain`.
    pub fn new(chain: &Chain) -> Self {
        Self(chain.files().map(|file| (file.clone(), stamp(&**file))).collect())
    }

    /// What has changed since, a file at a time. Asks the file system, which may take its time.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        self.0.iter().filter_map(|(file, before)| change(&**file, *before))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.path.shown(), self.now)
    }
}

/// What cannot be looked at tells nothing; reading it is going to fail.
fn stamp(file: &dyn HostFile) -> Option<Stamp> {
    file.stamp().ok()
}

fn change(file: &dyn HostFile, before: Option<Stamp>) -> Option<Change> {
    let (before, now) = (before?, stamp(file)?);
    let (way, now) = match Identity::of(file.path()) {
        _ if now.is_written_since(&before) => {
            (Way::Written, format!("size {}, mtime {}", now.size, date(now.modified_ns)))
        }
        Err(e) => (Way::Replaced, format!("not there any more: {}", e.kind())),
        Ok(identity) if identity != file.identity() => (Way::Replaced, "replaced by another file".to_owned()),
        Ok(_) if now.is_touched_since(&before) => (Way::Touched, format!("ctime {}", date(now.changed_ns))),
        Ok(_) => return None,
    };
    Some(Change { path: file.path().to_owned(), way, now })
}

fn date(time_ns: i64) -> String {
    let seconds = time_ns / 1_000_000_000;
    match sys::local_time(seconds) {
        Some([year, month, day, hour, minute, second]) => {
            format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
        }
        None => seconds.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, FileTimes, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    /// What a chain of one raw file notices of what is done to it.
    fn noticed(what: impl FnOnce(&std::path::Path)) -> Vec<Change> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base");
        std::fs::write(&path, [1; 1024]).unwrap();
        let past = SystemTime::now() - Duration::from_secs(3600);
        File::options().write(true).open(&path).unwrap().set_modified(past).unwrap();
        let watch = Watch::new(&Opener::new().chain(&path, None, Access::ReadOnly).unwrap());
        what(&path);
        watch.changes().collect()
    }

    fn ways(what: impl FnOnce(&std::path::Path)) -> Vec<Way> {
        noticed(what).into_iter().map(|change| change.way).collect()
    }

    #[test]
    fn each_way_in_which_a_file_can_change_is_told() {
        assert_eq!(ways(|path| drop(std::fs::read(path))), []);
        assert_eq!(ways(|path| std::fs::write(path, [2; 1024]).unwrap()), [Way::Written]);
        assert_eq!(
            ways(|path| File::options().write(true).open(path).unwrap().set_len(512).unwrap()),
            [Way::Written]
        );
        assert_eq!(
            ways(|path| std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap()),
            [Way::Touched]
        );
        assert_eq!(ways(|path| std::fs::remove_file(path).unwrap()), [Way::Replaced]);
        let replace = |path: &std::path::Path| {
            std::fs::write(path.with_extension("new"), [1; 1024]).unwrap();
            std::fs::rename(path.with_extension("new"), path).unwrap();
        };
        assert_eq!(ways(replace), [Way::Replaced]);
        let set_back = |path: &std::path::Path| {
            let times = FileTimes::new().set_modified(std::fs::metadata(path).unwrap().modified().unwrap());
            std::fs::write(path, [2; 1024]).unwrap();
            File::options().write(true).open(path).unwrap().set_times(times).unwrap();
        };
        assert_eq!(ways(set_back), [Way::Touched]);
    }

    #[test]
    fn a_change_says_how_the_file_is_now() {
        let text = noticed(|path| std::fs::write(path, [2; 2048]).unwrap())[0].to_string();
        assert!(text.contains("base (size 2048, mtime 20"), "{text}");
    }
}
