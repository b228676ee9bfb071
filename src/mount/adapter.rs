//! FUSE requests → calls of [`View`] → replies. Decodes and encodes, decides nothing.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use super::attributes::Attributes;
use super::control::{Waker, Writer};
use super::flat::Seek;
use super::settings::Settings;
use super::tree::Inode;
use super::view::{Child, Pages, View};
use super::writing::Space;
use crate::error::Error;
use crate::file::AlignedBuffer;
use crate::sys::{fallocate, whence};

/// The largest write that the kernel sends, and how far it may read ahead, in bytes: it has no more than 256
/// pages a request. How large a read is, the mount says; see [`options`](super::options).
const MAX_REQUEST: u32 = 1 << 20;

/// Requests that the kernel may have under way ahead of need: readahead and direct I/O.
const MAX_BACKGROUND: u16 = 64;

/// The block size that `stat` and `statfs` show, in bytes.
const BLOCK: u32 = 4096;

/// What a file is ready for that has something to read, as the kernel has it of files without poll.
const READY: PollEvents =
    PollEvents::POLLIN.union(PollEvents::POLLRDNORM).union(PollEvents::POLLOUT).union(PollEvents::POLLWRNORM);

/// A [`View`] as fuser wants it.
pub(super) struct Adapter(pub(super) View);

thread_local! {
    /// What the last read of this thread was answered from, used again for the next.
    static BUFFER: RefCell<AlignedBuffer> = RefCell::default();
}

fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

fn inode(number: INodeNo) -> Inode {
    Inode(number.0)
}

fn file_type(is_directory: bool) -> FileType {
    if is_directory { FileType::Directory } else { FileType::RegularFile }
}

impl Adapter {
    fn attr(&self, shown: &Attributes) -> FileAttr {
        let owner = self.0.ownership();
        let modified = shown.moved.time().unwrap_or(owner.modified);
        FileAttr {
            ino: INodeNo(shown.inode.0),
            size: shown.size,
            blocks: shown.blocks,
            atime: owner.modified,
            mtime: shown.dated.unwrap_or(modified),
            ctime: modified,
            crtime: owner.modified,
            kind: file_type(shown.is_directory),
            perm: shown.permissions,
            nlink: shown.links,
            uid: owner.user,
            gid: owner.group,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is a wish; what the kernel does not offer, it goes without.
        for wish in
            [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_EXPORT_SUPPORT]
        {
            let _ = config.add_capabilities(wish);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        if let Err(most) = config.set_max_readahead(MAX_REQUEST) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.lookup(inode(parent), name) {
            Ok(a) => reply.entry_with_ttls(&a.valid, &a.name_valid, &self.attr(&a), Generation(0)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.attributes(inode(ino)) {
            Ok(a) => reply.attr(&a.valid, &self.attr(&a)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        user: Option<u32>,
        group: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let time = |time| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => SystemTime::now(),
        };
        let settings = Settings {
            mode,
            user,
            group,
            size,
            modified: modified.map(time),
            sets_access_time: accessed.is_some(),
            handle: handle.map(|handle| handle.0),
            thread: request.pid(),
        };
        match self.0.set_attributes(inode(ino), &settings) {
            Ok(a) => reply.attr(&a.valid, &self.attr(&a)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writer = (flags.acc_mode() != OpenAccMode::O_RDONLY).then(|| request.pid());
        match self.0.open(inode(ino), writer) {
            Ok((handle, pages)) => reply.opened(FileHandle(handle), open_flags(pages)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let buffer = buffer.of_length(size as usize);
            match self.0.read(inode(ino), handle.0, offset, buffer) {
                Ok(length) => reply.data(&buffer[..length]),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        _: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let answer = move |result: Result<usize, i32>| match result {
            Ok(length) => reply.written(length as u32),
            Err(code) => reply.error(Errno::from_i32(code)),
        };
        let writer = Writer { thread: request.pid(), files: owner.map(|owner| owner.0) };
        let is_late = flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        self.0.write((inode(ino), handle.0), offset, data, (writer, is_late), answer);
    }

    fn flush(&self, request: &Request, _: INodeNo, handle: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let answer = move |result: Result<(), i32>| match result {
            Ok(()) => reply.ok(),
            Err(code) => reply.error(Errno::from_i32(code)),
        };
        let writer = Writer { thread: request.pid(), files: Some(owner.0) };
        self.0.flush(handle.0, writer, Box::new(answer));
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.release(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.0.sync(inode(ino)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let space = match mode & !fallocate::KEEP_SIZE {
            fallocate::PUNCH_HOLE => Space::GivenBack,
            fallocate::ZERO_RANGE => Space::Kept,
            // `posix_fallocate` writes instead.
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let answer = move |result: Result<(), i32>| match result {
            Ok(()) => reply.ok(),
            Err(code) => reply.error(Errno::from_i32(code)),
        };
        self.0.zero(inode(ino), (offset, length), space, Box::new(answer));
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let children = match self.0.list(inode(ino), offset as usize) {
            Ok(children) => children,
            Err(e) => return reply.error(errno(&e)),
        };
        for (next, Child { inode, name, is_directory }) in (offset + 1..).zip(children) {
            if reply.add(INodeNo(inode.0), next, file_type(is_directory), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = |bytes: u64| bytes.div_ceil(u64::from(BLOCK));
        let all = blocks(self.0.disk_size());
        let free = all.saturating_sub(blocks(self.0.allocated_bytes()));
        reply.statfs(all, free, free, 0, 0, BLOCK, 255, BLOCK);
    }

    fn lseek(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: i64, how: i32, reply: ReplyLseek) {
        let goal = match how {
            whence::SEEK_DATA => Seek::Data,
            whence::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        match self.0.seek(inode(ino), handle.0, u64::try_from(offset).unwrap_or(u64::MAX), goal) {
            Ok(Some(found)) => reply.offset(found.cast_signed()),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        notifier: PollNotifier,
        events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let wake = move || {
            if let Err(e) = notifier.notify() {
                log::debug!("the kernel does not know who waits: {e}");
            }
        };
        let waits = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY);
        let waker: Option<Waker> = if waits { Some(Box::new(wake)) } else { None };
        // The kernel asks for errors and hang-ups, too, and takes what it gets for the truth.
        reply.poll(if self.0.poll(handle.0, waker) { events & READY } else { PollEvents::empty() });
    }

    // What follows does not exist here. fuser would write a warning for each.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EPERM);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }
}

fn open_flags(pages: Pages) -> FopenFlags {
    match pages {
        Pages::KeptAndFlushed => FopenFlags::FOPEN_KEEP_CACHE,
        Pages::Kept => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        Pages::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
    }
}
