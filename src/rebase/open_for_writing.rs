//! The one way in which an image is opened for writing: locked against all others, then read again.
//!
//! What was read before the lock was taken is what the image was like then. Another process may have rebased
//! it since, given it another size, taken a snapshot, or freed what the tables in memory lead to: a chain that
//! was opened without locks (`--force-share`) can be hours old. So everything that decides is read again
//! under the lock. What a chain in memory can take anew is taken anew; where the image does not stand on what
//! was opened any more, it is refused. Writes nothing but the repair of an image that was not closed properly.

use std::path::Path;
use std::sync::Arc;

use super::target::refuse_shared_files;
use super::{overlay_of, qcow2_of};
use crate::chain::{Chain, Opener};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{HostFile, Identity, Lock};
use crate::layer::qcow2::Qcow2;
use crate::layer::qcow2::repair::recover;
use crate::layer::{Layer, Raw, Reference};

/// What to do about a name that leads elsewhere.
pub(super) const LEAVE_NAMES: &str =
    "nobody may move the files of a chain meanwhile; when nobody does, start it again";

/// What to do about an image that another process has written to.
const OPEN_ANEW: &str = "open it anew, and mount it again if it is mounted";

/// Whether what an image stands on has a part in what is going to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// Its bytes are read.
    Matters,
    /// They are not: only the image itself is written to, or its reference.
    Ignored,
}

/// An image that nobody else can open, as it is now. The lock gives way to the one that was held before when
/// this is dropped.
#[derive(Debug)]
pub(crate) struct ForWriting<'a> {
    /// The image, read under the lock.
    pub image: Qcow2,
    /// What it stands on: of no use where that is [ignored](Below::Ignored).
    pub below: Chain,
    lock: WriteLock<'a>,
}

impl<'a> ForWriting<'a> {
    /// Locks the top of `chain`, which was opened for writing, and its external data file.
    ///
    /// # Errors
    /// The top is no qcow2 image, or was opened for reading only; it shares a file with what is below it;
    /// another process holds it; its path leads to another file by now, or its header to another backing
    /// file or external data file ([`ErrorKind::Busy`]).
    pub fn open(chain: &'a Chain, opener: &Opener, below: Below) -> Result<Self> {
        let top = chain.top().ok_or_else(|| Error::invalid("there is no image to write to"))?;
        overlay_of(top)?;
        if below == Below::Matters {
            refuse_shared_files(top, &chain.below(0))?;
        }
        let lock = WriteLock::take(top, opener)?;
        refuse_renamed(top)?;
        if top.as_live().is_none() {
            top.file().take_size_anew()?;
            top.data_file().take_size_anew()?;
        }
        let (image, below) = as_it_is_now(chain, opener, below)?;
        Ok(Self { image, below, lock })
    }

    /// The same, repaired if it was not closed properly.
    ///
    /// # Errors
    /// It cannot be repaired.
    pub fn recovered(mut self) -> Result<Self> {
        if self.image.is_dirty() {
            self.image = recover(&self.image)?;
        }
        Ok(self)
    }

    /// The same, locked also when this is gone: as long as the image's file is open.
    pub fn stay_locked(&mut self) {
        self.lock.before = Lock::Write;
    }
}

/// The top of a chain and what it stands on, read again. Where locks keep others from writing, only the top
/// can have changed, by us.
///
/// # Errors
/// As [`ForWriting::open`].
pub(super) fn as_it_is_now(chain: &Chain, opener: &Opener, below: Below) -> Result<(Qcow2, Chain)> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image to look at"))?;
    let before = qcow2_of(top)?;
    let now = before.reopen()?;
    refuse_other_data_file(before, &now)?;
    if below == Below::Matters {
        refuse_other_backing(&**top.file(), before.backing(), now.backing())?;
    }
    let what_is_below = chain.below(0);
    match below == Below::Ignored || opener.takes_locks() || chain.broken_off().is_some() {
        true => Ok((now, what_is_below)),
        false => Ok((now, opened_anew(&what_is_below)?)),
    }
}

/// The same files, with their tables as they are now: a rebase of one of them may have moved its clusters.
fn opened_anew(chain: &Chain) -> Result<Chain> {
    let layers: Result<Vec<Arc<dyn Layer>>> = chain.layers().iter().map(layer_anew).collect();
    layers.map(Chain::new)
}

fn layer_anew(layer: &Arc<dyn Layer>) -> Result<Arc<dyn Layer>> {
    layer.file().take_size_anew()?;
    layer.data_file().take_size_anew()?;
    let Some(before) = layer.as_qcow2() else { return Ok(Arc::new(Raw::open(layer.file().clone()))) };
    let now = before.reopen()?;
    refuse_other_data_file(before, &now)?;
    refuse_other_backing(&**layer.file(), before.backing(), now.backing())?;
    Ok(Arc::new(now))
}

fn refuse_other_backing(
    file: &dyn HostFile,
    before: Option<&Reference>,
    now: Option<&Reference>,
) -> Result<()> {
    refuse_other(file, "backing file", (before, now))
}

fn refuse_other_data_file(before: &Qcow2, now: &Qcow2) -> Result<()> {
    let named = (before.preamble().data_file()?, now.preamble().data_file()?);
    refuse_other(&**before.file(), "external data file", (named.0.as_ref(), named.1.as_ref()))
}

fn refuse_other(
    file: &dyn HostFile,
    what: &str,
    (before, now): (Option<&Reference>, Option<&Reference>),
) -> Result<()> {
    if before == now {
        return Ok(());
    }
    let named = |reference: Option<&Reference>| match reference {
        None => format!("no {what}"),
        Some(Reference { name, format }) => {
            let format = format.as_ref().map_or_else(String::new, |format| format!(" ({format})"));
            format!("'{}'{format} as its {what}", Path::new(name).display())
        }
    };
    let what = format!(
        "another process has written to it: it names {} now, and named {} when it was opened",
        named(now),
        named(before)
    );
    Err(Error::new(ErrorKind::Busy, what).path(file.path()).hint(OPEN_ANEW))
}

/// Refuses an image whose path, or that of its external data file, leads to another file by now, or to none:
/// who opens it by that path would not see what is written to this one.
///
/// # Errors
/// It is so.
pub(super) fn refuse_renamed(top: &Arc<dyn Layer>) -> Result<()> {
    [top.file(), top.data_file()].into_iter().try_for_each(|file| refuse_led_elsewhere(&**file))
}

fn refuse_led_elsewhere(file: &dyn HostFile) -> Result<()> {
    if file.descriptor().is_none() {
        // It is no file of this machine, and has no path.
        return Ok(());
    }
    let what = match Identity::of(file.path()) {
        Ok(identity) if identity == file.identity() => return Ok(()),
        Ok(_) => "its path leads to another file by now than the one that is open".to_owned(),
        Err(e) => format!("its path does not lead to the file any more that is open: {}", e.kind()),
    };
    Err(Error::new(ErrorKind::Busy, what).path(file.path()).hint(LEAVE_NAMES))
}

/// The write lock of an image and of its external data file, taken whatever `--force-share` says: that is
/// about reading. Gives way to what was held before when dropped.
#[derive(Debug)]
struct WriteLock<'a> {
    top: &'a Arc<dyn Layer>,
    before: Lock,
}

impl<'a> WriteLock<'a> {
    fn take(top: &'a Arc<dyn Layer>, opener: &Opener) -> Result<Self> {
        let before = match (top.as_live(), opener.takes_locks()) {
            // A guest writes: it is locked all the while.
            (Some(_), _) => Lock::Write,
            (None, true) => Lock::Read,
            (None, false) => Lock::None,
        };
        let lock = Self { top, before };
        lock.set(Lock::Write).doing(|| "locking the image for writing".to_owned())?;
        Ok(lock)
    }

    fn set(&self, lock: Lock) -> Result<()> {
        self.top.file().lock(lock)?;
        match self.top.data_file().identity() == self.top.file().identity() {
            true => Ok(()),
            false => self.top.data_file().lock(lock),
        }
    }
}

impl Drop for WriteLock<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.set(self.before) {
            log::warn!("{error}");
        }
    }
}
