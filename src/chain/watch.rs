//! Whether somebody has changed the files of a chain while it is in use.
//!
//! Takes note of sizes and times and compares them later. Nothing is recorded in any image.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Chain;
use crate::error::Result;
use crate::file::{HostFile, HostOffset, Identity, Stamp};
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
        Self::of(chain).without_clocks()
    }

    fn of(chain: &Chain) -> Self {
        Self(chain.files().map(|file| (file.clone(), stamp(&**file))).collect())
    }

    fn without_clocks(mut self) -> Self {
        for stamp in self.0.iter_mut().filter_map(|(_, stamp)| stamp.as_mut()) {
            *stamp = if stamp.is_clock() { stamp.without_times() } else { *stamp };
        }
        self
    }

    /// The same, with times that move with the next write to a file: waits until the tick of its last write
    /// is over, some seconds at most, and asks `go_on` meanwhile. What somebody has written through a
    /// mapping is written back first, so that he moves the time when he writes there again.
    pub fn settled(chain: &Chain, mut go_on: impl FnMut() -> Result<()>) -> Result<Self> {
        for file in chain.files() {
            for at in (0..file.size()).step_by(WRITE_BACK as usize) {
                go_on()?;
                file.write_back(HostOffset(at), WRITE_BACK);
            }
        }
        let mut watch = Self::of(chain);
        for _ in 0..ROUNDS {
            let Some(wait) = watch.0.iter().filter_map(|(_, stamp)| stamp.as_ref()?.wait()).max() else {
                break;
            };
            let began = Instant::now();
            while let Some(left) = wait.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
                go_on()?;
                thread::sleep(left.min(NAP));
            }
            let before = std::mem::replace(&mut watch, Self::of(chain));
            let mut pairs = before.0.iter().zip(&watch.0).filter_map(|(before, now)| before.1.zip(now.1));
            let moves = pairs.any(|(before, now)| {
                let is_clock = before.is_clock() && now.is_clock();
                !is_clock && (now.is_written_since(&before) || now.is_touched_since(&before))
            });
            if !moves {
                break;
            }
        }
        Ok(watch.without_clocks())
    }

    /// Whether the change time of a file has moved, whatever else has.
    pub fn is_touched(&self) -> bool {
        let is_touched = |(file, before): &(Arc<dyn HostFile>, Option<Stamp>)| {
            before.zip(stamp(&**file)).is_some_and(|(before, now)| now.is_touched_since(&before))
        };
        self.0.iter().any(is_touched)
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

/// Bytes of a file that are written back at once.
const WRITE_BACK: u64 = 256 << 20;
/// How often a file that changes all the while is waited for: its next write is going to be seen.
const ROUNDS: usize = 3;
/// How long a wait goes on before it asks whether it may.
const NAP: Duration = Duration::from_millis(50);

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

fn date(time_ns: Option<i64>) -> String {
    let Some(time_ns) = time_ns else { return "unknown".to_owned() };
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
