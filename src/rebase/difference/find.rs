//! Finding a difference: the plan, the workers and the comparison of a rebase, for an overlay that
//! holds nothing and only takes notes.

use std::sync::{Mutex, PoisonError};

use super::super::{Later, Progress, copy};
use super::{Difference, Gathered, MAX_RANGES};
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::layer::{Content, Filled, GuestOffset, Missing, Overlay, Reference};

/// Bytes that are compared as one: no smaller than what most file systems store.
pub(super) const UNIT: u64 = 4096;

/// Finds out where `old` and `new` differ.
pub(super) fn find(old: &Chain, new: &Chain, progress: &Progress) -> Result<Difference> {
    let end = old.virtual_size().max(new.virtual_size());
    let notes = Notes { end, found: Mutex::new(Gathered::new(MAX_RANGES)) };
    copy::copy_differences(&notes, (old, new), None, progress, Later::default())?;
    Ok(notes.found.into_inner().unwrap_or_else(PoisonError::into_inner).finish())
}

/// An overlay of the longer chain's size that holds nothing.
struct Notes {
    end: u64,
    found: Mutex<Gathered>,
}

fn no_file() -> Error {
    Error::invalid("a comparison of two chains writes nothing")
}

impl Overlay for Notes {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn whole(&self) -> u64 {
        UNIT
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn check_tables(&self) -> Result<()> {
        Ok(())
    }

    fn missing_at(&self, _: GuestOffset, length: u64) -> Result<Missing> {
        Ok(Missing { is_missing: true, length })
    }

    fn has_zero_clusters(&self) -> bool {
        true
    }

    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<Filled> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.add(at.0, at.0 + content.length());
        Ok(Filled::default())
    }

    fn forget(&self, _: GuestOffset, _: u64) -> Result<u64> {
        Err(no_file())
    }

    fn free_forgotten(&self) -> Result<()> {
        Err(no_file())
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn check_backing(&self, _: Option<&Reference>) -> Result<()> {
        Err(no_file())
    }

    fn set_backing(&self, _: Option<&Reference>) -> Result<()> {
        Err(no_file())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    fn raw(path: &Path, bytes: &[u8]) -> Chain {
        std::fs::write(path, bytes).unwrap();
        Opener::new().chain(path, None, Access::ReadOnly).unwrap()
    }

    #[test]
    fn every_unit_that_differs_is_found_and_no_other_whichever_chain_is_longer() {
        let directory = tempfile::tempdir().unwrap();
        const UNIT_BYTES: usize = UNIT as usize;
        let old = vec![0x11; 300 * UNIT_BYTES];
        // Longer, with zeros and one byte behind the end of the other one; it ends within a unit.
        let mut new = [old.clone(), vec![0; 9 * UNIT_BYTES + 512]].concat();
        for at in
            [0, 5 * UNIT_BYTES - 1, 5 * UNIT_BYTES, 64 * UNIT_BYTES - 1, 64 * UNIT_BYTES, 303 * UNIT_BYTES]
        {
            new[at] = 0x99;
        }
        let chains = [raw(&directory.path().join("old"), &old), raw(&directory.path().join("new"), &new)];
        let units = [(0, 1), (4, 6), (63, 65), (303, 304)].map(|(start, end)| (start * UNIT, end * UNIT));
        for (one, other) in [(0, 1), (1, 0)] {
            let found = find(&chains[one], &chains[other], &Progress::default()).unwrap();
            assert_eq!(found.ranges, units);
        }
    }
}
