//! Old and new backing file must be, at the swap, what they were when they were read.
//!
//! What nobody can see: a write on a file system that has no times of its own, one through a mapping where
//! the file system takes no note of it (tmpfs), and one to a block device.

use std::sync::Arc;

use super::Progress;
use crate::chain::{Chain, Change, Watch, Way};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Layer;

/// What to do about somebody who writes.
pub(super) const LEAVE_ALONE: &str = "nobody may write to a backing file; when nobody does, start it again";

/// How often all is compared again because a change time moves.
pub(super) const MOST_ROUNDS: usize = 3;

/// The files below the overlay as they were when a rebase began.
pub(super) struct Bases {
    old: Watch,
    new: Watch,
}

impl Bases {
    /// Takes note of them. Waits, some seconds at most, for a file that was written to a moment ago: until
    /// another write would move its times.
    pub fn new(old: &Chain, new: &Chain, progress: &Progress) -> Result<Self> {
        let settled = |chain| Watch::settled(chain, || progress.stop_if_cancelled());
        Ok(Self { old: settled(old)?, new: settled(new)? })
    }

    /// Refuses to go on where somebody has written to one of them, or has put another file in the
    /// place of a new one: the image would stand on what nobody has looked at. That an old one was
    /// moved away does no harm: we read the file that we have open.
    ///
    /// Whether a change time has moved and nothing else. A new name, mode or link does that, and so does
    /// somebody who writes and sets the modification time back: what was compared is to be compared again.
    pub fn are_touched(&self) -> Result<bool> {
        let old = self.old.changes().find(|change| change.way == Way::Written);
        let new = || self.new.changes().find(|change| change.way != Way::Touched);
        match old.or_else(new) {
            None => Ok(self.old.is_touched() || self.new.is_touched()),
            Some(change) => Err(changed(&change.to_string())),
        }
    }

    /// Refuses to go on also where a change time has moved.
    pub fn refuse_touched(&self) -> Result<()> {
        match self.are_touched()? {
            false => Ok(()),
            true => {
                let change: Option<Change> = self.old.changes().chain(self.new.changes()).next();
                Err(changed(&change.map_or("a backing file".to_owned(), |change| change.to_string())))
            }
        }
    }
}

/// A chain with its tables as they are in the files now.
pub(super) fn read_again(chain: &Chain) -> Result<Chain> {
    let read_again = |layer: &Arc<dyn Layer>| -> Result<Arc<dyn Layer>> {
        let Some(image) = layer.as_qcow2() else { return Ok(layer.clone()) };
        let again = image.reopen()?;
        match again.backing() == image.backing() && again.virtual_size() == image.virtual_size() {
            true => Ok(Arc::new(again)),
            false => Err(changed(&image.file().path().display().to_string())),
        }
    };
    Ok(chain.with_layers(chain.layers().iter().map(read_again).collect::<Result<_>>()?))
}

fn changed(what: &str) -> Error {
    let what = format!(
        "{what}: has changed while it was being compared; the image still stands on what it stood on"
    );
    Error::new(ErrorKind::Busy, what).hint(LEAVE_ALONE)
}
