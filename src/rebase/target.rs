//! What the overlay shall stand on: the new backing file, opened and found fit, or what is known of
//! it where only its name is asked for.
//!
//! Reads headers; no guest data, and nothing is written.

use std::sync::Arc;

use super::open_for_writing::{LEAVE_NAMES, refuse_renamed};
use super::{Mode, Request};
use crate::chain::{Chain, Opener, format_to_record, place_of, refuse_what_qemu_cannot_open};
use crate::error::{Error, ErrorKind, Result};
use crate::file::Identity;
use crate::layer::{Format, Layer, Reference};

/// Whose warnings these are: whoever asks for the name alone wants nothing to be looked at, and a program that
/// asks for it is not told. The command line decides who is.
pub(crate) const UNVERIFIED: &str = "rebasefs::unverified";

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
        let opened = opener.chain_below(&**top.file(), Some(backing));
        let chain = match (opened, request.mode) {
            (Ok(chain), _) => chain,
            (Err(error), Mode::Unsafe) => record_unopened(top, opener, backing, error)?,
            (Err(error), Mode::Safe) => return Err(error),
        };
        refuse_loop(top, &chain, backing)?;
        refuse_shared_files(top, &chain)?;
        let format = match (&backing.format, chain.top()) {
            (None, Some(layer)) => Some(format_to_record(backing, layer.format())),
            (format, _) => format.clone(),
        };
        let backing = Reference { format, ..backing.clone() };
        refuse_unopenable(&chain, &backing, request.mode)?;
        if let Some(warning) = header_shown_to_guest(&chain) {
            match request.mode {
                Mode::Safe => log::warn!("{warning}"),
                Mode::Unsafe => log::warn!(target: UNVERIFIED, "{warning}"),
            }
        }
        if request.mode == Mode::Unsafe {
            warn_of_other_size(top, opener, &chain);
        }
        Ok(Self { backing: Some(backing), chain })
    }

    /// The last look before the name is recorded: by the path of the image, as QEMU is going to look for it,
    /// it must lead to the file that was opened, and the path itself to the image.
    ///
    /// # Errors
    /// It leads elsewhere, or nowhere ([`ErrorKind::Busy`]).
    pub fn refuse_led_elsewhere(&self, top: &Arc<dyn Layer>) -> Result<()> {
        let image = top.file();
        refuse_renamed(top)?;
        let (Some(backing), Some(opened), Some(_)) = (&self.backing, self.chain.top(), image.descriptor())
        else {
            return Ok(());
        };
        let place = place_of(image.path(), backing)?;
        let what = match Identity::of(&place) {
            Ok(identity) if identity == opened.file().identity() => return Ok(()),
            Ok(_) => "leads to another file by now than the one that was looked at".to_owned(),
            Err(e) => format!("does not lead to the file any more that was looked at: {}", e.kind()),
        };
        let what = format!("'{}' {what}; the image still stands on what it stood on", backing.name.display());
        Err(Error::new(ErrorKind::Busy, what).path(place).hint(LEAVE_NAMES))
    }
}

/// The chain of a backing file that cannot be opened, where all that is asked for is its name: it
/// may not be there yet, or not be ours to read.
fn record_unopened(
    top: &Arc<dyn Layer>,
    opener: &Opener,
    backing: &Reference,
    error: Error,
) -> Result<Chain> {
    if error.kind() == ErrorKind::Loop {
        return Err(error);
    }
    if backing.format.is_none() {
        return Err(error.hint("a name is recorded with its format: give it with `-F FORMAT`"));
    }
    // Somebody may hold a file of it: what it stands on can be seen all the same.
    match opener.renewed().force_share().chain_below(&**top.file(), Some(backing)) {
        Err(error) if error.kind() == ErrorKind::Loop => return Err(error),
        _ => {}
    }
    log::warn!(target: UNVERIFIED, "{error}: its name is recorded all the same, nothing could be verified");
    Ok(Chain::unopened(&error))
}

/// What QEMU could not open by the name that is recorded is no backing file; who records it all the same
/// is told.
fn refuse_unopenable(chain: &Chain, backing: &Reference, mode: Mode) -> Result<()> {
    let Some(layer) = chain.top() else { return Ok(()) };
    let is_device = layer.file().identity().is_block_device();
    match (refuse_what_qemu_cannot_open(backing, is_device), mode) {
        (Err(error), Mode::Unsafe) => {
            log::warn!(target: UNVERIFIED, "{error}: it is recorded all the same");
            Ok(())
        }
        (result, _) => result,
    }
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
pub(super) fn refuse_shared_files(top: &Arc<dyn Layer>, below: &Chain) -> Result<()> {
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
fn header_shown_to_guest(chain: &Chain) -> Option<String> {
    let layer = chain.top().filter(|layer| layer.format() == Format::Raw)?;
    let is_raw = matches!(Format::recognise(&**layer.file()), Ok(Format::Raw));
    (!is_raw).then(|| {
        let path = layer.file().path().display();
        format!(
            "{path}: looks like a disk image, but is taken for raw as asked: the guest will see its header"
        )
    })
}

/// A file that was merely moved has the size that it had. Where the old one is gone, a new one
/// shorter than the image is all that can be noticed.
fn warn_of_other_size(top: &Arc<dyn Layer>, opener: &Opener, new: &Chain) {
    let Some(layer) = new.top() else { return };
    let (path, size) = (layer.file().path().display(), layer.virtual_size());
    let old = opener.chain_below(&**top.file(), top.backing());
    match old.as_ref().map(Chain::top) {
        Ok(Some(old)) if old.virtual_size() != size => log::warn!(
            target: UNVERIFIED,
            "{path}: has {size} bytes, but the old backing file {} has {}: is that the same disk?",
            old.file().path().display(),
            old.virtual_size()
        ),
        Err(_) if size < top.virtual_size() => log::warn!(
            target: UNVERIFIED,
            "{path}: has {size} bytes, fewer than the image with {}: what is missing reads as zeros",
            top.virtual_size()
        ),
        _ => {}
    }
}
