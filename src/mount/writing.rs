//! What a guest writes to the flat file: into the overlay, through its writer.
//!
//! Knows where the disk ends and which errors a writer understands; how a write becomes clusters is the
//! writer's business.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;

use super::control::Answer;
use super::image::Image;
use super::settings::DiskOpening;
use super::tree::Inode;
use super::view::{View, data_error};
use crate::chain::{Chain, Opener};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::GuestOffset;
use crate::layer::qcow2::{Live, Writer};
use crate::rebase::{Below, ForWriting};

/// What may be written to the disk of a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Writing {
    /// Nothing.
    #[default]
    Refused,
    /// Its bytes.
    Bytes,
    /// Its bytes, and a larger size.
    BytesAndSize,
}

/// Bytes that are zeroed before others have their turn.
const ZEROED_AT_ONCE: u64 = 1 << 30;

/// What becomes of a range that is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Kept,
    GivenBack,
}

/// Lets the top of `chain`, opened for writing, be written by a guest. It is locked from now on; an image
/// that was not closed properly is repaired first.
pub(super) fn prepare(chain: &Chain, opener: &Opener) -> Result<Chain> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image to write to"))?;
    if top.as_qcow2().is_none() {
        let what = format!("a {} image is not written through a mount", top.format());
        return Err(Error::unsupported(what).path(top.file().path()).hint("write to the file itself"));
    }
    if !opener.takes_locks() {
        log::warn!("{}: --force-share is about reading: the image is locked", top.file().path().display());
    }
    let mut own = ForWriting::open(chain, opener, Below::Matters)?.recovered()?;
    let live = Live::open(&own.image)?;
    own.stay_locked();
    Ok(own.below.under(Arc::new(live)))
}

impl Image {
    /// Writes `bytes` at `offset` as far as the disk reaches; returns how many that were.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<usize> {
        let writer = self.writer()?;
        let guest = writer.guest();
        // Not before: while a write waits, the disk can get another chain, and lose what the one before had.
        let chain = self.chain();
        let left = chain.virtual_size().saturating_sub(offset);
        let length = left.min(bytes.len() as u64) as usize;
        if length == 0 && !bytes.is_empty() {
            return Err(Error::new(ErrorKind::NoSpace, "the disk ends before that"));
        }
        let written = guest.write(&chain, GuestOffset(offset), &bytes[..length]);
        self.note_written();
        written.map(|()| length)
    }

    /// Zeroes a range, as far as the disk reaches: piece by piece, so that whoever needs the disk to stand
    /// still need not wait for all of it.
    pub(super) fn zero(&self, offset: u64, length: u64, space: Space) -> Result<()> {
        let writer = self.writer()?;
        let mut at = offset;
        let end = offset.saturating_add(length);
        let zeroed = loop {
            let guest = writer.guest();
            let chain = self.chain();
            let length = end.min(chain.virtual_size()).saturating_sub(at).min(ZEROED_AT_ONCE);
            let zeroed = guest.zero(&chain, GuestOffset(at), length, space == Space::GivenBack);
            at += length;
            if zeroed.is_err() || length == 0 {
                break zeroed;
            }
        };
        self.note_written();
        zeroed
    }

    /// Whoever writes for the guest: the same as long as the mount lives.
    fn writer(&self) -> Result<Arc<Writer>> {
        Ok(self.chain().live()?.writer().clone())
    }

    /// Returns when all that was written is durable.
    pub(super) fn flush(&self) -> Result<()> {
        match self.chain().live() {
            Ok(live) => live.writer().flush(),
            // Nothing was written.
            Err(_) => Ok(()),
        }
    }

    /// Makes durable what waits in memory, if anything does.
    pub(super) fn flush_changes(&self) -> Result<()> {
        match self.chain().live() {
            Ok(live) if live.writer().has_changes() => live.writer().flush(),
            _ => Ok(()),
        }
    }

    /// Whether a write would have to wait for somebody who needs the disk to stand still.
    pub(super) fn is_held_off(&self) -> bool {
        self.chain().live().is_ok_and(|live| live.writer().is_held_off())
    }

    /// Nobody else gives the disk another chain as long as this lives.
    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.change_lock().lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the disk have `size` bytes, more than it has; the new ones are zeros.
    pub(super) fn grow(&self, size: u64) -> Result<()> {
        let Ok(_changing) = self.change_lock().try_lock() else {
            return Err(Error::new(ErrorKind::Busy, "the disk cannot grow while a rebase is under way"));
        };
        self.replace(self.chain().grown(size)?);
        self.note_written();
        Ok(())
    }
}

impl View {
    /// Zeroes a range of the disk.
    pub(super) fn zero(&self, inode: Inode, (offset, length): (u64, u64), space: Space, answer: Answer) {
        if inode != Inode::DISK {
            return answer(Err(ErrorKind::Unsupported.errno()));
        }
        self.when_disk_moves(&[], move |image, _| {
            answer(image.zero(offset, length, space).map_err(|e| write_error(e).errno()));
        });
    }

    /// Lets `work` write to the disk: here, or in a thread of its own if it has to wait, for those who
    /// serve are needed to serve others meanwhile.
    pub(super) fn when_disk_moves(&self, bytes: &[u8], work: impl FnOnce(&Image, &[u8]) + Send + 'static) {
        if !self.image.is_held_off() {
            return work(&self.image, bytes);
        }
        let (image, bytes) = (self.image.clone(), bytes.to_vec());
        let waiting = thread::Builder::new().name("write".into()).spawn(move || work(&image, &bytes));
        if let Err(e) = waiting {
            // The answer has gone with the closure; fuser gives EIO in its place.
            log::error!("cannot start a thread to write: {e}");
        }
    }

    /// Lets the kernel forget its pages of what an opening has zeroed. In a thread of its own: the kernel waits
    /// for pages that are being read.
    pub(super) fn forget_zeroed(&self, opening: Arc<DiskOpening>, answer: Answer) {
        let Some(cached) = opening.cached() else { return answer(Ok(())) };
        let control = self.control.clone();
        let forget = move || {
            control.forget_pages();
            opening.forgot(cached);
            answer(Ok(()));
        };
        if let Err(e) = thread::Builder::new().name("forget".into()).spawn(forget) {
            // The answer has gone with the closure; fuser gives EIO in its place.
            log::error!("cannot start a thread to drop what is cached: {e}");
        }
    }

    /// Returns when all that was written to a file is durable.
    pub(super) fn sync(&self, inode: Inode) -> Result<()> {
        match inode {
            Inode::DISK => self.image.flush().map_err(write_error),
            _ => Ok(()),
        }
    }
}

/// What a writer understands: that there is no space, or that he may not; else that it went wrong.
pub(super) fn write_error(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NoSpace | ErrorKind::ReadOnly => error,
        _ => data_error(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rebase;
    use crate::file::{Access, LocalFile};
    use crate::layer::qcow2::create::{Spec, create};
    use crate::layer::{Format, Reference};
    use crate::rebase::Progress;

    /// Between the opening and the lock, which the mount takes without locks before.
    #[test]
    fn an_image_that_was_rebased_before_it_was_locked_is_not_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("old"), vec![0x11; 1 << 20]).unwrap();
        std::fs::write(path("new"), vec![0x22; 1 << 20]).unwrap();
        let backing = Some(Reference::new("old", Format::Raw));
        let spec = Spec { size: 1 << 20, backing, ..Spec::default() };
        create(&LocalFile::create(&path("cow")).unwrap(), None, &spec).unwrap();
        let opener = Opener::new().force_share();
        let open = || opener.chain(&path("cow"), None, Access::ReadWrite).unwrap();
        let before = open();
        drop(Rebase::new(path("cow")).onto("new").run(&Progress::default()).unwrap());
        let refused = prepare(&before, &opener).unwrap_err();
        assert!(
            refused.kind() == ErrorKind::Busy && refused.to_string().contains("names 'new'"),
            "{refused}"
        );
        // Nobody is locked out by what was refused, and by what was not everybody is.
        drop(prepare(&open(), &opener).unwrap());
        let held = prepare(&open(), &opener).unwrap();
        drop(before);
        let error = prepare(&open(), &opener).unwrap_err();
        assert!(error.to_string().contains("in use by another process"), "{error}");
        drop(held);
    }

    /// While a write waits for a reclaim, the disk gets another chain, and the overlay may have lost what it
    /// held: what the write leaves of a cluster is what the new backing file has.
    #[test]
    fn a_write_that_had_to_wait_sees_the_disk_as_it_is_then() {
        const CLUSTER: u64 = 64 << 10;
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("old"), vec![0x11; 64 * CLUSTER as usize]).unwrap();
        std::fs::write(path("new"), vec![0x22; 64 * CLUSTER as usize]).unwrap();
        let backing = Some(Reference::new("old", Format::Raw));
        let spec = Spec { size: 64 * CLUSTER, backing, ..Spec::default() };
        create(&LocalFile::create(&path("cow")).unwrap(), None, &spec).unwrap();
        let opener = Opener::new();
        let old = prepare(&opener.chain(&path("cow"), None, Access::ReadWrite).unwrap(), &opener).unwrap();
        let new =
            opener.chain(&path("new"), None, Access::ReadOnly).unwrap().under(old.top().unwrap().clone());
        let writer = old.live().unwrap().writer().clone();
        let image = Image::new(old.clone());
        for cluster in 0..64 {
            image.replace(old.clone());
            thread::scope(|scope| {
                let still = writer.hold_off_guests();
                let (began, begins) = std::sync::mpsc::channel();
                let image = &image;
                scope.spawn(move || {
                    began.send(()).unwrap();
                    image.write(cluster * CLUSTER + 100, &[0x33; 100]).unwrap();
                });
                begins.recv().unwrap();
                // It is about to wait, and does so or not yet: each time something else.
                (0..cluster).for_each(|_| thread::yield_now());
                image.replace(new.clone());
                drop(still);
            });
            let mut bytes = vec![0; CLUSTER as usize];
            image.chain().read_at(GuestOffset(cluster * CLUSTER), &mut bytes).unwrap();
            let expected = [&[0x22; 100][..], &[0x33; 100], &vec![0x22; CLUSTER as usize - 200]].concat();
            assert!(bytes == expected, "cluster {cluster}: a piece of a backing file that is none any more");
        }
    }
}
