//! Opening a chain: one file after the other, each named by the one before.
//!
//! Owns the policy of what an image may make us open: how deep, no file twice, no guessed format
//! that names further files. Layers that two chains share are opened once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Chain, Location, name};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, HostFile, Identity, LocalFile, Lock};
use crate::layer::qcow2::table::TableCache;
use crate::layer::qcow2::{Preamble, Qcow2};
use crate::layer::{Format, Layer, Raw, Reference};

/// No chain is longer. Public clouds see up to 1000 layers (arXiv 2205.06842).
pub const MAX_DEPTH: usize = 4096;

/// What may be guessed of a file that *an image names* without saying its format.
///
/// The guest that owned a raw disk can have written a qcow2 header into it that names any file of
/// the host (CVE-2010-2238, CVE-2024-32498).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guess {
    /// Only that it is raw, or a format that names no further file.
    #[default]
    Harmless,
    /// Anything, because whoever asks trusts all images of the chain.
    Anything,
}

/// Opens chains, each under the same policy, and shares the layers that they have in common.
#[derive(Debug)]
pub struct Opener {
    guess: Guess,
    locking: bool,
    /// Files on this device are refused: they lie inside our own mount.
    forbidden_device: Option<u64>,
    cache: Arc<TableCache>,
    open: Mutex<HashMap<(PathBuf, Format), Arc<dyn Layer>>>,
}

impl Default for Opener {
    fn default() -> Self {
        Self::new()
    }
}

/// One step of a chain that is being opened.
struct Step {
    location: Location,
    access: Access,
    /// Whether a person named the file, not an image.
    is_typed: bool,
}

impl Opener {
    /// An opener that takes locks and guesses harmless formats only.
    pub fn new() -> Self {
        Self {
            guess: Guess::default(),
            locking: true,
            forbidden_device: None,
            cache: TableCache::new(),
            open: Mutex::default(),
        }
    }

    /// Lets formats be guessed.
    #[must_use]
    pub fn guess(self, guess: Guess) -> Self {
        Self { guess, ..self }
    }

    /// Opens images whatever other processes do with them (`qemu-img -U`).
    #[must_use]
    pub fn force_share(self) -> Self {
        Self { locking: false, ..self }
    }

    /// Refuses files on the device of our own mount: reading them would read us.
    #[must_use]
    pub fn forbid_device(self, device: u64) -> Self {
        Self { forbidden_device: Some(device), ..self }
    }

    /// Whether it takes locks.
    pub fn takes_locks(&self) -> bool {
        self.locking
    }

    /// Opens the image at `path` and all below it, all under read locks; who wants to write to
    /// the top asks its file for more. Without `format`, it is recognised from the
    /// file: a person named it. `access` is for the top; what is below is opened for reading.
    pub fn chain(&self, path: &Path, format: Option<Format>, access: Access) -> Result<Chain> {
        let location = Location { path: path.to_owned(), format: format.map(|f| f.to_string()) };
        self.walk(Step { location, access, is_typed: true })
    }

    /// Opens one image, without what is below it.
    pub fn layer(&self, path: &Path, format: Option<Format>, access: Access) -> Result<Arc<dyn Layer>> {
        let location = Location { path: path.to_owned(), format: format.map(|f| f.to_string()) };
        self.step(&Step { location, access, is_typed: true })
    }

    /// Opens the chain that begins with the file that a person gives as backing file of the image
    /// at `overlay`. Nothing, if `backing` is `None`.
    pub fn backing_chain(&self, overlay: &Path, backing: Option<&Reference>) -> Result<Chain> {
        let Some(backing) = backing else { return Ok(Chain::default()) };
        let location = name::resolve(overlay, backing)?;
        let directory = overlay.parent().unwrap_or(Path::new(""));
        self.walk(Step { location, access: Access::ReadOnly, is_typed: true }).doing(|| {
            match Path::new(&backing.name).is_relative() && !directory.as_os_str().is_empty() {
                true => format!(
                    "opening backing file '{}' (looked for in {})",
                    backing.name.display(),
                    directory.display()
                ),
                false => format!("opening backing file '{}'", backing.name.display()),
            }
        })
    }

    fn walk(&self, first: Step) -> Result<Chain> {
        let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
        let mut seen: HashMap<Identity, usize> = HashMap::new();
        let mut next = Some(first);
        while let Some(step) = next {
            let depth = layers.len();
            let in_layer = || format!("opening layer {depth} of the chain");
            if depth == MAX_DEPTH {
                let what = format!("the chain has more than {MAX_DEPTH} layers");
                return Err(Error::new(ErrorKind::Loop, what).path(&step.location.path));
            }
            let layer = match layers.last() {
                None => self.step(&step)?,
                Some(above) => self
                    .step(&step)
                    .doing(|| format!("{} (named by {})", in_layer(), above.file().path().display()))?,
            };
            if let Some(earlier) = seen.insert(layer.file().identity(), depth) {
                let what = format!("is layer {earlier} of its own chain already: the chain is a loop");
                let error = Error::new(ErrorKind::Loop, what).path(&step.location.path);
                return Err(error.doing(in_layer()));
            }
            next = match layer.backing() {
                None => None,
                Some(reference) => Some(Step {
                    location: name::resolve(layer.file().path(), reference).doing(in_layer)?,
                    access: Access::ReadOnly,
                    is_typed: false,
                }),
            };
            layers.push(layer);
        }
        Ok(Chain::new(layers))
    }

    fn step(&self, step: &Step) -> Result<Arc<dyn Layer>> {
        let Location { path, format } = &step.location;
        let format = match format {
            Some(name) => Some(Format::from_name(name).path(path)?),
            None => None,
        };
        if let Some(layer) = format.and_then(|format| self.find_open(path, format)) {
            return Ok(layer);
        }
        let file: Arc<dyn HostFile> = Arc::new(LocalFile::open(path, step.access)?);
        self.refuse_own_mount(&*file)?;
        let format = match format {
            Some(format) => format,
            None => self.recognise(&*file, step.is_typed)?,
        };
        if let Some(layer) = self.find_open(path, format) {
            return Ok(layer);
        }
        if self.locking {
            file.lock(Lock::Read)?;
        }
        let layer = self.open_layer(file, format)?;
        if step.access == Access::ReadOnly {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.insert((path.clone(), format), layer.clone());
        }
        Ok(layer)
    }

    fn find_open(&self, path: &Path, format: Format) -> Option<Arc<dyn Layer>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(&(path.to_owned(), format)).cloned()
    }

    fn refuse_own_mount(&self, file: &dyn HostFile) -> Result<()> {
        if self.forbidden_device != Some(file.identity().device) {
            return Ok(());
        }
        let what = "lies inside this mount: it cannot stand below itself";
        Err(Error::new(ErrorKind::Loop, what).path(file.path()))
    }

    fn recognise(&self, file: &dyn HostFile, is_typed: bool) -> Result<Format> {
        let format = Format::recognise(file)?;
        if is_typed || self.guess == Guess::Anything || format == Format::Raw {
            return Ok(format);
        }
        let preamble = Preamble::read(file)?;
        let further = match preamble.backing.clone().or(preamble.data_file()?) {
            Some(reference) => reference.name,
            None => return Ok(format),
        };
        let what = format!(
            "the image above does not say its format; it looks like {format} and names a further file, '{}', \
             which a guest could have written there",
            further.display()
        );
        let hint = "record the format with `rebasefs rebase -u -b FILE -F FORMAT IMAGE`, or allow it with --guess-formats";
        Err(Error::new(ErrorKind::PermissionDenied, what).path(file.path()).hint(hint))
    }

    fn open_layer(&self, file: Arc<dyn HostFile>, format: Format) -> Result<Arc<dyn Layer>> {
        match format {
            Format::Raw => Ok(Arc::new(Raw::open(file))),
            Format::Qcow2 => {
                let preamble = Preamble::read(&*file)?;
                let data_file = match preamble.data_file().path(file.path())? {
                    None => None,
                    Some(reference) => Some(self.open_data_file(&*file, &reference)?),
                };
                Ok(Arc::new(Qcow2::open(file, data_file, preamble, self.cache.clone())?))
            }
        }
    }

    fn open_data_file(&self, image: &dyn HostFile, reference: &Reference) -> Result<Arc<dyn HostFile>> {
        let doing = || format!("opening external data file '{}'", reference.name.display());
        let path = name::resolve(image.path(), reference).doing(doing)?.path;
        let file = LocalFile::open(&path, image.access()).doing(doing)?;
        self.refuse_own_mount(&file).doing(doing)?;
        if self.locking {
            file.lock(Lock::Read).doing(doing)?;
        }
        Ok(Arc::new(file))
    }
}
