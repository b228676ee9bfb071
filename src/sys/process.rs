//! This process and others: limits, signals, children, the local time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::check;

/// The numbers of the signals by which a user stops a program.
pub mod signal {
    pub use libc::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM};
}

/// Year, month (1–12), day, hour, minute and second of a time (seconds since the epoch) in the
/// local time zone.
pub fn local_time(seconds: i64) -> Option<[i32; 6]> {
    // SAFETY: `tm` is plain old data (its one pointer may be null); all zeros is a valid value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    let found = unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) };
    let date = [tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec];
    (!found.is_null()).then_some(date)
}

/// Raises the soft limit of open files to the hard one: a chain of 500 layers needs 500.
pub fn raise_open_file_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that the call overwrites.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit that the call only reads.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(drop)
}

/// Lets a write beyond the file-size limit fail with EFBIG, where it would kill the process.
pub fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: no handler is installed, so that no code runs in signal context.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The effective user and group of this process.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: both calls always succeed and touch no memory.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Which of the two processes one is after [`fork`].
pub enum Fork {
    /// The process that called.
    Parent,
    /// The new one, in a session of its own.
    Child,
}

/// Forks into a new session. To be called while the process has one thread only: threads do not
/// survive a fork, the locks that they held do.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the caller has one thread, so that no lock or heap state is torn in the child.
    match check(unsafe { libc::fork() })? {
        0 => {
            // SAFETY: no memory is passed; it cannot fail in a process that was just forked.
            check(unsafe { libc::setsid() })?;
            Ok(Fork::Child)
        }
        _ => Ok(Fork::Parent),
    }
}

/// Makes descriptor `target` (0, 1 or 2) another name of `source`.
pub fn redirect(source: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    // SAFETY: `source` is open; what `target` was before is one of the standard streams.
    check(unsafe { libc::dup2(source.as_raw_fd(), target) }).map(drop)
}

/// SIGINT, SIGTERM and SIGHUP, kept from their default action so that one thread can wait for them.
pub struct StopSignals(libc::sigset_t);

impl StopSignals {
    /// Blocks the three in this thread and in all that it starts afterwards; but those that the
    /// process ignores (`nohup`) stay ignored.
    pub fn block() -> io::Result<Self> {
        // SAFETY: `set` is initialised by sigemptyset before any other use.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            check(libc::sigemptyset(&raw mut set))?;
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                if !is_ignored(signal)? {
                    check(libc::sigaddset(&raw mut set, signal))?;
                }
            }
            set
        };
        let signals = Self(set);
        signals.mask(libc::SIG_BLOCK)?;
        Ok(signals)
    }

    /// Waits until one of them arrives and returns its number.
    pub fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: the set is initialised, and `signal` is valid for the call to write.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }

    /// Lets them do from now on what they do by default, in this thread: they end the process.
    pub fn unblock(&self) -> io::Result<()> {
        self.mask(libc::SIG_UNBLOCK)
    }

    fn mask(&self, how: libc::c_int) -> io::Result<()> {
        // SAFETY: the set is initialised; no old mask is asked for.
        match unsafe { libc::pthread_sigmask(how, &raw const self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    // SAFETY: `sigaction` is plain old data; all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: no action is set, and `action` is valid for the call to write.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) })?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// Another process, held by a descriptor: its number cannot come to mean a later one.
pub struct Process(OwnedFd);

impl Process {
    /// The process that has this number now.
    pub fn open(number: u32) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        let descriptor = check(libc::c_int::try_from(opened).unwrap_or(-1))?;
        // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Waits until all its threads have ended, at most so long; tells whether they have.
    pub fn ends_within(&self, time: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: `poll` is one valid entry that outlives the call.
        check(unsafe { libc::poll(&raw mut poll, 1, milliseconds) }).map(|ready| ready > 0)
    }
}
