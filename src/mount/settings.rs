//! What `chmod`, `chown`, `touch` and `truncate` ask for, and what comes of it: attributes are what they
//! are, but for the size and the modification time of a disk that is written.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::attributes::Attributes;
use super::image::Image;
use super::tree::{Inode, Node};
use super::view::{Open, View};
use super::writing::{Space, Writing};
use crate::error::{Error, ErrorKind, Result};

/// Attributes that somebody wants to set, as far as he names them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settings {
    /// Permissions, with the bits of the file type.
    pub(super) mode: Option<u32>,
    pub(super) user: Option<u32>,
    pub(super) group: Option<u32>,
    /// Bytes.
    pub(super) size: Option<u64>,
    pub(super) modified: Option<SystemTime>,
    /// Whether the time of the last access is named: nobody keeps it.
    pub(super) sets_access_time: bool,
    /// The opening by which it is asked for (`ftruncate`). What `open` with `O_TRUNC` asks for comes without one.
    pub(super) handle: Option<u64>,
    /// The thread that asks.
    pub(super) thread: u32,
}

/// An opening of the disk for writing.
///
/// `O_TRUNC` and `ftruncate` to 0 empty a file, and a disk has nothing less than its size. The disk keeps
/// its bytes then, as a block device does; but a program that has emptied a file relies on zeros where it
/// leaves something out (`cp` of a file with holes, `qemu-img convert`): these it gets, up to the
/// last byte that it writes.
#[derive(Debug)]
pub(super) struct DiskOpening {
    thread: u32,
    emptied: Mutex<Emptied>,
}

#[derive(Debug, Default)]
struct Emptied {
    /// How far it was written since it was emptied, in bytes; `None` if it was not.
    end: Option<u64>,
    /// How often something was zeroed that the kernel may have pages of.
    zeroed: u64,
    /// How much of that the kernel has forgotten.
    forgotten: u64,
}

impl DiskOpening {
    pub(super) fn new(thread: u32) -> Self {
        Self { thread, emptied: Mutex::default() }
    }

    fn empty(&self) {
        self.emptied.lock().unwrap_or_else(PoisonError::into_inner).end = Some(0);
    }

    /// Zeroes what was left out before `start`, if the file was emptied; it reaches to `end` from now on.
    pub(super) fn reach(&self, image: &Image, start: u64, end: u64) -> Result<()> {
        let mut emptied = self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reached) = emptied.end else { return Ok(()) };
        if start > reached {
            emptied.zeroed += 1;
            image.zero(reached, start - reached, Space::GivenBack)?;
        }
        emptied.end = Some(reached.max(end));
        Ok(())
    }

    /// What the kernel has to forget, if anything: it has forgotten it when [`forgot`](Self::forgot) is
    /// called with this. Who closes another copy of the descriptor meanwhile has to wait as well.
    pub(super) fn cached(&self) -> Option<u64> {
        let emptied = self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        (emptied.zeroed > emptied.forgotten).then_some(emptied.zeroed)
    }

    /// The kernel has forgotten what it had to.
    pub(super) fn forgot(&self, cached: u64) {
        let mut emptied = self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        emptied.forgotten = emptied.forgotten.max(cached);
    }

    /// Whether it was emptied and was written no further than this.
    fn ends_within(&self, size: u64) -> bool {
        let emptied = self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        emptied.end.is_some_and(|end| end <= size)
    }
}

impl View {
    /// Sets attributes of a file.
    ///
    /// # Errors
    /// They cannot be others than they are, or the file is for reading.
    pub(super) fn set_attributes(&self, inode: Inode, wanted: &Settings) -> Result<Attributes> {
        let shown = self.attributes(inode)?;
        let owner = self.ownership();
        let is_other = |wanted: Option<u32>, is: u32| wanted.is_some_and(|wanted| wanted != is);
        let mode = wanted.mode.map(|mode| mode & 0o7777);
        if is_other(mode, shown.permissions.into())
            || is_other(wanted.user, owner.user)
            || is_other(wanted.group, owner.group)
        {
            let what = "files of the mount belong to whoever mounted it, and keep their permissions";
            return Err(Error::new(ErrorKind::NotPermitted, what));
        }
        if let Some(size) = wanted.size {
            self.set_size(inode, size, wanted)?;
        }
        if wanted.modified.is_some() || wanted.sets_access_time {
            self.set_times(inode, wanted.modified)?;
        }
        self.attributes(inode)
    }

    /// Lets a file have so many bytes: a control file none, which shells want before they write to it
    /// and which means nothing here; the disk more than it has, if it may grow.
    fn set_size(&self, inode: Inode, size: u64, wanted: &Settings) -> Result<()> {
        match inode.node() {
            Some(Node::Control(file)) if file.is_writable() && size == 0 => Ok(()),
            Some(Node::Control(file)) if file.is_writable() => {
                Err(Error::new(ErrorKind::NotPermitted, "not a size"))
            }
            Some(Node::Disk) if self.writing != Writing::Refused => self.set_disk_size(size, wanted),
            _ => Err(is_for_reading()),
        }
    }

    fn set_disk_size(&self, size: u64, wanted: &Settings) -> Result<()> {
        let opening = self.opening_of(wanted);
        if let (0, Some(opening)) = (size, &opening) {
            opening.empty();
            return Ok(());
        }
        if size > self.image.size() && self.writing == Writing::BytesAndSize {
            self.image.grow(size).inspect_err(|e| log::error!("growing the disk: {e}"))?;
        }
        let emptied = opening.filter(|opening| opening.ends_within(size));
        match emptied {
            // What its last hole leaves out.
            Some(opening) if size <= self.image.size() => opening.reach(&self.image, size, size),
            _ if size == self.image.size() => Ok(()),
            _ => {
                let what = "the disk keeps its size; with --grow it can become larger";
                Err(Error::new(ErrorKind::NotPermitted, what))
            }
        }
    }

    /// The opening by which a size is set: where the kernel does not name it, the last one of this thread.
    fn opening_of(&self, wanted: &Settings) -> Option<Arc<DiskOpening>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match wanted.handle {
            Some(handle) => match open.get(&handle)? {
                Open::Disk(opening) => Some(opening.clone()),
                _ => None,
            },
            None => {
                let of_thread = open.iter().filter_map(|(handle, open)| match open {
                    Open::Disk(opening) if opening.thread == wanted.thread => Some((handle, opening)),
                    _ => None,
                });
                of_thread.max_by_key(|(handle, _)| **handle).map(|(_, opening)| opening.clone())
            }
        }
    }

    fn set_times(&self, inode: Inode, modified: Option<SystemTime>) -> Result<()> {
        match inode.node() {
            // They have none of their own.
            Some(Node::Control(file)) if file.is_writable() => Ok(()),
            Some(Node::Disk) if self.writing != Writing::Refused => {
                modified.into_iter().for_each(|time| self.image.times().say(time));
                Ok(())
            }
            _ => Err(is_for_reading()),
        }
    }
}

pub(super) fn is_for_reading() -> Error {
    Error::new(ErrorKind::ReadOnly, "this file is for reading")
}
