//! Where a name leads that can mean two files: beside the image, or in the current directory, where QEMU
//! looks for some.

use std::path::{Path, PathBuf};

use super::name::{self, Location};
use crate::error::{Error, Result};
use crate::file::{Directory, Identity};
use crate::layer::Reference;

/// The path by which what the image at `image` names is found: by that path, whatever is open.
///
/// # Errors
/// It is no local file, or its name can mean two.
pub(crate) fn place_of(image: &Path, reference: &Reference) -> Result<PathBuf> {
    let location = name::resolve(image, reference)?;
    choose(&location, None).map(|(_, _, path)| path.to_owned())
}

/// Which of the two places that a name can mean is meant, ours in the directory `from`, or the one where QEMU
/// looks: where it is opened from, by which name, and what it is called.
pub(super) fn choose<'a>(
    location: &'a Location,
    from: Option<&'a Directory>,
) -> Result<(Option<&'a Directory>, &'a Path, &'a Path)> {
    let (ours, name): (&Path, &Path) = (&location.path, &location.name);
    let Some(theirs) = &location.from_current_directory else { return Ok((from, name, ours)) };
    let here = from.map_or_else(|| Identity::of(ours), |directory| directory.identity_of(name));
    match (here, Identity::of(theirs)) {
        (Ok(one), Ok(other)) if one != other => {
            let what = format!(
                "its name can also mean {} in the current directory, which is where QEMU looks, and that is another file",
                theirs.display()
            );
            let hint = "store an absolute path, or run from the directory of the image";
            Err(Error::invalid(what).path(ours).hint(hint))
        }
        (Err(_), Ok(_)) => {
            log::warn!("{}: not found; taking {} in the current directory", ours.display(), theirs.display());
            Ok((None, theirs, theirs))
        }
        _ => Ok((from, name, ours)),
    }
}
