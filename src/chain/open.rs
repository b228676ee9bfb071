//! Opening a chain: one file after the other, each named by the one before.
//!
//! Owns the policy of what an image may make us open: how deep, no file twice, no guessed format
//! that names further files. Layers that two chains share are opened once.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::Chain;
use super::ground::Ground;
use super::name::{self, Location};
use super::place::choose;
use super::seen::{Seen, a_loop};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, CacheMode, Directory, HostFile, Identity, LocalFile, Lock};
use crate::layer::qcow2::table::TableCache;
use crate::layer::qcow2::{Preamble, Qcow2};
use crate::layer::{Format, Layer, Raw, Reference};
use crate::sys::errno;

/// No chain is longer. Public clouds see up to 1000 layers (arXiv 2205.06842).
pub const MAX_DEPTH: usize = 4096;

/// What may be guessed of a file that *an image names* without saying its format.
///
/// The guest that owned a raw disk can have written a qcow2 header into it that names any file of
/// the host (CVE-2010-2238, CVE-2024-32498).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guess {
    /// Only that it is raw, or a format that names no further file.
    #[default]
    Harmless,
    /// Anything, because whoever asks trusts all images of the chain.
    Anything,
}

/// Opens chains, each under the same policy, and shares the layers that they have in common. Its
/// clones share them, too.
///
/// ```
/// use rebasefs::chain::{Guess, Opener};
/// use rebasefs::file::Access;
/// use rebasefs::layer::Format;
///
/// # let file = tempfile::NamedTempFile::new()?;
/// # file.as_file().set_len(1 << 20)?;
/// # let path = file.path();
/// // All images are our own: trust what they say of each other, and read beside a running guest.
/// let opener = Opener::new().guess(Guess::Anything).force_share();
/// let chain = opener.chain(path, Some(Format::Raw), Access::ReadOnly)?;
/// assert_eq!((chain.layers().len(), chain.virtual_size()), (1, 1 << 20));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Opener {
    guess: Guess,
    locking: bool,
    /// Whether raw files may be written by others meanwhile.
    looks_at_raw: bool,
    /// Whether an L1 table may leave its file: nobody reads by it.
    forgives_l1: bool,
    /// Whether the name of the first image of a chain must agree with its content.
    believes_names: bool,
    /// Files on this device are refused: they lie inside our own mount.
    forbidden_device: Option<u64>,
    tables: Arc<TableCache>,
    /// How the first image of a chain is cached, and how those below it are.
    caching: (CacheMode, CacheMode),
    /// What chains hold that we opened. A layer that no chain holds any more is not kept, and a
    /// name that leads to another file by now is not looked up here.
    open: Arc<Mutex<OpenLayers>>,
}

/// By path and format.
type OpenLayers = HashMap<(PathBuf, Format), Weak<dyn Layer>>;

impl Chain {
    /// Opens the image at `path` and all below it for reading, as an [`Opener`] does that was told
    /// nothing else: the format is recognised, other processes may read beside us but not write, and
    /// an image that names a further file without its format is not trusted to.
    ///
    /// ```
    /// use rebasefs::{Chain, GuestOffset};
    ///
    /// # let file = tempfile::NamedTempFile::new()?;
    /// # std::fs::write(&file, [0x11; 4096])?;
    /// # let path = file.path();
    /// let chain = Chain::open(path)?;
    /// let mut sector = [0; 512];
    /// chain.read_at(GuestOffset(1024), &mut sector)?;
    /// assert_eq!(sector, [0x11; 512]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A file of the chain is not there, not ours to read, or being written by somebody else; an image
    /// breaks the rules of its format, or uses a feature that is not understood; the chain is a loop.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Opener::new().chain(path.as_ref(), None, Access::ReadOnly)
    }
}

impl Default for Opener {
    fn default() -> Self {
        Self::new()
    }
}

/// One step of a chain that is being opened.
struct Step {
    location: Location,
    /// The directory of the image that names the file; `None` where that is the current one.
    from: Option<Arc<Directory>>,
    access: Access,
    cache: CacheMode,
    /// Whether a person named the file, not an image.
    is_typed: bool,
    /// Whether a format that is recognised must agree with the name.
    believes_name: bool,
    /// Whether its directory is wanted later: names that it is going to hold are relative to that.
    keeps_directory: bool,
}

impl Step {
    /// The first of a chain, by the name that a person gives it.
    fn typed(path: &Path, format: Option<Format>, access: Access, cache: CacheMode) -> Self {
        let location = Location::typed(path, format);
        Self {
            location,
            from: None,
            access,
            cache,
            is_typed: true,
            believes_name: false,
            keeps_directory: true,
        }
    }
}

/// What to do about a file that an image names and that is not there.
fn or_moved(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => {
            error.hint("has it moved? `rebasefs rebase -u -b FILE -F FORMAT IMAGE` records where it is now")
        }
        _ => error,
    }
}

/// What to do where a chain is longer than files may be open.
fn or_raise_limit(error: Error) -> Error {
    match error.errno() {
        errno::EMFILE => error.hint("each image of a chain is an open file: `ulimit -n NUMBER` allows more"),
        _ => error,
    }
}

/// A file that was found, in the directory where it is.
struct Found {
    file: Arc<dyn HostFile>,
    directory: Arc<Directory>,
}

impl Opener {
    /// An opener that takes locks and guesses harmless formats only.
    pub fn new() -> Self {
        Self {
            guess: Guess::default(),
            locking: true,
            looks_at_raw: false,
            forgives_l1: false,
            believes_names: false,
            forbidden_device: None,
            tables: TableCache::new(),
            caching: Default::default(),
            open: Arc::default(),
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

    /// Opens raw files also where others write to them, as QEMU's programs do that only look: what is read
    /// may be torn, as with [`force_share`](Self::force_share).
    #[must_use]
    pub(crate) fn look_at_raw(self) -> Self {
        Self { looks_at_raw: true, ..self }
    }

    /// Opens images also where the L1 table leaves the file, to describe or to check them.
    #[must_use]
    pub(crate) fn forgive_l1(self) -> Self {
        Self { forgives_l1: true, ..self }
    }

    /// Refuses to recognise the first image of a chain where its name promises another format than its
    /// content. Of a backing file that a person names it is always refused.
    #[must_use]
    pub(crate) fn believe_names(self) -> Self {
        Self { believes_names: true, ..self }
    }

    /// Sets how images are cached: the one that a chain begins with, and those below it.
    #[must_use]
    pub fn caching(self, top: CacheMode, below: CacheMode) -> Self {
        Self { caching: (top, below), ..self }
    }

    /// Refuses files on the device of our own mount: reading them would read us.
    #[must_use]
    pub(crate) fn forbid_device(self, device: u64) -> Self {
        Self { forbidden_device: Some(device), ..self }
    }

    /// The same policy with nothing open yet: what was opened by `self` is not kept open by it.
    #[must_use]
    pub(crate) fn renewed(&self) -> Self {
        Self { tables: self.tables.clone(), open: Arc::default(), ..*self }
    }

    /// Whether it takes locks.
    pub(crate) fn takes_locks(&self) -> bool {
        self.locking
    }

    /// Opens the image at `path` and all below it, all under read locks; who wants to write to
    /// the top asks its file for more. Without `format`, it is recognised from the
    /// file: a person named it. `access` is for the top; what is below is opened for reading.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn chain(&self, path: &Path, format: Option<Format>, access: Access) -> Result<Chain> {
        let first = Step::typed(path, format, access, self.caching.0);
        self.walk(Step { believes_name: self.believes_names, ..first }, Seen::default())
    }

    /// Opens one image, without what is below it.
    pub(crate) fn layer(
        &self,
        path: &Path,
        format: Option<Format>,
        access: Access,
    ) -> Result<Arc<dyn Layer>> {
        let step = Step::typed(path, format, access, self.caching.0);
        self.layer_in(&self.find_file(&step)?, &step)
    }

    /// Opens the chain that begins with the file that a person gives as backing file of the image
    /// at `overlay`. Nothing, if `backing` is `None`.
    ///
    /// # Errors
    /// As [`Chain::open`]; also a chain that contains the overlay.
    pub fn backing_chain(&self, overlay: &Path, backing: Option<&Reference>) -> Result<Chain> {
        let directory = Directory::of(overlay, None).map(|(directory, _)| Arc::new(directory));
        // An overlay that does not exist yet can be part of no chain.
        self.chain_under(overlay, directory, Identity::of(overlay).ok(), backing)
    }

    /// The same for an overlay that is open: the name is looked for where that was found, whatever its path
    /// leads to now.
    pub(crate) fn chain_below(&self, overlay: &dyn HostFile, backing: Option<&Reference>) -> Result<Chain> {
        let directory = match overlay.directory() {
            Some(directory) => Ok(directory.clone()),
            None => Directory::of(overlay.path(), None).map(|(directory, _)| Arc::new(directory)),
        };
        self.chain_under(overlay.path(), directory, Some(overlay.identity()), backing)
    }

    /// `overlay` is only what the image is called; `above` is what it is.
    fn chain_under(
        &self,
        overlay: &Path,
        directory: io::Result<Arc<Directory>>,
        above: Option<Identity>,
        backing: Option<&Reference>,
    ) -> Result<Chain> {
        let Some(backing) = backing else { return Ok(Chain::default()) };
        let location = name::resolve(overlay, backing)?;
        let from = match directory {
            Ok(directory) => Some(directory),
            Err(_) if location.name.is_absolute() => None,
            Err(e) => return Err(Error::io(e, "cannot open the directory of the image").path(overlay)),
        };
        let directory = overlay.parent().unwrap_or(Path::new(""));
        let (access, cache) = (Access::ReadOnly, self.caching.1);
        let first = Step {
            location,
            from,
            access,
            cache,
            is_typed: true,
            believes_name: true,
            keeps_directory: false,
        };
        let seen = match above {
            Some(overlay) => Seen::under(overlay, Ground::of(overlay)?),
            None => Seen::at(Ground::of_directory(if directory.as_os_str().is_empty() {
                Path::new(".")
            } else {
                directory
            })?),
        };
        self.walk(first, seen).doing(|| {
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

    /// Opens layer after layer, below what was seen already.
    fn walk(&self, first: Step, mut seen: Seen) -> Result<Chain> {
        let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
        let mut next = Some(first);
        while let Some(step) = next {
            let depth = layers.len();
            let (layer, directory) = match layers.last() {
                None => self.walk_step(&step, depth, &mut seen)?,
                Some(above) => self.walk_step(&step, depth, &mut seen).map_err(or_moved).doing(|| {
                    format!("opening layer {depth} of the chain (named by {})", above.file().path().display())
                })?,
            };
            next = match layer.backing() {
                None => None,
                Some(reference) => Some(Step {
                    location: name::resolve(layer.file().path(), reference)
                        .doing(|| format!("opening layer {} of the chain", depth + 1))?,
                    from: Some(directory),
                    access: Access::ReadOnly,
                    cache: self.caching.1,
                    is_typed: false,
                    believes_name: false,
                    keeps_directory: false,
                }),
            };
            layers.push(layer);
        }
        Ok(Chain::new(layers))
    }

    /// Opens one layer, unless the chain would become a loop or too long by it; also the directory where it
    /// was found.
    fn walk_step(
        &self,
        step: &Step,
        depth: usize,
        seen: &mut Seen,
    ) -> Result<(Arc<dyn Layer>, Arc<Directory>)> {
        let found = self.find_file(step)?;
        let file = &found.file;
        let what = match seen.known(file.identity()) {
            _ if depth == MAX_DEPTH => format!("the chain has more than {MAX_DEPTH} layers"),
            None => {
                seen.refuse_circles(&**file, depth, self.forbidden_device)?;
                seen.add(file.identity(), depth)?;
                let layer = self.layer_in(&found, step)?;
                if layer.data_file().identity() != file.identity() {
                    seen.refuse_circles(&**layer.data_file(), depth, self.forbidden_device)?;
                }
                return Ok((layer, found.directory));
            }
            Some(None) => "is the overlay itself: the chain would be a loop".to_owned(),
            Some(Some(earlier)) => {
                format!("is layer {earlier} of its own chain already: the chain is a loop")
            }
        };
        Err(a_loop(file.path(), what))
    }

    fn find_file(&self, step: &Step) -> Result<Found> {
        self.find_file_in(step).map_err(or_raise_limit)
    }

    fn find_file_in(&self, step: &Step) -> Result<Found> {
        let (from, name, path) = choose(&step.location, step.from.as_deref())?;
        let directory = Directory::of(name, from);
        let (directory, name) = directory.map_err(|e| Error::io(e, "cannot open").path(path))?;
        let mut file = LocalFile::open_in(&directory, name, path, step.access, step.cache)?;
        self.refuse_own_mount(&file)?;
        let directory = Arc::new(directory);
        if step.keeps_directory {
            file.keep(directory.clone());
        }
        Ok(Found { file: Arc::new(file), directory })
    }

    /// The layer in a file that was found, which is dropped again where a chain has the layer open.
    fn layer_in(&self, found: &Found, step: &Step) -> Result<Arc<dyn Layer>> {
        let Found { file, directory } = found;
        let format = match &step.location.format {
            Some(name) => Format::from_name(name).path(file.path())?,
            None => {
                let format = self.recognise(&**file, step.is_typed)?;
                if step.believes_name {
                    format.refuse_other_name(file.path())?;
                }
                format
            }
        };
        if step.access == Access::ReadWrite {
            return self.open_layer(file, directory, format, step.cache);
        }
        let (key, identity) = ((file.path().to_owned(), format), file.identity());
        if let Some(layer) = self.find_open(&key).filter(|layer| layer.file().identity() == identity) {
            return Ok(layer);
        }
        let layer = self.open_layer(file, directory, format, step.cache)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(key, Arc::downgrade(&layer));
        Ok(layer)
    }

    fn find_open(&self, key: &(PathBuf, Format)) -> Option<Arc<dyn Layer>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(key).and_then(Weak::upgrade)
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
        let further = match preamble.backing.clone().or(preamble.data_file().path(file.path())?) {
            Some(reference) => reference.name,
            None => return Ok(format),
        };
        let what = format!(
            "the image above does not say its format; it looks like {format} and names a further file, '{}', \
             which a guest could have written there",
            further.display()
        );
        let hint = "record the format with `rebasefs rebase -u -b FILE -F FORMAT IMAGE`, or allow it with `--guess-formats`";
        Err(Error::new(ErrorKind::PermissionDenied, what).path(file.path()).hint(hint))
    }

    fn open_layer(
        &self,
        file: &Arc<dyn HostFile>,
        directory: &Directory,
        format: Format,
        cache: CacheMode,
    ) -> Result<Arc<dyn Layer>> {
        if self.locking {
            let is_looked_at = self.looks_at_raw && format == Format::Raw;
            file.lock(if is_looked_at { Lock::Look } else { Lock::Read })?;
        }
        match format {
            Format::Raw => Ok(Arc::new(Raw::open(file.clone()))),
            Format::Qcow2 => {
                let preamble = Preamble::read(&**file)?;
                let data_file = match preamble.data_file().path(file.path())? {
                    None => None,
                    Some(reference) => Some(self.open_data_file((&**file, directory), &reference, cache)?),
                };
                let open = if self.forgives_l1 { Qcow2::open_to_look } else { Qcow2::open };
                Ok(Arc::new(open(file.clone(), data_file, preamble, self.tables.clone())?))
            }
        }
    }

    fn open_data_file(
        &self,
        (image, directory): (&dyn HostFile, &Directory),
        reference: &Reference,
        cache: CacheMode,
    ) -> Result<Arc<dyn HostFile>> {
        let doing = || format!("opening external data file '{}'", reference.name.display());
        let location = name::resolve_data_file(image.path(), reference).doing(doing)?;
        let (from, name, path) = choose(&location, Some(directory)).doing(doing)?;
        let file = match Directory::of(name, from) {
            Ok((place, name)) => LocalFile::open_in(&place, name, path, image.access(), cache),
            Err(e) => Err(Error::io(e, "cannot open").path(path)),
        };
        let file = file.doing(doing)?;
        self.refuse_own_mount(&file).doing(doing)?;
        if file.identity() == image.identity() {
            let what = "names itself as its external data file";
            return Err(Error::new(ErrorKind::Loop, what).path(image.path()));
        }
        if self.locking {
            file.lock(Lock::Read).doing(doing)?;
        }
        Ok(Arc::new(file))
    }
}
