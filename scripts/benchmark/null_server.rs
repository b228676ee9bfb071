//! The floor: a FUSE server that does nothing. It answers every read of `disk.raw` with the same
//! bytes from memory, with as many threads and the same settings as rebasefs.
//!
//! `null_server MOUNTPOINT BYTES` serves until `umount`.

use std::ffi::OsStr;
use std::io;
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};

const FILE: INodeNo = INodeNo(2);
const FOREVER: Duration = Duration::from_secs(3600);
const MAX_REQUEST: u32 = 1 << 20;
const MAX_READ: u32 = 256 << 10;

struct Null {
    size: u64,
    answer: Vec<u8>,
}

impl Null {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, perm, size) = match inode {
            FILE => (FileType::RegularFile, 0o444, self.size),
            _ => (FileType::Directory, 0o555, 0),
        };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Null {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_readahead(MAX_REQUEST);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk.raw") => reply.entry(&FOREVER, &self.attributes(FILE), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = self.size.saturating_sub(offset).min(u64::from(size));
        reply.data(&self.answer[..length as usize]);
    }
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(mountpoint), Some(size)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other("usage: null_server MOUNTPOINT BYTES"));
    };
    let size = size.parse().map_err(io::Error::other)?;
    let mut config = Config::default();
    config.mount_options.push(MountOption::CUSTOM(format!("max_read={MAX_READ}")));
    config.n_threads = Some(std::thread::available_parallelism()?.get());
    config.clone_fd = true;
    fuser::mount(Null { size, answer: vec![0x5a; MAX_REQUEST as usize] }, mountpoint, &config)
}
