//! Taking a mount down from another process: the kernel lets go of it, then its server stops what
//! runs and ends. Who has unmounted may use the image at once, and does not find it locked still.
//!
//! Names one mount by the kernel's number of it, and takes that one down and no other. Reads nothing from it:
//! its server may be somebody else's.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::holders;
use super::parting::{Heard, Server};
use super::point::{self, Entry};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Users, errno};

/// Who waits longer than this for a server wants to know what for.
const SOON: Duration = Duration::from_secs(2);
/// No server is waited for longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Nor one that goes on for another mount namespace.
const ELSEWHERE: Duration = Duration::from_secs(30);
/// Nor a program that unmounts.
const PROGRAM: Duration = Duration::from_secs(30);
/// How long a process may keep a control file open after its command was stopped.
const TO_CLOSE: Duration = Duration::from_secs(15);
/// How often to look again.
const LOOK: Duration = Duration::from_millis(10);

/// How a mount is taken down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Manner {
    /// Only if nobody uses it; a command in `ctl/` that is under way is stopped. Returns when the server has
    /// ended.
    #[default]
    Wait,
    /// Nobody finds it any more; who uses it goes on. Its server ends with the last of them, and is
    /// not waited for.
    Lazy,
}

/// Unmounts what rebasefs has mounted on `mountpoint`: root any mount, others their own. A mount
/// whose server has died is cleaned up; of several mounts of one server only this one is taken down. The
/// program that serves a mount takes it down with [`Mounted::unmount`](super::Mounted::unmount).
///
/// # Errors
/// No mount of rebasefs is there, somebody uses it, or it is another user's. Or it was unmounted, but its
/// server has not ended in good time, or has not made durable what was written last.
pub fn unmount(mountpoint: &Path, manner: Manner) -> Result<()> {
    let found = Found::new(mountpoint)?;
    let mut server = found.server();
    if found.entry.kind != "fuse.rebasefs" && server.is_none() {
        return Err(nothing_here(mountpoint));
    }
    match (manner, &mut server) {
        (Manner::Wait, Some(server)) if !server.is_self() => {
            let promised = server.listen();
            found.take_down(server)?;
            found.wait(server, promised)
        }
        (Manner::Wait, _) => found.let_go(Users::Respected).map_err(|why| found.refused(why)),
        (Manner::Lazy, _) => found.let_go(Users::Kept).map_err(|why| found.refused(why)),
    }
}

fn nothing_here(mountpoint: &Path) -> Error {
    let error = Error::invalid("rebasefs has mounted nothing here").path(mountpoint);
    error.hint("`findmnt -t fuse.rebasefs` lists its mounts")
}

/// A mount, found by what was typed.
struct Found {
    /// As it was typed.
    typed: PathBuf,
    /// The directory that the mount point lies in, opened.
    parent: File,
    name: OsString,
    entry: Entry,
}

/// Why the kernel did not let go of a mount.
enum Refusal {
    Busy,
    Other(Error),
}

impl Found {
    fn new(mountpoint: &Path) -> Result<Self> {
        let cannot_find = |e| Error::io(e, "cannot find the mount").path(mountpoint);
        let place = sys::open_place(&point::absolute(mountpoint)?).map_err(cannot_find)?;
        let id = id_of(&place).map_err(without_proc)?;
        let real = std::fs::read_link(link_to(&place)).map_err(without_proc)?;
        // An open place keeps its mount from being taken down.
        drop(place);
        let table = point::table(Path::new(point::OWN_TABLE)).map_err(without_proc)?;
        let entry = table.into_iter().find(|entry| entry.id == id && entry.mountpoint == real);
        let (Some(entry), Some(parent), Some(name)) = (entry, real.parent(), real.file_name()) else {
            return Err(nothing_here(mountpoint));
        };
        if !entry.is_fuse() {
            return Err(nothing_here(mountpoint));
        }
        let parent = sys::open_place(parent).map_err(cannot_find)?;
        Ok(Self { typed: mountpoint.to_owned(), parent, name: name.to_owned(), entry })
    }

    /// Its server, if it answers to the owner of the mount.
    fn server(&self) -> Option<Server> {
        let owner = self.entry.option("user_id").and_then(|user| user.parse().ok())?;
        Server::find(&self.entry.device, owner)
    }

    /// Has the kernel let go of it, after the server has stopped what it does, if need be.
    fn take_down(&self, server: &Server) -> Result<()> {
        let began = Instant::now();
        // When it was seen last that something was being stopped.
        let mut stopping = None;
        loop {
            match self.let_go(Users::Respected) {
                Ok(()) => return Ok(()),
                Err(Refusal::Busy) if began.elapsed() < PATIENCE => {
                    if server.stop_job() {
                        stopping = Some(Instant::now());
                    }
                    // Whoever had the command under way hears of it, and closes the file.
                    if stopping.is_none_or(|last| last.elapsed() > TO_CLOSE) {
                        return Err(self.refused(Refusal::Busy));
                    }
                    thread::sleep(LOOK);
                }
                Err(why) => return Err(self.refused(why)),
            }
        }
    }

    /// Has the kernel let go of it. Only root may do so by himself; fusermount3 lets others unmount what is
    /// theirs.
    fn let_go(&self, users: Users) -> Result<(), Refusal> {
        let other = |e| Refusal::Other(Error::io(e, "cannot unmount"));
        // What lies here by now is another one, if the user has been at it.
        let place = sys::open_place_in(self.parent.as_fd(), &self.name).map_err(other)?;
        if id_of(&place).map_err(other)? != self.entry.id {
            let what = "another mount than a moment ago is there";
            return Err(Refusal::Other(Error::new(ErrorKind::Busy, what)));
        }
        drop(place);
        match sys::unmount_in(self.parent.as_fd(), &self.name, users) {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(errno::EBUSY) => Err(Refusal::Busy),
            Err(e) if e.raw_os_error() == Some(errno::EPERM) => let_programs(&self.entry.mountpoint, users),
            Err(e) => Err(other(e)),
        }
    }

    fn refused(&self, why: Refusal) -> Error {
        let name = point::in_shell(&self.typed);
        match why {
            Refusal::Other(error) => error.path(&self.typed),
            Refusal::Busy => {
                let users = holders::users(&self.entry);
                let by =
                    if users.is_empty() { String::new() } else { format!(", used by {}", users.join(", ")) };
                Error::new(ErrorKind::Busy, format!("cannot unmount: it is busy{by}")).path(&self.typed).hint(format!(
                    "`fuser -vm {name}` shows who uses it; `rebasefs umount --lazy {name}` lets them finish"
                ))
            }
        }
    }

    /// Waits for the server, which has `promised` to tell how it ends.
    fn wait(&self, server: &Server, promised: bool) -> Result<()> {
        let table = point::table(Path::new(point::OWN_TABLE)).map_err(without_proc)?;
        if let Some(other) = table.iter().find(|other| other.device == self.entry.device) {
            let (path, other) = (self.typed.display(), other.mountpoint.display());
            log::warn!("{path}: unmounted; its server goes on, for it is mounted on '{other}', too");
            return Ok(());
        }
        let (began, mut is_told) = (Instant::now(), false);
        loop {
            match server.hear() {
                Heard::Done => {
                    server.ends_within(SOON);
                    return Ok(());
                }
                Heard::Failed(words) => return Err(self.but(server, &format!("failed: {words}"))),
                // It was never told that anybody waits.
                Heard::Gone if !promised => {
                    if server.ends_within(LOOK) {
                        return Ok(());
                    }
                }
                Heard::Gone => {
                    let what = "ended without a word: what was written last may be lost";
                    return Err(self.but(server, what));
                }
                Heard::Nothing => {}
            }
            if server.is_stopped() {
                let error = self.but(server, "was stopped, and has not let go of the image");
                return Err(error.hint("`kill -CONT PID` lets it end"));
            }
            if began.elapsed() > ELSEWHERE
                && let Some(who) = holders::elsewhere(&self.entry.device)
            {
                return Err(self.but(server, &format!("goes on: {who}")));
            }
            if began.elapsed() > SOON && !is_told {
                let (path, number) = (self.typed.display(), server.number);
                let why = holders::elsewhere(&self.entry.device);
                let why = why.unwrap_or_else(|| "it finishes what it does".to_owned());
                log::warn!("{path}: unmounted; waiting for its server (process {number}): {why}");
                is_told = true;
            }
            if began.elapsed() > PATIENCE {
                let what = format!("has not let go of the image after {} s", PATIENCE.as_secs());
                return Err(self.but(server, &what));
            }
        }
    }

    fn but(&self, server: &Server, what: &str) -> Error {
        let what = format!("unmounted, but its server (process {}) {what}", server.number);
        Error::new(ErrorKind::Busy, what).path(&self.typed)
    }
}

fn link_to(place: &File) -> PathBuf {
    Path::new("/proc/self/fd").join(place.as_raw_fd().to_string())
}

/// The kernel's number of the mount that a place lies in.
fn id_of(place: &File) -> io::Result<u64> {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", place.as_raw_fd()))?;
    holders::id(&about).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn without_proc(error: io::Error) -> Error {
    Error::io(error, "cannot see what is mounted without /proc").path(point::OWN_TABLE)
}

const INSTALL: &str = "install fusermount3 (package fuse3)";

/// Programs that unmount for those who are not root, where they are looked for, and their words for it.
/// Where a root directory has no /etc/mtab, as debootstrap makes it, fusermount3 mounts but does not
/// unmount; umount, which also knows whose mount it is, does.
const PROGRAMS: [(&str, &[&str], &[&str]); 2] =
    [("fusermount3", &["-u"], &["-u", "-z"]), ("umount", &[], &["-l"])];
const DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/local/bin", "/sbin"];

fn let_programs(real: &Path, users: Users) -> Result<(), Refusal> {
    let mut last = None;
    for (program, options, lazily) in PROGRAMS {
        let options = if users == Users::Kept { lazily } else { options };
        let said = match run(program, options, real) {
            Ok(None) => return Ok(()),
            Ok(Some(said)) => said,
            Err(e) if is_none(&e) => continue,
            Err(e) => return Err(Refusal::Other(Error::io(e, format!("cannot unmount with {program}")))),
        };
        if said.contains("busy") {
            return Err(Refusal::Busy);
        }
        let is_without_table = said.contains("mtab");
        last = Some(Error::new(ErrorKind::PermissionDenied, format!("cannot unmount: {said}")));
        if !is_without_table {
            break;
        }
    }
    let without = || {
        Error::new(ErrorKind::NotFound, "cannot find the program that unmounts for those who are not root")
            .hint(INSTALL)
    };
    Err(Refusal::Other(last.unwrap_or_else(without)))
}

/// Runs a program by its name, or from the usual places where `PATH` does not lead to it. What it complains
/// of, if it fails.
fn run(program: &str, options: &[&str], real: &Path) -> io::Result<Option<String>> {
    let places = DIRECTORIES.iter().map(|directory| Path::new(directory).join(program));
    let mut tried = Err(io::ErrorKind::NotFound.into());
    for place in std::iter::once(PathBuf::from(program)).chain(places) {
        tried = run_at(place.as_os_str(), options, real);
        if !tried.as_ref().is_err_and(is_none) {
            break;
        }
    }
    tried
}

/// Whether there is no such program, or none that may be run.
fn is_none(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
}

fn run_at(program: &OsStr, options: &[&str], real: &Path) -> io::Result<Option<String>> {
    let mut command = Command::new(program);
    command.args(options).arg("--").arg(real).env("LC_ALL", "C");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > PROGRAM {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end"));
        }
        thread::sleep(Duration::from_millis(2));
    };
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(4096).read_to_string(&mut said)?;
    }
    Ok((!status.success()).then(|| said.trim().to_owned()))
}
