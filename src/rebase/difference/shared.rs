//! What several rebases know of the differences between their backing files, found by the first of
//! them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::layers::ChainKey;
use super::saved::{self, Saved};
use super::{Difference, find};
use crate::chain::{Chain, Watch, Way};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::Identity;
use crate::file::output::Output;
use crate::layer::{Detail, GuestOffset};
use crate::rebase::unchanged::{LEAVE_ALONE, MOST_ROUNDS, read_again};
use crate::rebase::{Phase, Progress};

/// Differences between chains, each found once for all who share this.
///
/// ```
/// use std::sync::Arc;
///
/// use rebasefs::rebase::Differences;
/// use rebasefs::{Progress, Rebase};
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
/// # let overlays = [place("a.qcow2"), place("b.qcow2")];
/// # for overlay in &overlays {
/// #     create(&LocalFile::create(overlay)?, None, &spec)?;
/// # }
/// let progress = Progress::default();
/// let differences = Arc::new(Differences::new(progress.companion()));
/// for overlay in &overlays {
///     // Only the first reads old and new backing file from end to end.
///     let done = Rebase::new(overlay).onto("new.img").sharing(&differences).run(&progress)?;
///     println!("{}: {} bytes copied", overlay.display(), done.report.copied);
/// #   assert_eq!((done.report.copied, done.report.compared), (512 << 10, 512 << 10));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Differences {
    /// By old and new chain.
    known: Mutex<HashMap<(ChainKey, ChainKey), SharedEntry>>,
    /// Stops finding them.
    stop: Progress,
    /// How far finding each has come.
    progress: Mutex<Vec<Arc<Progress>>>,
    /// What is not found but looked up, and in which file.
    loaded: Option<(PathBuf, Vec<Saved>)>,
    /// Where everything that is found is saved, and what was saved so far.
    saving: Option<(PathBuf, Mutex<Vec<Saved>>)>,
}

/// Locked while the difference is being found.
type SharedEntry = Arc<Mutex<Entry>>;

#[derive(Debug, Default)]
enum Entry {
    /// Nobody has asked.
    #[default]
    Unknown,
    Known(Known),
    /// It could not be found; whoever asks next would not fare better.
    Failed(ErrorKind, String),
}

/// A difference, as long as the files are what they were.
#[derive(Debug)]
struct Known {
    difference: Arc<Difference>,
    /// Kept open, so that the locks on them are kept.
    #[expect(dead_code, reason = "holds files and locks")]
    chains: [Chain; 2],
    watches: [Watch; 2],
}

impl Differences {
    /// Nothing known yet. `stop` stops finding them.
    pub fn new(stop: Progress) -> Self {
        Self { stop, ..Self::default() }
    }

    /// Knows what is in this file and nothing else: whatever is not there is refused.
    ///
    /// # Errors
    /// The file cannot be read, or was not written by [`saving_to`](Self::saving_to).
    pub fn load(self, path: &Path) -> Result<Self> {
        Ok(Self { loaded: Some((path.to_owned(), saved::load(path)?)), ..self })
    }

    /// Saves everything in this file, as soon as it is found. The file is there as a whole, or as it
    /// was before.
    #[must_use]
    pub fn saving_to(self, path: &Path) -> Self {
        Self { saving: Some((path.to_owned(), Mutex::default())), ..self }
    }

    /// Refuses to save over one of these files.
    pub(crate) fn refuse_saving_over(&self, in_play: impl Iterator<Item = Identity>) -> Result<()> {
        match &self.saving {
            None => Ok(()),
            Some((path, _)) => {
                Output::new(path, in_play).map(drop).doing(|| "saving the difference".to_owned())
            }
        }
    }

    /// Whether something was saved.
    pub(crate) fn are_saved(&self) -> bool {
        self.saving.as_ref().is_some_and(|(_, saved)| !lock(saved).is_empty())
    }

    /// Whether nothing is found here, but looked up in a file.
    pub(crate) fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    /// Whether they come from a file or go into one: then they are asked for even by one rebase alone.
    pub(crate) fn is_kept(&self) -> bool {
        self.loaded.is_some() || self.saving.is_some()
    }

    /// Bytes that were looked at to find them.
    pub(crate) fn done(&self) -> u64 {
        lock(&self.progress).iter().map(|progress| progress.done()).sum()
    }

    /// How many were found; one that is being found counts by how far that has come.
    pub(crate) fn found(&self) -> f64 {
        let is_over = |progress: &Progress| progress.phase() == Phase::Done;
        let found = |progress: &Progress| if is_over(progress) { 1.0 } else { progress.fraction() };
        lock(&self.progress).iter().map(|progress| found(progress)).sum()
    }

    /// Where `old` and `new` differ. The first who asks finds out, the others wait for it.
    ///
    /// # Errors
    /// One of the chains cannot be read, was written to since, or is not in the file that was loaded; or
    /// what was found cannot be saved.
    pub(crate) fn between(&self, old: &Chain, new: &Chain) -> Result<Arc<Difference>> {
        let keys = (ChainKey::of(old), ChainKey::of(new));
        // A chain that could not be opened has no layers either, and reads as no zeros.
        let broken = [old, new].into_iter().find(|chain| chain.broken_off().is_some());
        if let Some(chain) = broken {
            chain.extent_at(GuestOffset(0), 1, Detail::Owner)?;
        }
        if broken.is_none() && keys.0 == keys.1 {
            return Ok(Arc::default());
        }
        let entry = lock(&self.known).entry(keys).or_default().clone();
        let mut entry = lock(&entry);
        if let Entry::Known(known) = &*entry
            && known.is_touched()
        {
            known.still()?;
            *entry = Entry::Unknown;
        }
        if matches!(*entry, Entry::Unknown) {
            *entry = match self.find(old, new) {
                Ok(known) => Entry::Known(known),
                // Told in full to the first who asked.
                Err(error) => {
                    *entry = Entry::Failed(error.kind(), error.to_string());
                    return Err(error);
                }
            };
        }
        match &*entry {
            Entry::Known(known) => known.still(),
            Entry::Failed(kind, text) => Err(Error::new(*kind, text.clone())),
            Entry::Unknown => Err(Error::invalid("the difference was not found")),
        }
    }

    /// Closes the files of these chains, unless somebody else has them open. What was found is
    /// forgotten.
    pub(crate) fn close(&self, old: &ChainKey, new: &ChainKey) {
        lock(&self.known).remove(&(old.clone(), new.clone()));
    }

    fn find(&self, old: &Chain, new: &Chain) -> Result<Known> {
        let mut known = self.find_once(old, new)?;
        for _ in 1..MOST_ROUNDS {
            if !known.is_touched() {
                break;
            }
            known.still()?;
            // Tables that were read before may be others by now.
            known = self.find_once(&read_again(old)?, &read_again(new)?)?;
        }
        let difference = known.untouched()?;
        if let Some((path, all)) = &self.saving {
            let saved = Saved::new(old, new, &difference)?;
            known.untouched()?;
            let mut all = lock(all);
            all.push(saved);
            saved::save(path, &all, old.files().chain(new.files()).map(|file| file.identity()))?;
        }
        Ok(known)
    }

    fn find_once(&self, old: &Chain, new: &Chain) -> Result<Known> {
        let settled = |chain| Watch::settled(chain, || self.stop.stop_if_cancelled());
        let watches = [settled(old)?, settled(new)?];
        let difference = match &self.loaded {
            Some((path, saved)) => saved::choose(path, saved, old, new)?,
            None => {
                let progress = Arc::new(self.stop.companion());
                lock(&self.progress).push(progress.clone());
                let found = find::find(old, new, &progress)?;
                progress.enter(Phase::Done);
                found
            }
        };
        Ok(Known { difference: difference.into(), chains: [old.clone(), new.clone()], watches })
    }
}

impl Known {
    /// The difference, if no file has been written to since.
    fn still(&self) -> Result<Arc<Difference>> {
        match self.watches.iter().flat_map(Watch::changes).find(|change| change.way == Way::Written) {
            None => Ok(self.difference.clone()),
            Some(change) => Err(written(&change.path)),
        }
    }

    /// The difference, if no file has been changed in any way.
    fn untouched(&self) -> Result<Arc<Difference>> {
        let difference = self.still()?;
        match self.is_touched() {
            false => Ok(difference),
            true => {
                let change = self.watches.iter().flat_map(Watch::changes).next();
                Err(written(change.as_ref().map_or(Path::new("a backing file"), |change| &change.path)))
            }
        }
    }

    fn is_touched(&self) -> bool {
        self.watches.iter().any(Watch::is_touched)
    }
}

fn written(path: &Path) -> Error {
    let what = "was written to while overlays were being moved from or onto it";
    Error::new(ErrorKind::Busy, what).path(path).hint(LEAVE_ALONE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    /// Chains of one raw file each, a MiB long, in which one byte differs.
    fn two(directory: &Path) -> [Chain; 2] {
        let mut bytes = vec![0x11; 1 << 20];
        ["old", "new"].map(|name| {
            let path = directory.join(name);
            std::fs::write(&path, &bytes).unwrap();
            bytes[70_000] = 0x22;
            Opener::new().chain(&path, None, Access::ReadOnly).unwrap()
        })
    }

    #[test]
    fn it_is_found_once_for_all_and_again_when_it_was_closed() {
        let directory = tempfile::tempdir().unwrap();
        let [old, new] = two(directory.path());
        let differences = Differences::default();
        let bytes = || differences.between(&old, &new).unwrap().bytes();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_eq!(bytes(), 4096));
            }
        });
        assert_eq!((differences.done(), differences.found()), (1 << 20, 1.0));
        differences.close(&ChainKey::of(&old), &ChainKey::of(&new));
        bytes();
        assert_eq!(differences.done(), 2 << 20);
        // Nothing differs from itself, and nobody looks.
        assert_eq!(differences.between(&old, &old).unwrap().bytes(), 0);
        assert_eq!(differences.done(), 2 << 20);
    }

    #[test]
    fn it_holds_only_as_long_as_nobody_writes_to_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let [old, new] = two(directory.path());
        let differences = Differences::default();
        differences.between(&old, &new).unwrap();
        let file = std::fs::File::options().append(true).open(directory.path().join("new")).unwrap();
        file.set_len((1 << 20) + 512).unwrap();
        let error = differences.between(&old, &new).unwrap_err();
        assert_eq!((error.kind(), error.file()), (ErrorKind::Busy, Some(&*directory.path().join("new"))));
    }

    #[test]
    fn a_chain_that_could_not_be_opened_is_not_equal_to_none() {
        let broken = Chain::unopened(&Error::new(ErrorKind::NotFound, "gone"));
        let error = Differences::default().between(&broken, &broken).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        Differences::default().between(&broken, &Chain::default()).unwrap_err();
    }

    #[test]
    fn what_cannot_be_found_is_not_looked_for_by_everybody() {
        let directory = tempfile::tempdir().unwrap();
        let [old, new] = two(directory.path());
        let differences = Differences::default();
        let file = std::fs::File::options().write(true).open(directory.path().join("new")).unwrap();
        file.set_len(4096).unwrap();
        let first = differences.between(&old, &new).unwrap_err();
        file.set_len(1 << 20).unwrap();
        let second = differences.between(&old, &new).unwrap_err();
        assert!(first.to_string().contains("cut short"), "{first}");
        assert_eq!((first.kind(), first.to_string()), (second.kind(), second.to_string()));
    }
}
