//! A look before one rebases: where a would-be backing file shows other bytes than the present one,
//! whatever the overlay holds.

use super::super::unchanged::Bases;
use super::super::{Progress, Request, Target, qcow2_of};
use super::{Difference, find};
use crate::chain::{Chain, Opener};
use crate::error::{Error, Result};

/// Where what the overlay on top of `chain` stands on and what it is asked to stand on differ. Writes
/// nothing; refuses what could not be its backing file.
pub(crate) fn look(
    chain: &Chain,
    opener: &Opener,
    request: &Request,
    progress: &Progress,
) -> Result<Difference> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image that stands on anything"))?;
    qcow2_of(top)?;
    let new = Target::open(top, opener, request)?.chain;
    let old = chain.below(0);
    let bases = Bases::new(&old, &new, progress)?;
    let found = find::find(&old, &new, progress)?;
    bases.refuse_touched()?;
    Ok(found)
}
