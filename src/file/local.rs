//! A regular file or block device of this machine.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::direct::Direct;
use super::{Access, CacheMode, Directory, HostFile, HostOffset, Identity, Lock, Place, Run, Stamp, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, fiemap};

/// A regular file or block device of this machine, opened once.
#[derive(Debug)]
pub struct LocalFile {
    path: PathBuf,
    file: File,
    directory: Option<Arc<Directory>>,
    access: Access,
    identity: Identity,
    /// Bytes. Kept here, so that a read can tell "beyond the end" from "was cut short".
    size: AtomicU64,
    lock: Mutex<Lock>,
    cache: CacheMode,
    direct: Direct,
    /// Whether the file system tells of shared extents; asked for once.
    tells_shared_extents: OnceLock<bool>,
}

impl LocalFile {
    /// Opens `path`. Anything but a regular file or a block device is refused, without blocking
    /// on it.
    ///
    /// # Errors
    /// There is no such file, it is of another kind, or the operating system does not let us.
    pub fn open(path: &Path, access: Access, cache: CacheMode) -> Result<Self> {
        let named = Directory::of(path, None);
        let (directory, name) = named.map_err(|e| Error::io(e, "cannot open").path(path))?;
        Self::open_in(&directory, name, path, access, cache)
    }

    /// The same for a file that has this name in a directory. Errors call it `path`.
    pub(crate) fn open_in(
        directory: &Directory,
        name: &Path,
        path: &Path,
        access: Access,
        cache: CacheMode,
    ) -> Result<Self> {
        // Looked at first: merely opening a FIFO or a tape can have an effect.
        let place = directory.open(name, sys::O_PATH);
        let place = place.map_err(|e| Error::io(e, "cannot open").path(path))?;
        let metadata = place.metadata().map_err(|e| Error::io(e, "cannot open").path(path))?;
        refuse_other_types(&metadata).map_err(|e| e.path(path))?;
        let mode = if access == Access::ReadWrite { sys::O_RDWR } else { sys::O_RDONLY };
        let flags = mode | cache.open_flags();
        let file = directory.open(name, flags | sys::OPEN_IMAGE);
        let file = file.or_else(|e| when_lease_is_given_back(e, flags, || Ok(place)));
        let file = file.map_err(|e| Error::io(e, cannot_open(access)).path(path))?;
        Self::from_file(file, path.to_owned(), access, cache)
    }

    /// Keeps the directory open that it was found in.
    pub(crate) fn keep(&mut self, directory: Arc<Directory>) {
        self.directory = Some(directory);
    }

    /// Creates `path`, or empties it if it exists and no other process uses it. A block device
    /// stays as it is.
    ///
    /// # Errors
    /// Another process uses the file, or the operating system does not let us.
    pub fn create(path: &Path) -> Result<Self> {
        let file = Self::claim(path)?;
        file.empty()?;
        Ok(file)
    }

    /// Creates `path`, or opens it as it is, if no other process uses it.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub(crate) fn claim(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            // Not before it is known that nobody uses it.
            .truncate(false)
            .custom_flags(sys::OPEN_IMAGE)
            .open(path);
        let place = || OpenOptions::new().read(true).custom_flags(sys::O_PATH).open(path);
        let file = file.or_else(|e| when_lease_is_given_back(e, sys::O_RDWR, place));
        let file = file.map_err(|e| Error::io(e, "cannot create").path(path))?;
        let file = Self::from_file(file, path.to_owned(), Access::ReadWrite, CacheMode::default())?;
        file.lock(Lock::Write)?;
        Ok(file)
    }

    /// Takes all that is in a regular file away.
    pub(crate) fn empty(&self) -> Result<()> {
        if self.identity.is_block_device() { Ok(()) } else { self.set_size(0) }
    }

    fn from_file(file: File, path: PathBuf, access: Access, cache: CacheMode) -> Result<Self> {
        let describe = |e| Error::io(e, "cannot tell its size").path(&path);
        let metadata = file.metadata().map_err(describe)?;
        // Again, on what was really opened: the name may lead elsewhere by now.
        refuse_other_types(&metadata).map_err(|e| e.path(&path))?;
        let size = size_of(&file, &metadata).map_err(describe)?;
        let identity = Identity::of_metadata(&metadata);
        // The kernel opens a device for writing that refuses every write.
        if access == Access::ReadWrite
            && identity.is_block_device()
            && sys::is_read_only_device(&file).map_err(describe)?
        {
            return Err(Error::new(ErrorKind::ReadOnly, "the block device is read-only").path(&path));
        }
        Ok(Self {
            path,
            file,
            directory: None,
            access,
            identity,
            size: AtomicU64::new(size),
            lock: Mutex::new(Lock::None),
            cache,
            direct: Direct::default(),
            tells_shared_extents: OnceLock::new(),
        })
    }

    /// Asks the file system to write in place what it would copy otherwise (`chattr +C`), while the file is
    /// empty. One that cannot do so copies nothing, or copies on, as with QEMU.
    pub(crate) fn stop_copies(&self) {
        if let Err(e) = sys::stop_copies(&self.file) {
            log::debug!("{}: cannot be written in place: {e}", self.path.display());
        }
    }

    fn tells_shared_extents(&self) -> bool {
        *self.tells_shared_extents.get_or_init(|| sys::tells_shared_extents(&self.file).unwrap_or(false))
    }

    fn failed(&self, error: io::Error, what: &str, at: u64) -> Error {
        Error::io(error, what).path(&self.path).offset(at)
    }

    fn read_some(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        match self.cache.is_direct() {
            true => self.direct.read_at(&self.file, buffer, at),
            false => self.file.read_at(buffer, at),
        }
    }

    /// Where no data follows, that must not be because the file has lost what it had there.
    fn refuse_if_cut_short(&self) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        match metadata.is_file() && metadata.len() < self.size() {
            false => Ok(()),
            true => Err(io::Error::other("the file was cut short while it was in use")),
        }
    }

    fn hole_aware_run(&self, at: u64, end: u64) -> io::Result<Run> {
        let Some(data) = sys::seek_data(&self.file, at)? else {
            self.refuse_if_cut_short()?;
            return Ok(Run { is_data: false, length: end - at });
        };
        if data > at {
            return Ok(Run { is_data: false, length: data.min(end) - at });
        }
        let hole = sys::seek_hole(&self.file, at)?.unwrap_or(end);
        // A file that changes between the two calls may answer nonsense; never an empty run.
        Ok(Run { is_data: true, length: hole.clamp(at + 1, end) - at })
    }
}

impl Identity {
    /// The identity of the file that `path` leads to now.
    ///
    /// # Errors
    /// There is none, or it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::of_metadata(&metadata))
    }

    pub(super) fn of_metadata(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self { device: 0, inode: metadata.rdev() }
        } else {
            Self { device: metadata.dev(), inode: metadata.ino() }
        }
    }
}

fn size_of(mut file: &File, metadata: &Metadata) -> io::Result<u64> {
    match metadata.file_type().is_block_device() {
        true => file.seek(SeekFrom::End(0)),
        false => Ok(metadata.len()),
    }
}

/// What is to be done when a file could not be opened because of this error, without blocking on a FIFO.
/// Where another process has a lease on a regular file, opens it once more, and waits as open(2) does
/// until the lease is given back, or the kernel takes it (`/proc/sys/fs/lease-break-time`). `place`
/// finds the file: what its name leads to may be a FIFO by now.
fn when_lease_is_given_back(
    error: io::Error,
    flags: i32,
    place: impl FnOnce() -> io::Result<File>,
) -> io::Result<File> {
    if error.raw_os_error() != Some(sys::errno::EAGAIN) {
        return Err(error);
    }
    let place = place()?;
    if !place.metadata()?.is_file() {
        return Err(error);
    }
    log::info!("waiting for another process to give its lease on a file back");
    let itself = format!("/proc/self/fd/{}", place.as_raw_fd());
    sys::open_at(None, Path::new(&itself), flags | sys::OPEN_IMAGE_WAITING)
}

fn cannot_open(access: Access) -> &'static str {
    match access {
        Access::ReadOnly => "cannot open for reading",
        Access::ReadWrite => "cannot open for writing",
    }
}

fn refuse_other_types(metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else if kind.is_dir() {
        Err(Error::new(ErrorKind::IsDirectory, "is a directory, not a disk image"))
    } else {
        let what = "is neither a regular file nor a block device";
        Err(Error::new(ErrorKind::NotAFile, what))
    }
}

/// Gives the locks back explicitly. They belong to the open file description, and a process that
/// another thread is starting at this moment has a copy of the descriptor until it executes its
/// program: closing ours would leave the image locked for as long.
impl Drop for LocalFile {
    fn drop(&mut self) {
        let held = *self.lock.get_mut().unwrap_or_else(PoisonError::into_inner);
        if held != Lock::None {
            // A file that cannot be unlocked is unlocked by being closed.
            let _ = lock::apply(&self.file, held, Lock::None);
        }
    }
}

impl HostFile for LocalFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn directory(&self) -> Option<&Arc<Directory>> {
        self.directory.as_ref()
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn access(&self) -> Access {
        self.access
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn take_size_anew(&self) -> Result<()> {
        let size = self.file.metadata().and_then(|metadata| size_of(&self.file, &metadata));
        self.size.store(size.map_err(|e| self.failed(e, "cannot tell its size", 0))?, Ordering::Release);
        Ok(())
    }

    fn stamp(&self) -> Result<Stamp> {
        let metadata = self.file.metadata().map_err(|e| self.failed(e, "cannot stat", 0))?;
        // A block device says 0, and keeps the size that it had when it was opened.
        let size = if metadata.is_file() { metadata.len() } else { self.size() };
        Ok(Stamp::of(&metadata, size, self.identity.inode))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        metadata.map(|m| m.blocks() * 512).map_err(|e| self.failed(e, "cannot stat", 0))
    }

    fn read_at(&self, at: HostOffset, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let here = at.0 + done as u64;
            match self.read_some(&mut buffer[done..], here) {
                Ok(0) if here >= self.size() => {
                    buffer[done..].fill(0);
                    return Ok(());
                }
                Ok(0) => {
                    let what = "the file was cut short while it was in use: cannot read";
                    return Err(Error::new(ErrorKind::Io, what).path(&self.path).offset(here));
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e, "cannot read", here)),
            }
        }
        Ok(())
    }

    fn write_at(&self, at: HostOffset, buffer: &[u8]) -> Result<()> {
        let written = match self.cache.is_direct() {
            true => self.direct.write_all_at(&self.file, buffer, at.0),
            false => self.file.write_all_at(buffer, at.0),
        };
        written.map_err(|e| self.failed(e, "cannot write", at.0))?;
        self.size.fetch_max(at.0 + buffer.len() as u64, Ordering::AcqRel);
        Ok(())
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.file.set_len(size).map_err(|e| self.failed(e, "cannot set the size", size))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn allocate(&self, at: HostOffset, length: u64) -> Result<()> {
        let allocated = sys::allocate(&self.file, at.0, length);
        allocated.map_err(|e| self.failed(e, "cannot allocate space", at.0))
    }

    fn punch(&self, at: HostOffset, length: u64) -> Result<()> {
        let failed = |e| self.failed(e, "cannot free the blocks", at.0);
        let (mut start, mut end) = (at.0, at.0 + length);
        if self.identity.is_block_device() {
            let sector = sys::sector_size(&self.file).map_err(failed)?.max(1);
            (start, end) = (start.next_multiple_of(sector), end / sector * sector);
        }
        match start < end {
            true => sys::punch_hole(&self.file, start, end - start).map_err(failed),
            false => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        if !self.cache.syncs() {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| Error::io(e, "cannot sync").path(&self.path))
    }

    fn start_sync(&self) {
        if self.cache.syncs() {
            // A wish, no more; the sync itself says what is wrong.
            let _ = sys::start_writing_back(&self.file);
        }
    }

    fn write_back(&self, at: HostOffset, length: u64) {
        if !self.identity.is_block_device() {
            // Best effort: a page that cannot be written is one that somebody else is told of.
            let _ = sys::write_back(&self.file, at.0, length);
        }
    }

    fn drop_cache(&self) -> Result<()> {
        sys::drop_cache(&self.file).map_err(|e| Error::io(e, "cannot drop what is cached").path(&self.path))
    }

    fn run_at(&self, at: HostOffset, length: u64) -> Result<Run> {
        let size = self.size();
        if at.0 >= size {
            return Ok(Run { is_data: false, length });
        }
        let end = at.0.saturating_add(length).min(size);
        match self.hole_aware_run(at.0, end) {
            Ok(run) => Ok(run),
            // A block device, or a file system that does not know: everything may be data.
            Err(e) if e.raw_os_error() == Some(sys::errno::EINVAL) => {
                Ok(Run { is_data: true, length: end - at.0 })
            }
            Err(e) => Err(self.failed(e, "cannot look for holes", at.0)),
        }
    }

    fn share(&self, at: HostOffset, from: &dyn HostFile, from_at: HostOffset, length: u64) -> bool {
        let Some(source) = from.descriptor().filter(|_| self.tells_shared_extents()) else { return false };
        // Whatever the reason why not: who writes instead meets it, or does not.
        let shared = sys::share_extent(&self.file, at.0, source, from_at.0, length).is_ok();
        if shared {
            self.size.fetch_max(at.0 + length, Ordering::AcqRel);
        }
        shared
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn shared_place_at(&self, at: HostOffset, length: u64) -> Result<(Option<Place>, u64)> {
        if !self.tells_shared_extents() {
            return Ok((None, length));
        }
        // It need not be known: what is not known to be equal is read.
        let extent = sys::physical_extent(&self.file, at.0, length).unwrap_or_default();
        let Some(extent) = extent.filter(|extent| extent.length > 0) else { return Ok((None, length)) };
        if extent.logical > at.0 {
            return Ok((None, length.min(extent.logical - at.0)));
        }
        let skip = at.0 - extent.logical;
        let rest = length.min(extent.length.saturating_sub(skip)).max(1);
        // Whatever else is said of it (compressed, inline, not written back …) makes it no place.
        let is_plain = extent.flags & !(fiemap::LAST | fiemap::MERGED) == fiemap::SHARED;
        let place = Place { device: self.identity.device, offset: extent.physical + skip };
        Ok(((is_plain && skip < extent.length).then_some(place), rest))
    }

    fn lock(&self, lock: Lock) -> Result<()> {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock::apply(&self.file, *held, lock).map_err(|e| e.path(&self.path))?;
        *held = lock;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(content: &[u8]) -> (tempfile::TempDir, LocalFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, content).unwrap();
        let file = LocalFile::open(&path, Access::ReadWrite, CacheMode::default()).unwrap();
        (dir, file)
    }

    #[test]
    fn reading_beyond_the_end_gives_zeros_but_a_truncated_file_is_an_error() {
        let (_dir, file) = temporary(b"abc");
        let mut buffer = [9; 5];
        file.read_at(HostOffset(1), &mut buffer).unwrap();
        assert_eq!(buffer, *b"bc\0\0\0");
        File::create(file.path()).unwrap();
        let error = file.read_at(HostOffset(1), &mut buffer).unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
        // Nor is what it has lost a hole.
        let error = file.run_at(HostOffset(1), 2).unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
    }

    #[test]
    fn holes_are_found() {
        let (_dir, file) = temporary(b"");
        file.set_size(1 << 20).unwrap();
        file.write_at(HostOffset(512 << 10), &[1; 4096]).unwrap();
        let run = file.run_at(HostOffset(0), 1 << 20).unwrap();
        assert_eq!(run, Run { is_data: false, length: 512 << 10 });
        assert!(file.run_at(HostOffset(512 << 10), 1 << 20).unwrap().is_data);
        let beyond = file.run_at(HostOffset(2 << 20), 77).unwrap();
        assert_eq!(beyond, Run { is_data: false, length: 77 });
    }

    #[test]
    fn a_directory_or_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = LocalFile::open(dir.path(), Access::ReadOnly, CacheMode::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::IsDirectory);
        let error =
            LocalFile::open(Path::new("/dev/null"), Access::ReadOnly, CacheMode::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAFile);
    }
}
