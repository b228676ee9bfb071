//! What a server and whoever takes its mount down say to each other: stop what runs; tell how it ended.
//!
//! They meet at a socket, whose other end the kernel names, so that nothing has to be read from a mount that
//! somebody else serves. Every wait is bounded, and so is what is read. A server in another network namespace
//! is not found.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::control::Control;
use crate::error::Result;
use crate::sys::{self, Process};

/// Asks that what runs be stopped. The answer: [`RUNS`] or [`IDLE`].
const STOP: u8 = b's';
const RUNS: u8 = b'r';
const IDLE: u8 = b'i';
/// Asks to be told how it ended. The answer: this, and at the end [`DONE`] or what went wrong.
const TELL: u8 = b't';
const DONE: &str = "done";

/// More who wait are turned away.
const MAX_WAITING: usize = 64;
/// Longer farewells are cut off, in bytes.
const MAX_WORDS: u64 = 4096;
/// How long a server waits for somebody who has connected and says nothing.
const MOMENT: Duration = Duration::from_secs(10);
/// How long a server may take to answer when it is asked.
const ANSWER: Duration = Duration::from_secs(20);
/// How often it is looked whether a server that does not answer can.
const LOOK: Duration = Duration::from_millis(100);

/// What the name of the socket of a mount begins with; the rest is the process.
fn prefix(device: &str) -> String {
    format!("rebasefs/{device}/")
}

/// A server's end.
pub(super) struct Listening {
    listener: UnixListener,
    /// Those who want to know how it ends.
    waiting: Arc<Mutex<Vec<UnixStream>>>,
}

impl Listening {
    /// Listens for those who take down the mount that has this device number.
    pub(super) fn start(device: u64, control: Weak<Control>) -> io::Result<Self> {
        let (major, minor) = sys::device_numbers(device);
        let name = prefix(&format!("{major}:{minor}")) + &std::process::id().to_string();
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        let waiting = Arc::new(Mutex::new(Vec::new()));
        let listening = Self { listener: listener.try_clone()?, waiting: waiting.clone() };
        std::thread::Builder::new().name("umount".into()).spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                if let Err(e) = answer(stream, &control, &waiting) {
                    log::debug!("somebody who wanted to unmount has gone: {e}");
                }
            }
        })?;
        Ok(listening)
    }

    /// Tells those who wait how it ended: nothing of the image is open any more.
    pub(super) fn end(self, result: &Result<()>) {
        // A listener that is shut down accepts nobody.
        drop(UnixStream::from(OwnedFd::from(self.listener)).shutdown(Shutdown::Both));
        let words = result.as_ref().map_or_else(ToString::to_string, |()| DONE.to_owned());
        for mut stream in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Who has gone need not be told.
            let _ = stream.write_all(words.as_bytes());
        }
    }
}

fn answer(
    mut stream: UnixStream,
    control: &Weak<Control>,
    waiting: &Mutex<Vec<UnixStream>>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(MOMENT))?;
    stream.set_write_timeout(Some(MOMENT))?;
    let user = sys::peer(&stream)?.user;
    if user != 0 && user != sys::effective_ids().0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut asked = [0];
    stream.read_exact(&mut asked)?;
    match asked[0] {
        STOP => {
            let runs = control.upgrade().is_some_and(|control| control.cancel());
            stream.write_all(&[if runs { RUNS } else { IDLE }])
        }
        TELL => {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() < MAX_WAITING {
                stream.write_all(&[TELL])?;
                waiting.push(stream);
            }
            Ok(())
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A server, as whoever takes its mount down sees it.
pub(super) struct Server {
    name: Vec<u8>,
    /// Who listens: its number is 0 where it cannot be seen from here.
    pub(super) number: u32,
    process: Option<Process>,
    user: u32,
    stream: UnixStream,
}

/// What is heard of a server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing yet.
    Nothing,
    /// All is well, and the image is free.
    Done,
    /// What went wrong; the image is free.
    Failed(String),
    /// It has gone without a word.
    Gone,
}

impl Server {
    /// The server of the mount with this device number (`MAJOR:MINOR`), which runs as `user`. What somebody
    /// else lets listen under such a name does not count.
    pub(super) fn find(device: &str, user: u32) -> Option<Self> {
        let names = names(&prefix(device)).inspect_err(|e| log::debug!("/proc/net/unix: {e}")).ok()?;
        names.into_iter().find_map(|name| Self::connect(name, user))
    }

    fn connect(name: Vec<u8>, user: u32) -> Option<Self> {
        let stream = connect(&name, user).inspect_err(|e| log::debug!("a server: {e}")).ok()?;
        let number = sys::peer(&stream).ok()?.process;
        let process = Process::open(number).inspect_err(|e| log::debug!("process {number}: {e}")).ok();
        Some(Self { name, number, process, user, stream })
    }

    /// Whether it is this process.
    pub(super) fn is_self(&self) -> bool {
        self.number == std::process::id()
    }

    /// Lets it tell how it ends. Whether it has promised to.
    pub(super) fn listen(&mut self) -> bool {
        let mut stream = &self.stream;
        ask(stream, TELL, || self.is_stopped()).is_ok_and(|said| said == TELL)
            && stream.set_read_timeout(Some(LOOK)).is_ok()
            && stream.flush().is_ok()
    }

    /// Stops what it does. Whether it does anything still.
    pub(super) fn stop_job(&self) -> bool {
        let asked =
            connect(&self.name, self.user).and_then(|stream| ask(&stream, STOP, || self.is_stopped()));
        asked.is_ok_and(|said| said == RUNS)
    }

    /// Waits a moment for its farewell.
    pub(super) fn hear(&self) -> Heard {
        let mut words = Vec::new();
        let heard = (&self.stream).take(MAX_WORDS).read_to_end(&mut words);
        match heard {
            Err(e) if words.is_empty() && is_timeout(&e) => Heard::Nothing,
            _ if words.is_empty() => Heard::Gone,
            _ if words == DONE.as_bytes() => Heard::Done,
            _ => Heard::Failed(String::from_utf8_lossy(&words).replace(char::is_control, "?")),
        }
    }

    /// Whether it has ended within this time.
    pub(super) fn ends_within(&self, time: Duration) -> bool {
        self.process.as_ref().is_none_or(|process| process.ends_within(time).unwrap_or(true))
    }

    /// Whether a signal has stopped it (SIGSTOP).
    pub(super) fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.number)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T'))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

fn connect(name: &[u8], user: u32) -> io::Result<UnixStream> {
    let stream = sys::connect_abstract(name)?;
    match sys::peer(&stream)?.user == user {
        true => Ok(stream),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Asks for one byte.
fn ask(mut stream: &UnixStream, what: u8, is_stopped: impl Fn() -> bool) -> io::Result<u8> {
    stream.set_read_timeout(Some(LOOK))?;
    stream.set_write_timeout(Some(MOMENT))?;
    stream.write_all(&[what])?;
    let (asked, mut said) = (Instant::now(), [0]);
    loop {
        match stream.read_exact(&mut said) {
            Ok(()) => return Ok(said[0]),
            Err(e) if is_timeout(&e) && asked.elapsed() < ANSWER && !is_stopped() => {}
            Err(e) => return Err(e),
        }
    }
}

/// The abstract names that begin so. Connections have the name of their listener.
fn names(prefix: &str) -> io::Result<BTreeSet<Vec<u8>>> {
    let mut found = BTreeSet::new();
    for line in BufReader::new(std::fs::File::open("/proc/net/unix")?).split(b'\n') {
        let line = line?;
        let Some(at) = line.iter().position(|&byte| byte == b'@') else { continue };
        let name = &line[at + 1..];
        if name.starts_with(prefix.as_bytes()) {
            found.insert(name.to_vec());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody else may listen under the name of a server, but not as its user.
    #[test]
    fn a_server_is_who_the_kernel_says() {
        let device = format!("no:{}", std::process::id());
        let name = prefix(&device) + "1";
        let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
        let user = sys::effective_ids().0;
        assert!(Server::find(&device, user.wrapping_add(1)).is_none());
        let found = Server::find(&device, user).unwrap();
        assert!(found.is_self());
        assert!(Server::find("no:0", user).is_none());
    }
}
