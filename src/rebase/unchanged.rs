//! Old and new backing file must be, at the swap, what they were when they were read.

use crate::chain::{Chain, Watch, Way};
use crate::error::{Error, ErrorKind, Result};

/// What to do about somebody who writes.
pub(super) const LEAVE_ALONE: &str = "nobody may write to a backing file; when nobody does, start it again";

/// The files below the overlay as they were when a rebase began.
pub(super) struct Bases {
    old: Watch,
    new: Watch,
}

impl Bases {
    pub fn new(old: &Chain, new: &Chain) -> Self {
        Self { old: Watch::new(old), new: Watch::new(new) }
    }

    /// Refuses to go on where somebody has written to one of them, or has put another file in the
    /// place of a new one: the image would stand on what nobody has looked at. That an old one was
    /// moved away does no harm: we read the file that we have open. Nor does a new mode or link,
    /// which moves the change time alone.
    pub fn refuse_changed(&self) -> Result<()> {
        let old = self.old.changes().find(|change| change.way == Way::Written);
        let new = || self.new.changes().find(|change| change.way != Way::Touched);
        match old.or_else(new) {
            None => Ok(()),
            Some(change) => {
                let what = format!(
                    "{change}: has changed while it was being compared; the image still stands on what it stood on"
                );
                Err(Error::new(ErrorKind::Busy, what).hint(LEAVE_ALONE))
            }
        }
    }
}
