//! The mounted view without FUSE: what each file operation does, in terms of [`Node`], [`Image`]
//! and [`Control`]. Owns the table of open files. All that the adapter does is to call this.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::attributes::{Attributes, FOREVER};
use super::control::{Answer, Control, Opened, Waker, Writer};
use super::flat::{Allocated, Flat, Seek};
use super::image::Image;
use super::parts::{Folder, Part};
use super::settings::{DiskOpening, is_for_reading};
use super::times::Moved;
use super::tree::{CONTROL_FILES, ControlFile, Directory, Inode, Node};
use super::writing::{Writing, write_error};
use crate::error::{Error, ErrorKind, Result};

/// The size shown for control files while somebody has them open for writing. The kernel lets several
/// processes write at the same time only below the end of a file, and a second writer shall not queue
/// up, but be told that the first is at work. `sysfs` shows this size too.
const PAGE: u64 = 4096;

/// What does not change of the files in the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ownership {
    pub(super) user: u32,
    pub(super) group: u32,
    /// When the image was modified before it was mounted: the time of all that has not changed since.
    pub(super) modified: SystemTime,
}

/// What the kernel may do with the pages of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Keep them from one opening to the next.
    Kept,
    /// The same, and each closing comes to us.
    KeptAndFlushed,
    /// Have none: each read and write comes to us.
    None,
}

/// A directory entry.
#[derive(Clone, Debug)]
pub(super) struct Child {
    pub(super) inode: Inode,
    pub(super) name: String,
    pub(super) is_directory: bool,
}

/// So many directory entries are given at once.
const ENTRIES: usize = 512;

/// What is behind a handle.
#[derive(Clone)]
pub(super) enum Open {
    /// A control file, and its inode if it was opened for writing.
    Control(Arc<Mutex<Opened>>, Option<Inode>),
    /// The disk, for writing.
    Disk(Arc<DiskOpening>),
    /// A layer, its inode, and when it may have changed before it was opened.
    Layer(Inode, Arc<Flat>, Moved),
}

/// The mounted view.
pub(super) struct View {
    pub(super) image: Arc<Image>,
    pub(super) control: Arc<Control>,
    ownership: Ownership,
    pub(super) writing: Writing,
    /// The open files by handle. Who only reads the disk and what changes with it needs none and has 0.
    pub(super) open: Mutex<HashMap<u64, Open>>,
    next_handle: AtomicU64,
    /// The incarnation of each control file, by its place in the enumeration.
    incarnations: [AtomicU32; CONTROL_FILES],
}

impl View {
    pub(super) fn new(
        image: Arc<Image>,
        control: Arc<Control>,
        ownership: Ownership,
        writing: Writing,
    ) -> Self {
        let (open, next_handle) = (Mutex::default(), AtomicU64::new(1));
        let incarnations = Default::default();
        Self { image, control, ownership, writing, open, next_handle, incarnations }
    }

    pub(super) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// Virtual size of the disk in bytes.
    pub(super) fn disk_size(&self) -> u64 {
        self.image.size()
    }

    /// How many bytes of the disk take space, or may do so.
    pub(super) fn allocated_bytes(&self) -> u64 {
        match self.image.allocated() {
            Allocated::Exactly(bytes) | Allocated::AtMost(bytes) => bytes,
        }
    }

    pub(super) fn lookup(&self, parent: Inode, name: &OsStr) -> Result<Attributes> {
        // Asked for by those who have a handle (`open_by_handle_at`) and no name.
        match name.as_bytes() {
            b"." => return self.attributes_if_there(parent),
            b".." => return directory(parent).and_then(|_| self.attributes(Inode::ROOT)),
            _ => {}
        }
        // All names are UTF-8.
        let name = name.to_str().ok_or_else(no_such_file)?;
        let directory = directory(parent)?;
        let always = directory.names().iter().find(|(other, _)| *other == name);
        let found = match (always, directory) {
            (Some((_, node)), _) => Some(*node).filter(|node| self.is_there(*node)),
            (None, Directory::Parts(folder)) => {
                let part = self.image.part_named(folder, name).map_err(|e| data_error(&e))?;
                part.map(Node::Part)
            }
            (None, _) => None,
        };
        self.attributes(self.inode(found.ok_or_else(no_such_file)?))
    }

    /// The attributes of a file that the kernel has forgotten, and that may be gone.
    fn attributes_if_there(&self, inode: Inode) -> Result<Attributes> {
        match inode.node().ok_or_else(no_such_file)? {
            node @ Node::Directory(_) if !self.is_there(node) => Err(no_such_file()),
            Node::Part(part @ Part::Layer(_))
                if inode.incarnation() != self.image.number() && self.past_layer(inode, part).is_none() =>
            {
                Err(no_such_file())
            }
            _ => self.attributes(inode),
        }
    }

    /// Whether there is anything behind a name that is always the same: a disk may have no partitions.
    fn is_there(&self, node: Node) -> bool {
        match node {
            Node::Directory(Directory::Parts(folder @ Folder::Partitions)) => {
                let first = self.image.parts(folder, 0, 1).map_err(|e| data_error(&e));
                first.is_ok_and(|first| !first.is_empty())
            }
            _ => true,
        }
    }

    /// The inode of a node as it is now.
    fn inode(&self, node: Node) -> Inode {
        node.inode(match node {
            Node::Part(_) => self.image.number(),
            Node::Control(file) => self.incarnation(file).load(Ordering::Acquire),
            Node::Directory(_) | Node::Disk => 0,
        })
    }

    fn incarnation(&self, file: ControlFile) -> &AtomicU32 {
        &self.incarnations[file as usize]
    }

    pub(super) fn attributes(&self, inode: Inode) -> Result<Attributes> {
        match inode.node().ok_or_else(no_such_file)? {
            Node::Directory(_) => Ok(Attributes::of_directory(inode)),
            Node::Disk => Ok(self.attributes_of_disk(inode)),
            Node::Control(file) => Ok(self.attributes_of_control(inode, file)),
            Node::Part(part) => self.attributes_of_part(inode, part),
        }
    }

    fn attributes_of_disk(&self, inode: Inode) -> Attributes {
        // Layer 0 is the same file. `cp -a` removes a file with several names before it writes.
        let names = if self.writing == Writing::Refused { 2 } else { 1 };
        let shown = Attributes::of_data(inode, self.image.size(), self.image.allocated());
        let permissions = if self.writing == Writing::Refused { 0o444 } else { 0o644 };
        let (links, times) = (names, self.image.times());
        let (moved, dated) = (times.of_disk(), times.said_of_disk());
        Attributes { links, moved, dated, permissions, name_valid: FOREVER, ..shown }
    }

    fn attributes_of_part(&self, inode: Inode, part: Part) -> Result<Attributes> {
        if let Some((past, moved)) = self.past_layer(inode, part) {
            let shown = Attributes::of_data(inode, past.size(), Allocated::AtMost(past.size()));
            return Ok(Attributes { moved, ..shown });
        }
        let view = self.image.part(part).map_err(|e| data_error(&e))?;
        let shown = Attributes::of_data(inode, view.size(), view.allocated());
        let times = self.image.times();
        let moved = match part {
            Part::Layer(_) => times.of_layers(),
            Part::Snapshot(_) => times.of_snapshots(),
            Part::Partition(_) => times.of_disk(),
        };
        // The kernel does not know that what is written to the disk is in a partition too.
        let is_written = self.writing != Writing::Refused && matches!(part, Part::Partition(_));
        let valid = if is_written { Duration::ZERO } else { shown.valid };
        Ok(Attributes { moved, valid, ..shown })
    }

    /// A layer of a chain that was replaced, if somebody has it open.
    fn past_layer(&self, inode: Inode, part: Part) -> Option<(Arc<Flat>, Moved)> {
        if !matches!(part, Part::Layer(_)) || inode.incarnation() == self.image.number() {
            return None;
        }
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().find_map(|open| match open {
            Open::Layer(its_inode, flat, moved) if *its_inode == inode => Some((flat.clone(), *moved)),
            _ => None,
        })
    }

    fn attributes_of_control(&self, inode: Inode, file: ControlFile) -> Attributes {
        // A dry run and a comparison need no image that can be written.
        let may_only_look = matches!(file, ControlFile::Difference | ControlFile::Rebase);
        let is_writable = file.is_writable() && (self.control.is_writable() || may_only_look);
        let size = self.control.size(file);
        let size = if self.is_open_for_writing(inode) { size.max(PAGE) } else { size };
        Attributes {
            inode,
            is_directory: false,
            size,
            blocks: size.div_ceil(512),
            permissions: if is_writable { 0o644 } else { 0o444 },
            links: 1,
            moved: self.control.moved(file),
            dated: None,
            // It says something else without being told to.
            valid: Duration::ZERO,
            // The name leads to another incarnation as soon as somebody writes.
            name_valid: Duration::ZERO,
        }
    }

    fn is_open_for_writing(&self, inode: Inode) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().any(|open| matches!(open, Open::Control(_, Some(other)) if *other == inode))
    }

    /// Some of what lies in a directory, itself and its parent included, without those that come
    /// first; nothing, when there is nothing left.
    pub(super) fn list(&self, inode: Inode, skip: usize) -> Result<Vec<Child>> {
        let directory = directory(inode)?;
        let dots = [(".", inode), ("..", Inode::ROOT)];
        let dots = dots.map(|(name, inode)| Child { inode, name: name.to_owned(), is_directory: true });
        let child = |(name, node): (String, Node)| Child {
            inode: self.inode(node),
            name,
            is_directory: matches!(node, Node::Directory(_)),
        };
        let always = directory.names().iter().filter(|(_, node)| self.is_there(*node));
        let always = always.map(|(name, node)| child(((*name).to_owned(), *node)));
        let always: Vec<Child> = dots.into_iter().chain(always).collect();
        let parts = match directory {
            Directory::Parts(folder) => {
                let skip = skip.saturating_sub(always.len());
                self.image.parts(folder, skip, ENTRIES).map_err(|e| data_error(&e))?
            }
            _ => Vec::new(),
        };
        let parts = parts.into_iter().map(|(name, part)| child((name, Node::Part(part))));
        Ok(always.into_iter().skip(skip).chain(parts).collect())
    }

    /// Opens a file, for writing too if `writer` is the thread that wants to; the handle is for the
    /// calls that follow.
    pub(super) fn open(&self, inode: Inode, writer: Option<u32>) -> Result<(u64, Pages)> {
        let node = inode.node().ok_or_else(no_such_file)?;
        // The kernel lets root open everything.
        let is_writable = match node {
            Node::Directory(_) => true,
            Node::Disk => self.writing != Writing::Refused,
            Node::Control(file) => file.is_writable(),
            Node::Part(_) => false,
        };
        if writer.is_some() && !is_writable {
            return Err(is_for_reading());
        }
        let (open, pages) = match node {
            Node::Directory(_) => return Err(Error::new(ErrorKind::IsDirectory, "a directory")),
            // The kernel does not know that what is written to the disk is in a partition too.
            Node::Part(Part::Partition(_)) if self.writing != Writing::Refused => {
                return Ok((0, Pages::None));
            }
            Node::Disk if writer.is_some() => {
                let opening = DiskOpening::new(writer.unwrap_or_default());
                (Open::Disk(Arc::new(opening)), Pages::KeptAndFlushed)
            }
            Node::Disk | Node::Part(Part::Snapshot(_) | Part::Partition(_)) => return Ok((0, Pages::Kept)),
            Node::Control(file) => {
                let opened = Arc::new(Mutex::new(Opened::new(file)));
                (Open::Control(opened, writer.map(|_| inode)), Pages::None)
            }
            Node::Part(part @ Part::Layer(_)) => {
                let moved = self.image.times().of_layers();
                let (flat, moved) = match self.past_layer(inode, part) {
                    Some(past) => past,
                    None if inode.incarnation() == self.image.number() => {
                        (self.image.part(part).map_err(|e| data_error(&e))?.for_ever(), moved)
                    }
                    None => return Err(no_such_file()),
                };
                (Open::Layer(inode, flat, moved), Pages::Kept)
            }
        };
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(handle, open);
        if let (Node::Control(file), Some(_), mine) = (node, writer, inode.incarnation()) {
            // Another one who opened the same has begun the next already.
            let next = mine.wrapping_add(1);
            let _ = self.incarnation(file).compare_exchange(mine, next, Ordering::AcqRel, Ordering::Acquire);
        }
        Ok((handle, pages))
    }

    pub(super) fn release(&self, handle: u64) {
        let closed = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        if let Some(Open::Control(..)) = closed {
            self.control.release(handle);
        }
    }

    /// Whether a file has something to read that was not read from this opening yet; see
    /// [`Control::poll`]. All but control files always have.
    pub(super) fn poll(&self, handle: u64, waker: Option<Waker>) -> bool {
        match self.opened_control(handle) {
            Err(_) => true,
            Ok(opened) => {
                let opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.poll(&opened, handle, waker)
            }
        }
    }

    /// Fills `buffer` from `offset` on; returns how much there was.
    pub(super) fn read(&self, inode: Inode, handle: u64, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if inode == Inode::DISK {
            return self.image.read(offset, buffer).map_err(|e| data_error(&e));
        }
        if let Some(Node::Part(part @ (Part::Snapshot(_) | Part::Partition(_)))) = inode.node() {
            let read = self.image.part(part).and_then(|view| view.read(offset, buffer));
            return read.map_err(|e| data_error(&e));
        }
        match self.opened(handle)? {
            Open::Layer(_, flat, _) => flat.read(offset, buffer).map_err(|e| data_error(&e)),
            Open::Disk(_) => Err(is_for_reading()),
            Open::Control(opened, _) => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.read(&mut opened, offset, buffer).inspect_err(|e| log::error!("{e}"))
            }
        }
    }

    /// Takes what was written to a file, and answers with how much of it was. A rebase that it starts
    /// answers when it ends; a write to the disk when the disk need not stand still any more.
    pub(super) fn write(
        &self,
        (inode, handle): (Inode, u64),
        offset: u64,
        bytes: &[u8],
        (writer, is_late): (Writer, bool),
        answer: impl FnOnce(Result<usize, i32>) + Send + 'static,
    ) {
        if inode == Inode::DISK {
            // Pages that the kernel writes late come by any opening.
            let opening = if is_late { None } else { self.opened_disk(handle) };
            return self.when_disk_moves(bytes, move |image, bytes| {
                let end = offset.saturating_add(bytes.len() as u64);
                let reached = opening.map_or(Ok(()), |opening| opening.reach(image, offset, end));
                let written = reached.and_then(|()| image.write(offset, bytes));
                answer(written.map_err(|e| write_error(e).errno()));
            });
        }
        let length = bytes.len();
        let answer = move |result: Result<(), i32>| answer(result.map(|()| length));
        match self.opened_control(handle) {
            Err(e) => answer(Err(e.errno())),
            Ok(opened) => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.write(&mut opened, bytes, writer, Box::new(answer));
            }
        }
    }

    /// Takes the closing of a file, of which there may be several for one opening.
    pub(super) fn flush(&self, handle: u64, writer: Writer, answer: Answer) {
        if let Some(opening) = self.opened_disk(handle) {
            return self.forget_zeroed(opening, answer);
        }
        match self.opened_control(handle) {
            // Nothing to do for other files.
            Err(_) => answer(Ok(())),
            Ok(opened) => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.flush(&mut opened, writer, answer);
            }
        }
    }

    /// The next data or hole; see [`Flat::seek`]. Control files are all data.
    pub(super) fn seek(&self, inode: Inode, handle: u64, offset: u64, goal: Seek) -> Result<Option<u64>> {
        let found = match inode.node() {
            Some(Node::Disk) => self.image.seek(offset, goal),
            Some(Node::Part(part @ (Part::Snapshot(_) | Part::Partition(_)))) => {
                self.image.part(part).and_then(|view| view.seek(offset, goal))
            }
            _ => match self.opened(handle)? {
                Open::Layer(_, flat, _) => flat.seek(offset, goal),
                Open::Control(..) | Open::Disk(_) => {
                    let size = self.attributes(inode)?.size;
                    return Ok((offset < size).then_some(if goal == Seek::Data { offset } else { size }));
                }
            },
        };
        found.map_err(|e| data_error(&e))
    }

    /// The opening of the disk for writing that has this handle.
    pub(super) fn opened_disk(&self, handle: u64) -> Option<Arc<DiskOpening>> {
        match self.opened(handle) {
            Ok(Open::Disk(opening)) => Some(opening),
            _ => None,
        }
    }

    fn opened(&self, handle: u64) -> Result<Open> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(&handle).cloned().ok_or_else(|| Error::invalid("no such handle"))
    }

    fn opened_control(&self, handle: u64) -> Result<Arc<Mutex<Opened>>> {
        match self.opened(handle)? {
            Open::Control(opened, _) => Ok(opened),
            Open::Layer(..) | Open::Disk(_) => Err(is_for_reading()),
        }
    }
}

fn directory(inode: Inode) -> Result<Directory> {
    match inode.node() {
        Some(Node::Directory(directory)) => Ok(directory),
        Some(_) => Err(Error::invalid("not a directory")),
        None => Err(no_such_file()),
    }
}

fn no_such_file() -> Error {
    Error::new(ErrorKind::NotFound, "no such file")
}

/// Whatever is the matter with the image: who reads a disk expects EIO. The words go to the log.
pub(super) fn data_error(error: &Error) -> Error {
    log::error!("{error}");
    Error::new(ErrorKind::Io, error.to_string())
}

#[cfg(test)]
mod tests;
