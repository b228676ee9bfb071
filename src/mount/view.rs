//! The mounted view without FUSE: what each file operation does, in terms of [`Tree`], [`Image`]
//! and [`Control`]. Owns the table of open control files. All that the adapter does is to call
//! this.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::control::{Answer, Control, Opened, Writer};
use super::image::{Allocated, Image, Seek};
use super::tree::{ControlFile, Inode, Node, Tree};
use crate::error::{Error, ErrorKind, Result};

/// How long the kernel may go on believing what does not change, or of which it will be told.
const FOREVER: Duration = Duration::from_secs(24 * 3600);

/// The size shown for control files that can be written. The kernel lets several processes write
/// at the same time only below the end of a file, and a second writer shall not queue up, but be
/// told that the first is at work. `sysfs` shows this size too.
const PAGE: u64 = 4096;

/// What does not change of the files in the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ownership {
    pub(super) user: u32,
    pub(super) group: u32,
    /// When the image was last modified: a rebase changes nothing that can be seen in it.
    pub(super) modified: SystemTime,
}

/// What `stat` shows of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) inode: Inode,
    pub(super) is_directory: bool,
    pub(super) size: u64,
    /// In units of 512 bytes.
    pub(super) blocks: u64,
    pub(super) permissions: u16,
    pub(super) links: u32,
    /// How long the attributes hold.
    pub(super) valid: Duration,
    /// How long the name leads to this inode.
    pub(super) name_valid: Duration,
}

/// What the kernel may do with the pages of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Keep them from one opening to the next.
    Kept,
    /// Have none: each read and write comes to us.
    None,
}

/// A directory entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child<'a> {
    pub(super) inode: Inode,
    pub(super) name: &'a OsStr,
    pub(super) is_directory: bool,
}

/// The mounted view.
pub(super) struct View {
    tree: Tree,
    image: Arc<Image>,
    control: Arc<Control>,
    ownership: Ownership,
    /// The open control files by handle. The disk needs no handle and has 0.
    open: Mutex<HashMap<u64, Arc<Mutex<Opened>>>>,
    next_handle: AtomicU64,
}

impl View {
    pub(super) fn new(image: Arc<Image>, control: Arc<Control>, ownership: Ownership) -> Self {
        let (open, next_handle) = (Mutex::default(), AtomicU64::new(1));
        Self { tree: Tree::new(), image, control, ownership, open, next_handle }
    }

    pub(super) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// Virtual size of the disk in bytes.
    pub(super) fn disk_size(&self) -> u64 {
        self.image.size()
    }

    pub(super) fn lookup(&self, parent: Inode, name: &OsStr) -> Result<Attributes> {
        let child = self.tree.child(parent, name, self.control.incarnation());
        self.attributes(child.ok_or_else(no_such_file)?)
    }

    pub(super) fn attributes(&self, inode: Inode) -> Result<Attributes> {
        let node = self.tree.node(inode).ok_or_else(no_such_file)?;
        Ok(match node {
            Node::Directory => self.attributes_of_directory(inode),
            Node::Disk => self.attributes_of_disk(inode),
            Node::Control(file) => self.attributes_of_control(inode, file),
        })
    }

    fn attributes_of_directory(&self, inode: Inode) -> Attributes {
        Attributes {
            inode,
            is_directory: true,
            size: 0,
            blocks: 0,
            permissions: 0o555,
            links: 2 + self.tree.subdirectories(inode),
            valid: FOREVER,
            name_valid: FOREVER,
        }
    }

    fn attributes_of_disk(&self, inode: Inode) -> Attributes {
        let (bytes, valid) = match self.image.allocated() {
            Allocated::Exactly(bytes) => (bytes, FOREVER),
            Allocated::AtMost(bytes) => (bytes, Duration::ZERO),
        };
        Attributes {
            inode,
            is_directory: false,
            size: self.image.size(),
            blocks: bytes.div_ceil(512),
            permissions: 0o444,
            links: 1,
            valid,
            name_valid: FOREVER,
        }
    }

    fn attributes_of_control(&self, inode: Inode, file: ControlFile) -> Attributes {
        let readable = if file.is_readable() { 0o444 } else { 0 };
        // A dry run needs no image that can be written.
        let is_writable = file.is_writable() && (self.control.is_writable() || file == ControlFile::Rebase);
        let (size, valid) = match file {
            // `cat` into a file lets the kernel copy, and that copies no more than the size.
            ControlFile::Rebase => (self.control.rehearsed_bytes().max(PAGE), Duration::ZERO),
            _ if file.is_writable() => (PAGE, FOREVER),
            _ => (0, FOREVER),
        };
        Attributes {
            inode,
            is_directory: false,
            size,
            blocks: size.div_ceil(512),
            permissions: readable | if is_writable { 0o200 } else { 0 },
            links: 1,
            valid,
            // The name leads to another incarnation as soon as a job runs.
            name_valid: Duration::ZERO,
        }
    }

    /// What lies in a directory: itself, its parent, its children.
    pub(super) fn list(&self, inode: Inode) -> Result<Vec<Child<'_>>> {
        match self.tree.node(inode) {
            Some(Node::Directory) => {}
            Some(_) => return Err(Error::invalid("not a directory")),
            None => return Err(no_such_file()),
        }
        let dots = [(inode, OsStr::new(".")), (self.tree.parent(inode), OsStr::new(".."))];
        let all = dots.into_iter().chain(self.tree.children(inode));
        let child = |(inode, name)| {
            let is_directory = self.tree.node(inode) == Some(Node::Directory);
            Child { inode, name, is_directory }
        };
        Ok(all.map(child).collect())
    }

    /// Opens a file; the handle is for the calls that follow.
    pub(super) fn open(&self, inode: Inode) -> Result<(u64, Pages)> {
        match self.tree.node(inode) {
            None => Err(no_such_file()),
            Some(Node::Directory) => Err(Error::new(ErrorKind::IsDirectory, "a directory")),
            Some(Node::Disk) => Ok((0, Pages::Kept)),
            Some(Node::Control(file)) => {
                let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
                let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.insert(handle, Arc::new(Mutex::new(Opened::new(file))));
                Ok((handle, Pages::None))
            }
        }
    }

    pub(super) fn release(&self, handle: u64) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    }

    /// Fills `buffer` from `offset` on; returns how much there was.
    pub(super) fn read(&self, inode: Inode, handle: u64, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if self.tree.node(inode) == Some(Node::Disk) {
            return self.image.read(offset, buffer).map_err(|e| data_error(&e));
        }
        let opened = self.opened(handle)?;
        let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.control.read(&mut opened, offset, buffer))
    }

    /// Takes what was written to a control file. A rebase that it starts answers when it ends.
    pub(super) fn write(&self, handle: u64, bytes: &[u8], writer: Writer, answer: Answer) {
        match self.opened(handle) {
            Err(e) => answer(Err(e.errno())),
            Ok(opened) => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.write(&mut opened, bytes, writer, answer);
            }
        }
    }

    /// Takes the closing of a file, of which there may be several for one opening.
    pub(super) fn flush(&self, handle: u64, writer: Writer, answer: Answer) {
        match self.opened(handle) {
            // Nothing to do for the disk.
            Err(_) => answer(Ok(())),
            Ok(opened) => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                self.control.flush(&mut opened, writer, answer);
            }
        }
    }

    /// Cuts a control file to nothing, which shells do before they write to it and which means
    /// nothing here.
    pub(super) fn truncate(&self, inode: Inode) -> Result<Attributes> {
        match self.tree.node(inode) {
            Some(Node::Control(file)) if file.is_writable() => self.attributes(inode),
            _ => Err(Error::new(ErrorKind::PermissionDenied, "this file is for reading")),
        }
    }

    /// The next data or hole; see [`Image::seek`]. Control files are all data.
    pub(super) fn seek(&self, inode: Inode, offset: u64, goal: Seek) -> Result<Option<u64>> {
        match self.tree.node(inode) {
            Some(Node::Disk) => self.image.seek(offset, goal).map_err(|e| data_error(&e)),
            _ => {
                let size = self.attributes(inode)?.size;
                Ok((offset < size).then_some(if goal == Seek::Data { offset } else { size }))
            }
        }
    }

    fn opened(&self, handle: u64) -> Result<Arc<Mutex<Opened>>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(&handle).cloned().ok_or_else(|| Error::invalid("no such handle"))
    }
}

fn no_such_file() -> Error {
    Error::new(ErrorKind::NotFound, "no such file")
}

/// Whatever is the matter with the image: who reads a disk expects EIO. The words go to the log.
fn data_error(error: &Error) -> Error {
    log::error!("{error}");
    Error::new(ErrorKind::Io, error.to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    const NOBODY: Writer = Writer { thread: 0, files: None };

    /// The view of a raw disk of 1 MiB, which no engine can rebase.
    fn view(dir: &Path) -> View {
        let path = dir.join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let chain = Opener::new().chain(&path, None, Access::ReadWrite).unwrap();
        let image = Arc::new(Image::new(chain));
        let control = Arc::new(Control::new(image.clone(), None));
        control.start(Opener::new(), |_| {});
        View::new(image, control, Ownership { user: 1, group: 2, modified: SystemTime::UNIX_EPOCH })
    }

    fn find(view: &View, path: &[&str]) -> Attributes {
        let root = view.attributes(Inode::ROOT).unwrap();
        path.iter().fold(root, |parent, name| view.lookup(parent.inode, name.as_ref()).unwrap())
    }

    /// Opens a control file, writes to it, closes it; returns the answers to both.
    fn write(view: &View, file: &str, bytes: &[u8]) -> [Result<(), i32>; 2] {
        let (handle, pages) = view.open(find(view, &["ctl", file]).inode).unwrap();
        assert_eq!(pages, Pages::None);
        let (sender, answers) = channel();
        let closed = sender.clone();
        view.write(handle, bytes, NOBODY, Box::new(move |answer| sender.send(answer).unwrap()));
        let written = answers.recv().unwrap();
        view.flush(handle, NOBODY, Box::new(move |answer| closed.send(answer).unwrap()));
        view.release(handle);
        [written, answers.recv().unwrap()]
    }

    fn text(view: &View, file: &str) -> String {
        let inode = find(view, &["ctl", file]).inode;
        let (handle, _) = view.open(inode).unwrap();
        let mut buffer = [0; 4096];
        let length = view.read(inode, handle, 0, &mut buffer).unwrap();
        assert_eq!(view.read(inode, handle, length as u64, &mut buffer[length..]).unwrap(), 0);
        view.release(handle);
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn the_disk_is_a_file_that_keeps_its_pages() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(dir.path());
        let disk = find(&view, &["disk.raw"]);
        assert_eq!((disk.size, disk.blocks, disk.permissions), (1 << 20, 2048, 0o444));
        assert_eq!(view.open(disk.inode).unwrap(), (0, Pages::Kept));
        let mut buffer = [0; 4];
        assert_eq!(view.read(disk.inode, 0, (1 << 20) - 2, &mut buffer).unwrap(), 2);
        assert_eq!(buffer, [7, 7, 0, 0]);
    }

    #[test]
    fn the_answer_to_a_write_is_what_came_of_the_job() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(dir.path());
        let unsupported = Err(ErrorKind::Unsupported.errno());
        assert_eq!(write(&view, "backing", b"other\n"), [unsupported, Ok(())]);
        assert_eq!(write(&view, "backing", b"other"), [Ok(()), unsupported]);
        assert_eq!(write(&view, "cancel", b"\n"), [Ok(()), Ok(())]);
        let denied = Err(ErrorKind::PermissionDenied.errno());
        assert_eq!(write(&view, "status", b"\n"), [denied, Ok(())]);
        let status = text(&view, "status");
        assert!(
            status.starts_with("state: failed\nbacking:\nrequest: rebase onto 'other'\nerror: "),
            "{status}"
        );
    }

    #[test]
    fn each_job_gives_control_files_another_inode() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(dir.path());
        let before = find(&view, &["ctl", "backing"]);
        let _ = write(&view, "backing", b"other\n");
        let after = find(&view, &["ctl", "backing"]);
        assert_ne!(before.inode, after.inode);
        assert_eq!((before.name_valid, after.size), (Duration::ZERO, PAGE));
        // Who holds the old one can go on with it.
        assert_eq!(view.attributes(before.inode).unwrap(), before);
        assert_eq!(view.truncate(before.inode).unwrap(), before);
    }

    #[test]
    fn what_does_not_exist_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(dir.path());
        let errno = |error: Error| error.errno();
        assert_eq!(view.lookup(Inode::ROOT, "x".as_ref()).map_err(errno).unwrap_err(), 2);
        assert!(view.attributes(Inode(99)).is_err() && view.list(Inode::DISK).is_err());
        assert!(view.open(Inode::ROOT).is_err() && view.truncate(Inode::DISK).is_err());
        assert!(view.read(find(&view, &["ctl", "status"]).inode, 77, 0, &mut [0]).is_err());
        assert_eq!(view.list(Inode::ROOT).unwrap().len(), 4);
    }

    #[test]
    fn a_closed_mount_takes_no_commands() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(dir.path());
        view.control.close();
        assert_eq!(write(&view, "backing", b"other\n")[0], Err(ErrorKind::Busy.errno()));
        assert!(text(&view, "status").contains("refused: the mount is being taken down"));
    }
}
