//! Work on a thread of its own, while whoever asked for it looks now and then how far it is.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// How often somebody looks.
const LOOK: Duration = Duration::from_millis(100);

/// Does `work`, and calls `look` every now and then until that is over.
///
/// # Errors
/// Those of the work. If it panics, so does this.
pub(crate) fn watched<T: Send>(work: impl FnOnce() -> Result<T> + Send, mut look: impl FnMut()) -> Result<T> {
    thread::scope(|scope| {
        let (sender, receiver) = channel();
        scope.spawn(move || sender.send(work()));
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => look(),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::Io, "the rebase broke off (this is a bug)"));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn who_looks_can_stop_the_work() {
        let is_stopped = AtomicBool::new(false);
        let work = || {
            while !is_stopped.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            Err::<(), _>(Error::new(ErrorKind::Cancelled, "stopped"))
        };
        let error = watched(work, || is_stopped.store(true, Ordering::Relaxed)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(watched(|| Ok(7), || {}).unwrap(), 7);
    }
}
