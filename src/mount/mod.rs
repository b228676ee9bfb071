//! The mounted view: one flat raw file with the guest-visible bytes, and control files to look
//! into the chain and to change it.
//!
//! [`Mount`] says what to mount where; [`Mount::start`] makes it, [`Mounted::serve`] lives with
//! it; [`unmount()`] takes it down from another process. `adapter` is all that knows FUSE requests;
//! `view` is the file system without them, made of `tree` (inodes and names), `image` (the chain of the
//! moment, as flat files: `flat`; its layers, snapshots and partitions: `parts`; what a guest writes:
//! `writing`) and `control` (commands and jobs).

mod adapter;
mod attributes;
mod control;
mod flat;
mod image;
mod options;
mod partitions;
mod parts;
mod point;
mod session;
mod snapshots;
mod tree;
mod unmount;
mod view;
mod writing;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::chain::{Chain, Opener};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::Access;
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

/// What to mount, where, and how.
#[derive(Debug)]
pub struct Mount {
    /// The image, as typed: names in it are resolved against this path's directory.
    pub image: PathBuf,
    /// Its format; recognised, if not given.
    pub format: Option<Format>,
    /// The directory to mount on.
    pub mountpoint: PathBuf,
    /// What opens the image, and later each new chain.
    pub opener: Opener,
    /// What follows `-o`.
    pub options: MountOptions,
    /// How many threads serve, at least 1.
    pub threads: usize,
    /// What may be written to the disk.
    pub writing: Writing,
}

/// A mount that stands: it can be used from now on, and [`serve`](Self::serve) keeps it.
pub struct Mounted(session::Mounted);

impl Mount {
    /// Opens the image and mounts it. Blocks SIGINT, SIGTERM and SIGHUP in the calling thread.
    ///
    /// # Errors
    /// The image or one below it cannot be opened, or the mount point will not do.
    pub fn start(self) -> Result<Mounted> {
        let image = point::absolute(&self.image)?;
        let mountpoint = point::check(&point::absolute(&self.mountpoint)?, &image)?;
        let config = self.options.config(&image, self.threads.max(1))?;
        let (chain, read_only) = open(&self.opener, &image, self.format)?;
        let chain = match (self.writing, read_only.as_ref()) {
            (Writing::Refused, _) => chain,
            (_, None) => writing::prepare(&chain, &self.opener)?,
            (_, Some(why)) => return Err(Error::new(why.kind(), why.to_string())),
        };
        let ownership = ownership(&image)?;
        let disk = Arc::new(Image::new(chain));
        let control = Arc::new(Control::new(disk.clone(), read_only));
        let view = View::new(disk.clone(), control.clone(), ownership, self.writing);
        session::mount(view, disk, control, self.opener.renewed(), mountpoint, &config).map(Mounted)
    }
}

impl Mounted {
    /// Serves until the file system is unmounted or a signal asks to end (SIGINT, SIGTERM,
    /// SIGHUP). Then it stops a running rebase, waits for it, and takes the mount down.
    ///
    /// # Errors
    /// The mount cannot be taken down, or its connection broke.
    pub fn serve(self) -> Result<()> {
        self.0.serve()
    }
}

/// Opens the chain for writing to its top; for reading, if the file system or its permissions
/// forbid more, together with why.
fn open(opener: &Opener, image: &std::path::Path, format: Option<Format>) -> Result<(Chain, Option<Error>)> {
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

fn ownership(image: &std::path::Path) -> Result<Ownership> {
    let metadata = image.metadata().map_err(|e| Error::io(e, "cannot stat").path(image))?;
    let (user, group) = sys::effective_ids();
    // A file system without modification times has the beginning of time.
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(Ownership { user, group, modified })
}
