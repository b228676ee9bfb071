//! A look at all overlays before anything is written: which of them move together, and what is
//! refused.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Many, Move};
use crate::chain::{Chain, Opener};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, Identity};
use crate::rebase::{ChainKey, Mode, Progress};

/// What a look at the overlays found.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    /// Overlays that can be rebased, by their place in the list; those with the same move together.
    pub(super) moves: Vec<(usize, Arc<Move>)>,
    /// Those that cannot.
    pub(super) failed: Vec<(usize, Error)>,
}

/// An overlay that is being looked at.
struct Opened {
    /// Its external data file.
    data_file: Option<Identity>,
    /// The chains that it moves from and to. Where only the reference is going to change, one that
    /// cannot be opened has no layers.
    chains: [Chain; 2],
}

impl Many {
    /// Looks at all overlays. Writes nothing.
    ///
    /// # Errors
    /// An overlay is given twice, or one stands on another, or the difference that was loaded does
    /// not fit their backing files, or somebody wants to stop. What is wrong with one overlay alone is
    /// said when it is its turn.
    pub fn look(&self, opener: &Opener, progress: &Progress) -> Result<Looked> {
        let mut places = self.refuse_twice()?;
        let (looked, data_files) = self.look_at_each(opener, progress)?;
        places.extend(data_files);
        self.refuse_standing_on_each_other(&looked, &places)?;
        self.refuse_unknown_differences(&looked, opener)?;
        if let Some(differences) = &self.request.differences {
            let chains =
                looked.moves.iter().flat_map(|(_, its_move)| its_move.0.files().chain(its_move.1.files()));
            differences.refuse_saving_over(chains.chain(places.into_keys()))?;
        }
        Ok(looked)
    }

    /// The places of the overlays in the list, by what they are.
    fn refuse_twice(&self) -> Result<HashMap<Identity, usize>> {
        let mut places = HashMap::new();
        for (place, path) in self.overlays.iter().enumerate() {
            // What cannot be found has its own error later.
            let Ok(identity) = Identity::of(path) else { continue };
            match places.entry(identity) {
                Entry::Vacant(entry) => {
                    entry.insert(place);
                }
                Entry::Occupied(entry) => {
                    let (first, again) = (self.overlays[*entry.get()].display(), path.display());
                    let what = match self.overlays[*entry.get()] == *path {
                        true => format!("{first} is given twice"),
                        false => format!("{first} and {again} are the same file"),
                    };
                    return Err(Error::invalid(what).hint("nothing was written; give each overlay once"));
                }
            }
        }
        Ok(places)
    }

    /// Also the places of the overlays by their external data files, which are written to as well.
    fn look_at_each(&self, opener: &Opener, progress: &Progress) -> Result<(Looked, Vec<(Identity, usize)>)> {
        let found: Mutex<Vec<(usize, Result<Move>)>> = Mutex::default();
        let data_files: Mutex<Vec<(Identity, usize)>> = Mutex::default();
        // Siblings follow each other: what they share is not opened for each of them again.
        let last: Mutex<[Chain; 2]> = Mutex::default();
        self.in_parallel(self.overlays.len(), |place| {
            let opened = progress.stop_if_cancelled().and_then(|()| self.open(place, opener));
            let keys = opened.map(|Opened { data_file, chains }| {
                let [old, new] = &chains;
                let keys = (ChainKey::of(old), ChainKey::of(new));
                *last.lock().unwrap_or_else(PoisonError::into_inner) = chains;
                let mut data_files = data_files.lock().unwrap_or_else(PoisonError::into_inner);
                data_files.extend(data_file.map(|file| (file, place)));
                keys
            });
            found.lock().unwrap_or_else(PoisonError::into_inner).push((place, keys));
        });
        progress.stop_if_cancelled()?;
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.sort_by_key(|(place, _)| *place);
        Ok((Looked::new(found), data_files.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    fn open(&self, place: usize, opener: &Opener) -> Result<Opened> {
        let path = &self.overlays[place];
        let whole = opener.chain(path, self.format, Access::ReadOnly);
        let backing = self.request.backing.as_ref();
        let new = match whole.as_ref().ok().and_then(Chain::top) {
            Some(top) => opener.chain_below(&**top.file(), backing),
            None => opener.backing_chain(path, backing),
        };
        let (whole, new) = match self.request.mode {
            Mode::Safe => (whole?, new?),
            Mode::Unsafe => (whole.unwrap_or_default(), new.unwrap_or_default()),
        };
        let own = whole.top().map(|top| (top.file().identity(), top.data_file().identity()));
        let data_file = own.filter(|(file, data_file)| file != data_file).map(|(_, data_file)| data_file);
        Ok(Opened { data_file, chains: [whole.below(0), new] })
    }

    /// An overlay below another one of the list would change while that is being rebased.
    fn refuse_standing_on_each_other(
        &self,
        looked: &Looked,
        places: &HashMap<Identity, usize>,
    ) -> Result<()> {
        if self.request.mode == Mode::Unsafe {
            // Nothing is read: each is refused only if it would stand on itself, when it is its turn.
            return Ok(());
        }
        for (place, (old, new)) in looked.first_of_each_move() {
            for (key, what) in [(old, "stands on"), (new, "would stand on")] {
                let Some(below) = key.files().find_map(|file| places.get(&file)) else { continue };
                let (above, below) = (self.overlays[place].display(), self.overlays[*below].display());
                let what = format!("{above} {what} {below}, which is in the list as well");
                let hint = "nothing was written; rebase them one after the other";
                return Err(Error::new(ErrorKind::Loop, what).hint(hint));
            }
        }
        Ok(())
    }

    /// A difference that was loaded must be one between the files that are there.
    fn refuse_unknown_differences(&self, looked: &Looked, opener: &Opener) -> Result<()> {
        let loaded = self.request.differences.as_ref().filter(|differences| differences.is_loaded());
        let Some(differences) = loaded.filter(|_| self.request.mode == Mode::Safe) else { return Ok(()) };
        for (place, _) in looked.first_of_each_move() {
            let [old, new] = self.open(place, opener)?.chains;
            let doing = || format!("looking at {}; nothing was written", self.overlays[place].display());
            differences.between(&old, &new).doing(doing)?;
        }
        Ok(())
    }
}

impl Looked {
    fn new(found: Vec<(usize, Result<Move>)>) -> Self {
        let mut looked = Self::default();
        let mut first: HashMap<Arc<Move>, usize> = HashMap::new();
        for (place, found) in found {
            match found {
                Ok(found) => {
                    let found = Arc::new(found);
                    let its_move = first.get_key_value(&found).map_or(&found, |(same, _)| same).clone();
                    first.entry(its_move.clone()).or_insert(place);
                    looked.moves.push((place, its_move));
                }
                Err(error) => looked.failed.push((place, error)),
            }
        }
        looked.moves.sort_by_key(|(place, its_move)| (first.get(its_move).copied(), *place));
        looked
    }

    /// Each move once, with the first overlay that makes it.
    fn first_of_each_move(&self) -> impl Iterator<Item = (usize, &Move)> {
        let groups = self.moves.chunk_by(|(_, one), (_, next)| one == next);
        groups.filter_map(|group| group.first()).map(|(place, its_move)| (*place, &**its_move))
    }
}
