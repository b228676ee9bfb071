//! What the overlay shall stand on: the new backing file, opened and found fit, or what is known of
//! it where only its name is asked for.
//!
//! Reads headers; no guest data, and nothing is written.

use std::path::Path;
use std::sync::Arc;

use super::{Mode, Request};
use crate::chain::{Chain, Opener, resolve};
use crate::error::{Error, ErrorKind, Result};
use crate::file::Identity;
use crate::layer::{Format, Layer, Reference};

/// The new backing file.
pub(super) struct Target {
    /// As it goes into the header, with its format.
    pub backing: Option<Reference>,
    /// Opened; in [`Mode::Unsafe`] without layers where it could not be.
    pub chain: Chain,
}

impl Target {
    pub fn open(top: &Arc<dyn Layer>, opener: &Opener, request: &Request) -> Result<Self> {
        let Some(backing) = &request.backing else {
            return Ok(Self { backing: None, chain: Chain::default() });
        };
        let opened = opener.backing_chain(top.file().path(), Some(backing));
        let chain = match (opened, request.mode) {
            (Ok(chain), _) => chain,
            (Err(error), Mode::Unsafe) => record_unopened(top, backing, error, request.force)?,
            (Err(error), Mode::Safe) => return Err(error),
        };
        refuse_loop(top, &chain, backing)?;
        refuse_shared_files(top, &chain)?;
        let format = match (&backing.format, chain.top()) {
            (None, Some(layer)) => Some(layer.format().to_string()),
            (format, _) => format.clone(),
        };
        warn_of_header_shown_to_guest(&chain)?;
        if request.mode == Mode::Unsafe {
            warn_of_other_size(top, opener, &chain);
        }
        Ok(Self { backing: Some(Reference { format, ..backing.clone() }), chain })
    }
}

/// The chain of a backing file that cannot be opened, where all that is asked for is its name: it
/// may not be there yet, or not be ours to read.
fn record_unopened(
    top: &Arc<dyn Layer>,
    backing: &Reference,
    error: Error,
    is_forced: bool,
) -> Result<Chain> {
    if error.kind() == ErrorKind::Loop {
        return Err(error);
    }
    if backing.format.is_none() {
        return Err(error.hint("a name is recorded with its format: give it with `-F FORMAT`"));
    }
    if !is_forced && leads_nowhere(top, backing, &error) {
        return Err(
            error.hint("a relative name means a file beside the image; `--force` records it all the same")
        );
    }
    log::warn!("{error}: its name is recorded all the same, nothing could be verified");
    Ok(Chain::unopened(&error))
}

/// Whether a relative name means no file. An absolute one may be that of another machine, and what
/// is there but names a missing file itself is there.
fn leads_nowhere(top: &Arc<dyn Layer>, backing: &Reference, error: &Error) -> bool {
    let is_missing = || match resolve(top.file().path(), backing) {
        Ok(location) => Identity::of(&location.path).is_err(),
        Err(_) => true,
    };
    error.kind() == ErrorKind::NotFound && Path::new(&backing.name).is_relative() && is_missing()
}

/// The overlay must not stand on itself.
fn refuse_loop(top: &Arc<dyn Layer>, chain: &Chain, backing: &Reference) -> Result<()> {
    let overlay = top.file().identity();
    match chain.layers().iter().position(|layer| layer.file().identity() == overlay) {
        None => Ok(()),
        Some(depth) => {
            let name = backing.name.display();
            let what = match depth {
                0 => format!("'{name}' is the overlay itself"),
                _ => format!("the chain of '{name}' contains the overlay (as its layer {depth})"),
            };
            Err(Error::new(ErrorKind::Loop, what).path(top.file().path()))
        }
    }
}

/// What is written to the overlay must not change what lies below it (invariant I5): the one's
/// external data file may be the other.
pub(crate) fn refuse_shared_files(top: &Arc<dyn Layer>, below: &Chain) -> Result<()> {
    let files = |layer: &Arc<dyn Layer>| [layer.file().identity(), layer.data_file().identity()];
    let own = files(top);
    match below.layers().iter().find(|layer| files(layer).iter().any(|file| own.contains(file))) {
        None => Ok(()),
        Some(layer) => {
            let what = format!("has an external data file in common with {}", layer.file().path().display());
            let hint = "make a copy of its own: `qemu-img convert -O qcow2 IMAGE NEW`";
            Err(Error::new(ErrorKind::Loop, what).path(top.file().path()).hint(hint))
        }
    }
}

/// Somebody who calls a qcow2 file raw may mean it, but hardly ever does.
fn warn_of_header_shown_to_guest(chain: &Chain) -> Result<()> {
    let Some(layer) = chain.top().filter(|layer| layer.format() == Format::Raw) else { return Ok(()) };
    match Format::recognise(&**layer.file()) {
        Ok(Format::Raw) => {}
        _ => log::warn!(
            "{}: looks like a disk image, but is taken for raw as asked: the guest will see its header",
            layer.file().path().display()
        ),
    }
    Ok(())
}

/// A file that was merely moved has the size that it had. Where the old one is gone, a new one
/// shorter than the image is all that can be noticed.
fn warn_of_other_size(top: &Arc<dyn Layer>, opener: &Opener, new: &Chain) {
    let Some(layer) = new.top() else { return };
    let (path, size) = (layer.file().path().display(), layer.virtual_size());
    let old = opener.backing_chain(top.file().path(), top.backing());
    match old.as_ref().map(Chain::top) {
        Ok(Some(old)) if old.virtual_size() != size => log::warn!(
            "{path}: has {size} bytes, but the old backing file {} has {}: is that the same disk?",
            old.file().path().display(),
            old.virtual_size()
        ),
        Err(_) if size < top.virtual_size() => log::warn!(
            "{path}: has {size} bytes, fewer than the image with {}: what is missing reads as zeros",
            top.virtual_size()
        ),
        _ => {}
    }
}
