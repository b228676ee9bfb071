//! Whether a process that waits for its write has been told to stop.
//!
//! The kernel does not wake a writer whose request is with a FUSE server, not even for SIGKILL;
//! it would ask the server to interrupt the request, which fuser declines on our behalf. What it
//! shows is which signals are waiting for the writer. So we look.

use crate::sys::signal;

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mount) struct Writer {
    /// The thread, by its number in `/proc`; 0 for one that we cannot see.
    pub(in crate::mount) thread: u32,
    /// Its table of open files, by a number of the kernel's, if it has told.
    pub(in crate::mount) files: Option<u64>,
}

/// The signals by which a user stops a program.
const STOP: [i32; 5] = [signal::SIGHUP, signal::SIGINT, signal::SIGQUIT, signal::SIGKILL, signal::SIGTERM];

impl Writer {
    /// Whether a signal waits for it that would end its wait if the kernel let it.
    pub(super) fn wants_to_stop(self) -> bool {
        if self.thread == 0 {
            return false;
        }
        // A writer that is gone cannot be told anything; its request ends by itself.
        std::fs::read_to_string(format!("/proc/{}/status", self.thread))
            .is_ok_and(|status| is_stopped(&status))
    }
}

fn is_stopped(status: &str) -> bool {
    let pending = mask(status, "SigPnd:") | mask(status, "ShdPnd:");
    let deaf = mask(status, "SigBlk:") | mask(status, "SigIgn:");
    let stop = STOP.iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
    pending & !deaf & stop != 0
}

fn mask(status: &str, key: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(key));
    value.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(thread: u64, process: u64, blocked: u64, ignored: u64) -> String {
        format!(
            "Name:\tbash\nState:\tD (disk sleep)\nSigPnd:\t{thread:016x}\nShdPnd:\t{process:016x}\n\
             SigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t0000000000000002\n"
        )
    }

    #[test]
    fn a_killed_or_interrupted_writer_wants_to_stop() {
        assert!(is_stopped(&status(0x100, 0, 0, 0)));
        assert!(is_stopped(&status(0, 0x2, 0, 0)));
        assert!(is_stopped(&status(0, 0x4000, 0, 0)));
    }

    #[test]
    fn others_do_not() {
        assert!(!is_stopped(&status(0, 0, 0, 0)));
        // SIGINT ignored, SIGTERM blocked, SIGCHLD and SIGWINCH only.
        assert!(!is_stopped(&status(0, 0x2, 0, 0x2)));
        assert!(!is_stopped(&status(0, 0x4000, 0x4000, 0)));
        assert!(!is_stopped(&status(0, 0x0801_0000, 0, 0)));
        assert!(!is_stopped(""));
        assert!(!Writer { thread: 0, files: None }.wants_to_stop());
    }
}
