//! Ctrl-C on the command line: the first lets a rebase stop cleanly, the second ends the program.
//!
//! Owns the signals; what is to be stopped stops by itself when it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use super::{print, progress};
use crate::error::{Error, Result};
use crate::rebase::{Phase, Progress};
use crate::sys::{StopSignals, signal};

/// Who has not stopped after so long is said to take a moment.
const SOON: Duration = Duration::from_millis(300);

/// What is safe, and how to go on, when it was stopped that early.
pub(super) const UNTOUCHED: &str = "nothing stands on a new backing file yet (start it again)";

/// Watches for SIGINT, SIGTERM and SIGHUP as long as the program runs.
#[derive(Debug)]
pub(super) struct Stop {
    /// The signal that came; 0 for none.
    signal: Arc<AtomicI32>,
}

impl Stop {
    /// Stops what `progress` belongs to when one of the signals comes. To be called before the first
    /// other thread is started.
    pub(super) fn watch(progress: Arc<Progress>) -> Result<Self> {
        let cannot = |e| Error::io(e, "cannot wait for signals");
        let signals = StopSignals::block().map_err(cannot)?;
        let signal = Arc::new(AtomicI32::new(0));
        let came = signal.clone();
        let wait = move || {
            let number = signals.wait();
            came.store(number, Ordering::Release);
            progress.cancel();
            // The next one is for this thread, and ends the program.
            if let Err(e) = signals.unblock() {
                log::debug!("a second signal will not end the program: {e}");
            }
            linger(number, &progress);
        };
        thread::Builder::new().name("signals".into()).spawn(wait).map_err(cannot)?;
        Ok(Self { signal })
    }

    /// The signal that came, if one did.
    pub(super) fn signal(&self) -> Option<i32> {
        Some(self.signal.load(Ordering::Acquire)).filter(|&number| number != 0)
    }
}

/// Waits for the end of the program, or ends it where there is nothing to wait for.
fn linger(number: i32, progress: &Progress) -> ! {
    thread::sleep(SOON);
    if progress.phase() == Phase::Plan {
        // Somebody looks at metadata. Nothing has been copied, and nothing needs to be put away.
        progress::take_away();
        print::complain(&format!("rebasefs: {} before anything was copied: {UNTOUCHED}", name(number)));
        std::process::exit(exit_code(number).into());
    }
    let what = "finishing what is under way, so that nothing is lost; once more ends it at once";
    print::complain(&format!("rebasefs: {}: {what}", name(number)));
    loop {
        thread::park();
    }
}

/// What a program ends with that a signal has stopped, as shells have it.
pub(super) fn exit_code(number: i32) -> u8 {
    u8::try_from(128 + number).unwrap_or(u8::MAX)
}

/// The name of one of the signals.
pub(super) fn name(number: i32) -> &'static str {
    match number {
        signal::SIGINT => "SIGINT",
        signal::SIGTERM => "SIGTERM",
        _ => "SIGHUP",
    }
}
