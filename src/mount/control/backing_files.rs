//! Looks whether somebody has changed a backing file under the mount.
//!
//! On a thread of its own: a network file system that does not answer must not let `ctl/status`
//! hang.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::chain::{Change, Watch};
use crate::mount::times::Moved;

/// Who asks waits so long; a look that takes longer is in the next answer.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
pub(super) struct BackingFiles {
    known: Mutex<Known>,
    looked: Condvar,
}

#[derive(Debug, Default)]
struct Known {
    is_looking: bool,
    changes: Vec<Change>,
    /// When these were others.
    moved: Moved,
    /// What the log has been told of.
    warned: HashSet<PathBuf>,
}

impl BackingFiles {
    /// What has changed since `watch` began, as far as can be told soon.
    pub(super) fn look(self: &Arc<Self>, watch: Arc<Watch>) -> Vec<Change> {
        let mut known = self.known();
        if !known.is_looking {
            let files = self.clone();
            let look = move || files.note(watch.changes().collect());
            match thread::Builder::new().name("backing files".into()).spawn(look) {
                Ok(_) => known.is_looking = true,
                Err(e) => log::warn!("cannot start a thread to look at the backing files: {e}"),
            }
        }
        let waited = self.looked.wait_timeout_while(known, PATIENCE, |known| known.is_looking);
        waited.unwrap_or_else(PoisonError::into_inner).0.changes.clone()
    }

    fn note(&self, changes: Vec<Change>) {
        let mut known = self.known();
        for change in &changes {
            if known.warned.insert(change.path.clone()) {
                log::warn!("{change}: the backing file has changed while it is mounted");
            }
        }
        if known.changes != changes {
            known.moved = known.moved.now();
        }
        known.changes = changes;
        known.is_looking = false;
        self.looked.notify_all();
    }

    /// When something else was found than before.
    pub(super) fn moved(&self) -> Moved {
        self.known().moved
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
