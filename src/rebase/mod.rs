//! The rebase engine: another backing file for an overlay, and every guest-visible byte as it was.
//!
//! The only place that lists the phases and the durability barriers between them:
//!
//! ```text
//! open ─ plan ─ compare + copy ─ barrier ─ [verify] ─ swap (its own barrier) ─ reopen
//!      ─ [reclaim: forget ─ barrier ─ no old reader left ─ free]
//! ```
//!
//! Knows layers and chains; knows nothing of command lines and mounts. May be stopped anywhere:
//! what was copied is the overlay's own by then, and the next rebase finds it there.

mod builder;
mod compare;
mod copy;
mod difference;
mod figures;
mod many;
mod open_for_writing;
mod options;
mod plan;
mod progress;
mod reclaim;
mod rehearse;
mod standing;
mod target;
mod unchanged;
mod verify;
mod watched;

use std::path::Path;
use std::sync::Arc;

pub use builder::{Rebase, SafeRebase, UnsafeRebase};
pub use difference::Differences;
pub use progress::{Phase, Progress};
pub use rehearse::{Copied, Rehearsal};
pub use standing::Standing;

use difference::ChainKey;
pub(crate) use difference::{Difference, look};
pub(crate) use many::{Many, Together};
pub(crate) use open_for_writing::{Below, ForWriting};
pub(crate) use options::Options;
pub(crate) use reclaim::reclaim;
pub(crate) use rehearse::rehearse;
use target::Target;
pub(crate) use target::UNVERIFIED;
use unchanged::Bases;
pub(crate) use watched::watched;

use crate::chain::{Chain, Opener};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::Access;
use crate::layer::qcow2::{Qcow2, Writer};
use crate::layer::{Format, Layer, Overlay, Reference};

/// Whether the guest-visible bytes are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Old and new backing file are compared, what differs is copied.
    #[default]
    Safe,
    /// Only the reference changes (`qemu-img rebase -u`): for a backing file that was moved or
    /// renamed.
    Unsafe,
}

/// What is asked for: by default, to flatten safely.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// The new backing file; `None` flattens. A missing format is recognised and recorded.
    pub backing: Option<Reference>,
    /// Safe or not.
    pub mode: Mode,
    /// Whether to compare all that the image will read as with what it reads as now, before the
    /// swap.
    pub verify: bool,
    /// Whether [`reclaim`] is going to follow: its work is part of the progress then.
    pub reclaim: bool,
    /// Whether what is copied as data is stored as compressed clusters, as far as it shrinks.
    pub compress: bool,
    /// Where backing files differ, found once for several rebases; `None` finds it out for this one.
    pub differences: Option<Arc<Differences>>,
}

impl Request {
    /// Opens the image at `path` with what the request needs to know of those below it.
    pub(crate) fn open(
        &self,
        opener: &Opener,
        path: &Path,
        format: Option<Format>,
        access: Access,
    ) -> Result<Chain> {
        match self.mode {
            Mode::Safe => opener.chain(path, format, access),
            Mode::Unsafe => Ok(Chain::new([opener.layer(path, format, access)?])),
        }
    }

    /// Where two chains differ, as far as others have found out or will ask again.
    fn difference(&self, old: &Chain, new: &Chain) -> Result<Option<Arc<Difference>>> {
        let shared = self.differences.as_ref().map(|shared| shared.between(old, new)).transpose();
        shared.doing(|| "finding out where old and new backing file differ".to_owned())
    }
}

/// What a rebase did, in bytes of guest address space. Of these, `missing` is `equal` and `compared`,
/// and no more than `compared` was copied or zeroed, in whole clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What the overlay did not hold.
    pub missing: u64,
    /// Of that: equal by metadata or known to be equal, not read.
    pub equal: u64,
    /// Of that: read and compared.
    pub compared: u64,
    /// Copied into the overlay as data.
    pub copied: u64,
    /// Stored in the overlay as zero clusters.
    pub zeroed: u64,
    /// Dropped from the overlay afterwards, see [`SafeRebase::reclaim`].
    pub reclaimed: u64,
}

/// What came of a rebase.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Rebased {
    /// The image on its new backing file, open for writing and under a read lock as long as the chain is
    /// kept.
    pub chain: Chain,
    /// What was done.
    pub report: Report,
}

/// Rebases a chain that nobody else reads, and reclaims if that is asked for.
pub(crate) fn rebase_alone(
    chain: &Chain,
    opener: &Opener,
    request: &Request,
    progress: &Progress,
) -> Result<Rebased> {
    let (mut chain, mut report) = rebase(chain, opener, request, progress)?;
    if request.reclaim {
        let mut fresh = None;
        let publish = |chain| {
            fresh = Some(chain);
            Ok(())
        };
        let reclaimed = reclaim(&chain, opener, progress, publish);
        report.reclaimed = reclaimed.doing(|| "reclaiming space after the rebase".to_owned())?;
        chain = fresh.unwrap_or(chain);
    }
    Ok(Rebased { chain, report })
}

/// Rebases the overlay on top of `chain` (opened for writing) and returns the chain as it is
/// afterwards, with a fresh top layer. In [`Mode::Unsafe`] both chains may be the top alone.
/// A guest may go on writing to a top that is [`Live`](crate::layer::qcow2::Live): what it has written
/// is its own, whichever came first.
/// An image that was not closed properly is repaired first.
/// On an error the image is what it was, apart from clusters that it holds by itself now.
pub(crate) fn rebase(
    chain: &Chain,
    opener: &Opener,
    request: &Request,
    progress: &Progress,
) -> Result<(Chain, Report)> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image to rebase"))?;
    overlay_of(top)?;
    progress.enter(Phase::Plan);
    let open_target = |opener: &Opener| Target::open(top, opener, request);
    // Under its lock no file of it can change, and its errors are clearer while the overlay is not locked.
    let target = opener.takes_locks().then(|| open_target(opener)).transpose()?;
    let below = if request.mode == Mode::Safe { Below::Matters } else { Below::Ignored };
    let mut own = ForWriting::open(chain, opener, below)?;
    let target = target.map_or_else(|| open_target(&opener.renewed()), Ok)?;
    let mut writer = writer_of(top, &own.image, request)?;
    writer.check_backing(target.backing.as_ref())?;
    let (report, below) = match request.mode {
        Mode::Safe => {
            if own.image.is_dirty() {
                own = own.recovered()?;
                writer = writer_of(top, &own.image, request)?;
            }
            writer.check_tables()?;
            let ForWriting { image, below: old, .. } = &own;
            compare_and_copy((&*writer, image), (old, &target.chain), request, progress)?
        }
        Mode::Unsafe => (Report::default(), target.chain.clone()),
    };
    target.refuse_led_elsewhere(top)?;
    progress.enter(Phase::Swap);
    writer.set_backing(target.backing.as_ref())?;
    progress.enter(if request.reclaim { Phase::Reclaim } else { Phase::Done });
    Ok((below.under(reopened(top, &own.image)?), report))
}

/// Lets the overlay hold what differs. The files below are at the end what they were when they were compared:
/// where a change time has moved and no modification time, all is read and compared again. Returns the new
/// chain as it was read last.
fn compare_and_copy(
    (writer, image): (&Writer, &Qcow2),
    (old, new): (&Chain, &Chain),
    request: &Request,
    progress: &Progress,
) -> Result<(Report, Chain)> {
    let mut later = Later::of(request, image)?;
    let (mut old, mut new) = (old.clone(), new.clone());
    let mut sum: Option<Report> = None;
    for is_last in (1..unchanged::MOST_ROUNDS).map(|_| false).chain([true]) {
        let bases = Bases::new(&old, &new, progress)?;
        let report = compare_once((writer, image), (&old, &new), later, request, progress)?;
        let sum = sum.get_or_insert(Report { copied: 0, zeroed: 0, ..report });
        sum.copied += report.copied;
        sum.zeroed += report.zeroed;
        if is_last {
            bases.refuse_touched()?;
        }
        if !bases.are_touched()? {
            return Ok((*sum, new));
        }
        log::info!("the change time of a backing file has moved: all is compared again");
        // Tables that were read before may be others by now.
        (old, new) = (unchanged::read_again(&old)?, unchanged::read_again(&new)?);
        later.held = None;
    }
    Err(Error::new(ErrorKind::Busy, "a backing file changes all the while").hint(unchanged::LEAVE_ALONE))
}

fn compare_once(
    (writer, image): (&Writer, &Qcow2),
    chains: (&Chain, &Chain),
    later: Later,
    request: &Request,
    progress: &Progress,
) -> Result<Report> {
    let known = request.difference(chains.0, chains.1)?;
    let report = copy::copy_differences(writer, chains, known.as_deref(), progress, later)?;
    if request.verify {
        progress.enter(Phase::Verify);
        verify::verify(image, chains, report.compared, progress).doing(|| "verifying".to_owned())?;
    }
    Ok(report)
}

/// What is going to be looked at after all that needs a look has been compared.
#[derive(Clone, Copy, Debug, Default)]
struct Later {
    /// In so many views, all of it again.
    views: u64,
    /// Beside what is copied, so many bytes that the overlay holds; `None` if it is not looked at.
    held: Option<u64>,
}

impl Later {
    fn of(request: &Request, image: &Qcow2) -> Result<Self> {
        let views = if request.verify { 1 + image.snapshots()?.len() as u64 } else { 0 };
        let held = request.reclaim.then(|| reclaim::held_bytes(image)).transpose()?;
        Ok(Self { views, held })
    }

    /// In bytes, if so many need a look.
    fn bytes(self, open: u64) -> u64 {
        let reclaim = self.held.map_or(0, |held| held.saturating_add(open));
        open.saturating_mul(self.views).saturating_add(reclaim)
    }
}

/// Writes the image as the request wants it: for a guest's disk, he who writes for the guest.
fn writer_of(top: &Arc<dyn Layer>, image: &Qcow2, request: &Request) -> Result<Arc<Writer>> {
    let writer = match top.as_live() {
        Some(_) if request.verify => {
            let what = "--verify compares with what the image read as before, and a guest is writing to it";
            return Err(Error::unsupported(what).hint("leave out `--verify`, or mount it without `--rw`"));
        }
        Some(live) => live.writer().clone(),
        None => Arc::new(Writer::open(image)?),
    };
    writer.compress(request.compress)?;
    Ok(writer)
}

/// The top with its header and its tables as they are now.
fn reopened(top: &Arc<dyn Layer>, image: &Qcow2) -> Result<Arc<dyn Layer>> {
    match top.as_live() {
        Some(live) => Ok(Arc::new(live.reopen()?)),
        None => Ok(Arc::new(image.reopen()?)),
    }
}

fn overlay_of(top: &Arc<dyn Layer>) -> Result<&Qcow2> {
    match top.file().access() {
        Access::ReadWrite => qcow2_of(top),
        Access::ReadOnly => {
            let what = "was opened for reading only and cannot be rebased";
            Err(Error::new(ErrorKind::ReadOnly, what).path(top.file().path()))
        }
    }
}

fn qcow2_of(top: &Arc<dyn Layer>) -> Result<&Qcow2> {
    top.as_qcow2().ok_or_else(|| {
        let what =
            format!("a {} image has no backing file to change; only qcow2 can be rebased", top.format());
        let hint = "put one on it that has: `rebasefs create -f qcow2 -b IMAGE NEW`";
        Error::unsupported(what).path(top.file().path()).hint(hint)
    })
}
