//! A rebase put together word by word: which image, onto what, how; then looked at or done.
//!
//! What cannot be meant together cannot be written: an image that has not been told where to is a type
//! without `run`, and a safe rebase and a mere change of the reference are two types. Does nothing
//! itself: what happens is in the parent module.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use super::watched::watched;
use super::{Differences, Mode, Progress, Rebased, Rehearsal, Request, Standing};
use super::{rebase, rebase_alone, rehearse};
use crate::chain::{Chain, Opener};
use crate::error::{Error, ErrorKind, Result};
use crate::file::Access;
use crate::layer::Reference;

/// An image that is going to get another backing file: by a safe rebase ([`onto`](Self::onto),
/// [`flatten`](Self::flatten)), or by a change of the reference alone
/// ([`record_only`](Self::record_only)).
///
/// ```
/// use rebasefs::layer::{Format, Reference};
/// use rebasefs::{Progress, Rebase};
/// # use rebasefs::file::LocalFile;
/// # use rebasefs::layer::qcow2::create::{Spec, create};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let place = |name: &str| directory.path().join(name);
/// # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
/// # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
/// # let old = Some(Reference::new("old.img", Format::Raw));
/// # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
/// # let cow = place("cow.qcow2");
/// # create(&LocalFile::create(&cow)?, None, &spec)?;
/// // `cow` stands on old.img, which has 1 MiB of 0x11; new.img has other bytes in its first half.
/// let rebase = Rebase::new(&cow).onto(Reference::new("new.img", Format::Raw)).verify();
/// let found = rebase.plan()?;
/// println!("{} of {} bytes differ", found.report.copied, found.report.missing);
/// let done = rebase.run(&Progress::default())?;
/// assert_eq!(done.report.copied, 512 << 10);
/// assert_eq!(done.chain.layers()[1].file().path(), place("new.img"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "it does nothing before it is told where to, and run"]
pub struct Rebase {
    image: Image,
    opener: Opener,
}

/// The image: to be opened, or open.
#[derive(Clone, Debug)]
enum Image {
    At(PathBuf),
    Open(Chain),
}

impl Rebase {
    /// Of the image at `path`, which is recognised, opened and locked when the rebase runs.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { image: Image::At(path.into()), opener: Opener::default() }
    }

    /// Of the top of a chain, opened for writing. The chain that the rebase returns takes its place.
    pub fn of_chain(chain: Chain) -> Self {
        Self { image: Image::Open(chain), opener: Opener::default() }
    }

    /// What opens the image and its backing files, if not an [`Opener`] that was told nothing.
    pub fn opener(self, opener: Opener) -> Self {
        Self { opener, ..self }
    }

    /// A safe rebase onto another backing file: no guest-visible byte changes, of the disk or of an
    /// internal snapshot. The name goes into the header as given, and is resolved against the
    /// directory of the image. A format that is not given is recognised, and recorded.
    pub fn onto(self, backing: impl Into<Reference>) -> SafeRebase {
        SafeRebase(self.asking(Mode::Safe, Some(backing.into())))
    }

    /// A safe rebase onto no backing file at all: the image holds everything by itself afterwards.
    pub fn flatten(self) -> SafeRebase {
        SafeRebase(self.asking(Mode::Safe, None))
    }

    /// Lets the header name another backing file, and nothing else: for a file that was moved or renamed
    /// (`qemu-img rebase -u`). **A guest sees other bytes if it is not the same file.**
    pub fn record_only(self, backing: impl Into<Reference>) -> UnsafeRebase {
        UnsafeRebase(self.asking(Mode::Unsafe, Some(backing.into())))
    }

    /// Lets the header name no backing file any more, and nothing else. **What the image does not hold
    /// itself reads as zeros then**; [`flatten`](Self::flatten) keeps the bytes.
    pub fn record_none(self) -> UnsafeRebase {
        UnsafeRebase(self.asking(Mode::Unsafe, None))
    }

    fn asking(self, mode: Mode, backing: Option<Reference>) -> Asked {
        Asked { rebase: self, request: Request { mode, backing, ..Request::default() } }
    }
}

/// A rebase, and all that is asked for.
#[derive(Clone, Debug)]
struct Asked {
    rebase: Rebase,
    request: Request,
}

impl Asked {
    /// The image, and what the request needs of that below it.
    fn open(&self, access: Access) -> Result<Chain> {
        if self.request.backing.as_ref().is_some_and(|backing| backing.name.is_empty()) {
            let error = Error::invalid("a backing file needs a name");
            return Err(error.hint("`flatten` is a rebase onto none"));
        }
        match &self.rebase.image {
            Image::At(path) => self.request.open(&self.rebase.opener, path, None, access),
            Image::Open(chain) => Ok(chain.clone()),
        }
    }
}

/// A rebase that keeps every guest-visible byte; made by [`Rebase::onto`] and [`Rebase::flatten`].
#[derive(Clone, Debug)]
#[must_use = "it does nothing before `run`"]
pub struct SafeRebase(Asked);

impl SafeRebase {
    fn asking(mut self, ask: impl FnOnce(&mut Request)) -> Self {
        ask(&mut self.0.request);
        self
    }

    /// Before the header names the new backing file, compares all that the image will read as, from
    /// what is on the disk, with what it reads as now. Costs another look at what was compared.
    pub fn verify(self) -> Self {
        self.asking(|request| request.verify = true)
    }

    /// Stores what is copied as compressed clusters, as far as it shrinks.
    pub fn compress(self) -> Self {
        self.asking(|request| request.compress = true)
    }

    /// Afterwards, drops what the image holds although its new backing file has the same bytes, and
    /// gives the space back to the file system.
    pub fn reclaim(self) -> Self {
        self.asking(|request| request.reclaim = true)
    }

    /// Shares with other rebases where old and new backing file differ: who moves first from the one
    /// to the other finds out.
    pub fn sharing(self, differences: &Arc<Differences>) -> Self {
        self.asking(|request| request.differences = Some(differences.clone()))
    }

    /// Finds out what [`run`](Self::run) would do. Reads what that would read; writes nothing, and needs
    /// no permission to.
    ///
    /// # Errors
    /// What [`run`](Self::run) would refuse, as far as that can be told beforehand.
    pub fn plan(&self) -> Result<Rehearsal> {
        self.plan_with(&Progress::default())
    }

    /// The same, while somebody looks how far it is, or stops it.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); [`ErrorKind::Cancelled`] if it was stopped.
    pub fn plan_with(&self, progress: &Progress) -> Result<Rehearsal> {
        let chain = self.0.open(Access::ReadOnly)?;
        rehearse(&chain, &self.0.rebase.opener, &self.0.request, progress)
    }

    /// Rebases. Another thread may look at `progress` meanwhile, and [cancel](Progress::cancel) it.
    ///
    /// Whatever stops it, a power cut included, leaves the image whole and every byte as it was; what
    /// was copied is not copied again when it is started again.
    ///
    /// # Errors
    /// A file cannot be opened, read or written, or somebody else has the image open; the image or its
    /// chain breaks the rules of its format; the new chain contains the image itself
    /// ([`ErrorKind::Loop`]); the header has no room for the name ([`ErrorKind::NoSpace`]); it was
    /// stopped ([`ErrorKind::Cancelled`]). The image stands on its old backing file then, except where
    /// the message says that reclaiming failed. Of a [chain](Rebase::of_chain), nothing is
    /// [reclaimed](Self::reclaim) as long as somebody else holds it too ([`ErrorKind::Busy`]): it may be
    /// read by tables that lead to what is freed.
    pub fn run(self, progress: &Progress) -> Result<Rebased> {
        let Asked { rebase, request } = &self.0;
        let is_held_elsewhere = match &rebase.image {
            Image::At(_) => false,
            Image::Open(chain) => chain.is_held_elsewhere(),
        };
        if request.reclaim && is_held_elsewhere {
            let what = "somebody else holds the chain: reclaiming would free what he may still read";
            return Err(Error::new(ErrorKind::Busy, what));
        }
        rebase_alone(&self.0.open(Access::ReadWrite)?, &rebase.opener, request, progress)
    }

    /// Rebases, and calls `look` about ten times a second with how far it is, a last time when all is
    /// done. [`ControlFlow::Break`] stops it.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use rebasefs::{ErrorKind, Rebase};
    /// # use rebasefs::file::LocalFile;
    /// # use rebasefs::layer::qcow2::create::{Spec, create};
    /// # use rebasefs::layer::{Format, Reference};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let place = |name: &str| directory.path().join(name);
    /// # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
    /// # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
    /// # let old = Some(Reference::new("old.img", Format::Raw));
    /// # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
    /// # let cow = place("cow.qcow2");
    /// # create(&LocalFile::create(&cow)?, None, &spec)?;
    /// let done = Rebase::new(&cow).onto("new.img").run_watched(|standing| {
    ///     println!("{}: {:.0} %", standing.phase.word(), standing.percent());
    ///     let is_too_slow = standing.left().is_some_and(|left| left.as_secs() > 3600);
    ///     if is_too_slow { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    /// });
    /// match done {
    ///     Ok(done) => println!("{} bytes copied", done.report.copied),
    ///     Err(error) if error.kind() == ErrorKind::Cancelled => println!("tonight, then: {error}"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # assert_eq!(rebasefs::Chain::open(&cow)?.layers()[1].file().path(), place("new.img"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_watched(self, mut look: impl FnMut(Standing) -> ControlFlow<()>) -> Result<Rebased> {
        let progress = Progress::default();
        let done = watched(
            || self.run(&progress),
            || {
                if look(progress.standing()).is_break() {
                    progress.cancel();
                }
            },
        )?;
        // It is done, whatever is said to that.
        let _ = look(progress.standing());
        Ok(done)
    }
}

/// A change of the reference alone; made by [`Rebase::record_only`] and [`Rebase::record_none`].
#[derive(Clone, Debug)]
#[must_use = "it does nothing before `run`"]
pub struct UnsafeRebase(Asked);

impl UnsafeRebase {
    /// Lets the header name the backing file. Reads neither the old nor the new one, which need not
    /// be there: the chain that is returned is [broken off](Chain::broken_off) then.
    ///
    /// # Errors
    /// The image cannot be opened for writing, or somebody else has it open; the new chain contains the
    /// image itself ([`ErrorKind::Loop`]); the header has no room for the name ([`ErrorKind::NoSpace`]);
    /// the backing file cannot be opened and its format is not given.
    pub fn run(self) -> Result<Chain> {
        let Asked { rebase: Rebase { opener, .. }, request } = &self.0;
        let chain = self.0.open(Access::ReadWrite)?;
        rebase(&chain, opener, request, &Progress::default()).map(|(chain, _)| chain)
    }
}
