//! The mounted view: one flat raw file with the guest-visible bytes, and control files to look
//! into the chain and to change it.
//!
//! [`mount()`] mounts an image, [`Mount`] does so in other ways; [`Mounted::serve`] lives with it,
//! [`unmount()`] takes it down from another process. `adapter` is all that knows FUSE requests;
//! `view` is the file system without them, made of `tree` (inodes and names), `image` (the chain of the
//! moment, as flat files: `flat`; its layers, snapshots and partitions: `parts`; what a guest writes:
//! `writing`) and `control` (commands and jobs).

mod adapter;
mod attributes;
mod control;
mod flat;
mod holders;
mod image;
mod options;
mod parting;
mod partitions;
mod parts;
mod point;
mod session;
mod settings;
mod snapshots;
mod times;
mod tree;
mod unmount;
mod view;
mod writing;

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::SystemTime;

use crate::chain::{Chain, Opener};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::output::refuse_in_play;
use crate::file::{Access, Identity};
use crate::layer::Format;
use crate::sys;
use control::Control;
#[doc(hidden)]
pub use control::in_words;
use image::Image;
pub use options::MountOptions;
pub use unmount::{Manner, unmount};
use view::{Ownership, View};
pub use writing::Writing;

/// Mounts the guest-visible bytes of `image`, as `mountpoint/disk.raw`, with control files in
/// `mountpoint/ctl`. Nothing can be written to the disk; [`Mount`] is for those who want more.
///
/// ```no_run
/// # fn main() -> rebasefs::Result<()> {
/// let mounted = rebasefs::mount("cow.qcow2", "mnt")?;
/// // It can be used: mnt/disk.raw is the disk, and whoever writes to mnt/ctl/backing rebases.
/// println!("until `rebasefs umount mnt`, `umount mnt`, or Ctrl-C");
/// mounted.serve()
/// # }
/// ```
///
/// # Errors
/// As [`Mount::start`].
pub fn mount(image: impl Into<PathBuf>, mountpoint: impl Into<PathBuf>) -> Result<Mounted> {
    Mount::new(image, mountpoint).start()
}

/// What to mount, where, and how.
///
/// ```no_run
/// use rebasefs::Mount;
/// use rebasefs::layer::Format;
/// use rebasefs::mount::Writing;
///
/// # fn main() -> rebasefs::Result<()> {
/// let mount = Mount::new("cow.qcow2", "mnt").format(Format::Qcow2).threads(4);
/// let mount = mount.writing(Writing::Bytes).options("allow_other,nodev".parse()?);
/// mount.start()?.serve()
/// # }
/// ```
#[derive(Debug)]
#[must_use = "it does nothing before `start`"]
pub struct Mount {
    image: PathBuf,
    format: Option<Format>,
    mountpoint: PathBuf,
    opener: Opener,
    options: MountOptions,
    threads: usize,
    writing: Writing,
    log: Option<PathBuf>,
}

/// A mount that stands, and can be used from now on. [`serve`](Self::serve) keeps it; it is taken down
/// when this is dropped.
#[must_use = "it is taken down when it is dropped"]
pub struct Mounted(Option<session::Mounted>);

impl Mount {
    /// The image at this path, on this directory: served by a thread for each processor, at least 2, and
    /// with nothing written to its disk. Names in the image are resolved against the directory of the
    /// path, as it is given.
    pub fn new(image: impl Into<PathBuf>, mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            image: image.into(),
            format: None,
            mountpoint: mountpoint.into(),
            opener: Opener::default(),
            options: MountOptions::default(),
            threads: thread::available_parallelism().map_or(2, |n| n.get().max(2)),
            writing: Writing::default(),
            log: None,
        }
    }

    /// The format of the image; recognised, if not given.
    pub fn format(self, format: impl Into<Option<Format>>) -> Self {
        Self { format: format.into(), ..self }
    }

    /// What opens the image, and later each new chain.
    pub fn opener(self, opener: Opener) -> Self {
        Self { opener, ..self }
    }

    /// What follows `-o`.
    pub fn options(self, options: MountOptions) -> Self {
        Self { options, ..self }
    }

    /// How many threads serve, at least 1.
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: threads.max(1), ..self }
    }

    /// What may be written to the disk.
    pub fn writing(self, writing: Writing) -> Self {
        Self { writing, ..self }
    }

    /// The file that messages go to: it may be none of the chain.
    pub fn log(self, file: impl Into<PathBuf>) -> Self {
        Self { log: Some(file.into()), ..self }
    }

    /// Opens the image and mounts it. Blocks SIGINT, SIGTERM and SIGHUP in the calling thread: the first two
    /// end the mount, for the third see [`Mounted::on_hangup`]. To be called before there are threads that do not block them.
    ///
    /// # Errors
    /// The image or one below it cannot be opened; it is to be written to and cannot be, or is no
    /// qcow2 image; the mount point is no directory, has something mounted on it, or contains the image;
    /// there is no `/dev/fuse`, or, for those who are not root, no `fusermount3`.
    pub fn start(self) -> Result<Mounted> {
        let image = point::absolute(&self.image)?;
        let mountpoint = point::check(&point::absolute(&self.mountpoint)?, &image)?;
        let config = self.options.config(&image, self.threads)?;
        let (chain, read_only) = open(&self.opener.clone().believe_names(), &image, self.format)?;
        if let Some((log, identity)) = self.log.as_ref().and_then(|log| Some((log, Identity::of(log).ok()?)))
        {
            let in_play = chain.files().map(|file| file.identity());
            refuse_in_play(identity, in_play).path(log).doing(|| "opening the log".to_owned())?;
        }
        let chain = match (self.writing, read_only.as_ref()) {
            (Writing::Refused, _) => chain,
            (_, None) => writing::prepare(&chain, &self.opener)?,
            (_, Some(why)) => return Err(Error::new(why.kind(), why.to_string())),
        };
        let ownership = ownership(&image)?;
        let disk = Arc::new(Image::new(chain));
        let control = Arc::new(Control::new(disk.clone(), read_only));
        let view = View::new(disk.clone(), control.clone(), ownership, self.writing);
        session::mount(view, disk, control, self.opener.renewed(), mountpoint, &config)
            .map(|mounted| Mounted(Some(mounted)))
    }
}

impl Mounted {
    /// What to do when SIGHUP comes, by custom: open the log anew. The mount ends if that is `Break`. Without
    /// this, nothing is done.
    pub fn on_hangup(mut self, hung_up: impl FnMut() -> ControlFlow<()> + Send + 'static) -> Self {
        Self(self.0.take().map(|mounted| mounted.on_hangup(Box::new(hung_up))))
    }

    /// Serves until the file system is unmounted or a signal asks to end (SIGINT, SIGTERM). Then it stops a
    /// running rebase, waits for it, and takes the mount down.
    ///
    /// # Errors
    /// The mount cannot be taken down, its connection broke, or what was written last cannot be made
    /// durable.
    pub fn serve(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), session::Mounted::serve)
    }

    /// Stops a running rebase, waits for it, and takes the mount down. Who uses a file in it gets
    /// errors from it.
    ///
    /// # Errors
    /// The mount cannot be taken down, or what was written last cannot be made durable.
    pub fn unmount(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), session::Mounted::unmount)
    }
}

impl fmt::Debug for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted").finish_non_exhaustive()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(session::Mounted::unmount) {
            log::error!("{error}");
        }
    }
}

/// Opens the chain for writing to its top; for reading, if the file system or its permissions
/// forbid more, together with why.
fn open(opener: &Opener, image: &Path, format: Option<Format>) -> Result<(Chain, Option<Error>)> {
    let doing = || format!("opening '{}'", image.display());
    match opener.chain(image, format, Access::ReadWrite) {
        Ok(chain) => Ok((chain, None)),
        Err(why) if matches!(why.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly) => {
            let chain = opener.chain(image, format, Access::ReadOnly).doing(doing)?;
            Ok((chain, Some(why)))
        }
        Err(e) => Err(e.doing(doing())),
    }
}

fn ownership(image: &Path) -> Result<Ownership> {
    let metadata = image.metadata().map_err(|e| Error::io(e, "cannot stat").path(image))?;
    let (user, group) = sys::effective_ids();
    // A file system without modification times has the beginning of time.
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(Ownership { user, group, modified })
}
