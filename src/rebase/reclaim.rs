//! Reclaim: what the overlay holds although its backing file has the same bytes is dropped, and
//! punched out of the file. The overlay grows with every rebase; this is how it shrinks again.

use std::sync::Arc;

use super::progress::Part;
use super::unchanged::Bases;
use super::{Below, ForWriting, Phase, Progress, Request, reopened, writer_of};
use crate::chain::{Chain, Opener, Source};
use crate::error::{Context, Error, Result};
use crate::file::AlignedBuffer;
use crate::layer::qcow2::Qcow2;
use crate::layer::{Detail, GuestOffset, Layer, Overlay};

/// Bytes that are compared at once, or one unit if that is more.
const PIECE: u64 = 256 << 10;

/// Drops what the overlay on top of `chain` (opened for writing) holds for nothing; what a
/// snapshot shares stays. Returns how many guest bytes were dropped.
///
/// `publish` is called once with the same chain and fresh tables, when the old ones lead to clusters
/// that are about to be freed: it returns when nobody reads `chain` any more (invariant I4), or an
/// error if it cannot wait for that. Then they are not freed, but leaked.
pub(crate) fn reclaim(
    chain: &Chain,
    opener: &Opener,
    progress: &Progress,
    publish: impl FnOnce(Chain) -> Result<()>,
) -> Result<u64> {
    let top = chain.top().ok_or_else(|| Error::invalid("there is no image to reclaim space from"))?;
    let own = ForWriting::open(chain, opener, Below::Matters)?;
    let below = &own.below;
    let writer = writer_of(top, &own.image, &Request::default())?;
    let _still = top.as_live().is_some().then(|| writer.hold_off_guests());
    if top.as_live().is_some() {
        // A guest waits with its writes: what it sees is in the file.
        writer.commit()?;
    }
    let image = own.image.reopen()?;
    writer.check_tables()?;
    progress.enter(Phase::Reclaim);
    let bases = Bases::new(below, below, progress)?;
    let top_alone = Chain::new([Arc::new(image.clone()) as Arc<dyn Layer>]);
    let held = held_bytes(&image)?;
    if progress.left() == 0 {
        // It was not announced with the rebase.
        progress.add_total(held);
    }
    let mut part = progress.part(progress.left(), held);
    let dropped = Walk { overlay: &*writer, own: &top_alone, below, progress }.drop_equal(&mut part);
    bases.refuse_touched()?;
    // What was dropped before an error is dropped all the same.
    writer.commit()?;
    publish(below.under(reopened(top, &image)?))?;
    writer.free_forgotten().doing(|| "freeing clusters".to_owned())?;
    if dropped.is_ok() {
        part.finish();
        progress.enter(Phase::Done);
    }
    dropped
}

/// Bytes that the active disk of an overlay holds itself.
pub(super) fn held_bytes(image: &Qcow2) -> Result<u64> {
    let own = Chain::new([Arc::new(image.clone()) as Arc<dyn Layer>]);
    own.extents(.., Detail::Owner)
        .map(|run| run.map(|(_, owned)| owned.depth.map_or(0, |_| owned.extent.length)))
        .sum()
}

struct Walk<'a> {
    overlay: &'a dyn Overlay,
    /// The overlay alone.
    own: &'a Chain,
    below: &'a Chain,
    progress: &'a Progress,
}

impl Walk<'_> {
    fn drop_equal(&self, part: &mut Part<'_>) -> Result<u64> {
        let size = self.own.virtual_size();
        let mut buffers = Default::default();
        let (mut at, mut dropped) = (GuestOffset(0), 0);
        while at.0 < size {
            self.progress.stop_if_cancelled()?;
            let held = self.own.extent_at(at, size - at.0, Detail::Owner)?;
            let mut length = held.extent.length;
            if held.depth.is_some() {
                let (done, here) = self.look_at(at, length, &mut buffers)?;
                (length, dropped) = (done, dropped + here);
                part.advance(done);
            }
            at = at + length;
        }
        Ok(dropped)
    }

    /// Looks at the first bytes of what the overlay holds from `at` on: at how many, and how many
    /// of them were dropped.
    fn look_at(
        &self,
        at: GuestOffset,
        length: u64,
        buffers: &mut (AlignedBuffer, AlignedBuffer),
    ) -> Result<(u64, u64)> {
        let (own, reach) = self.own.source_at(at, length, Detail::Holes)?;
        let (below, reach) = self.below.source_at(at, reach, Detail::Holes)?;
        let unit = self.overlay.unit();
        if own == Source::Zero && below == Source::Zero {
            // Whole units; the last one of the disk counts as whole.
            let is_end = at.0 + reach >= self.own.virtual_size();
            let whole = if is_end { reach.next_multiple_of(unit) } else { reach / unit * unit };
            if whole > 0 {
                return Ok((whole, self.overlay.forget(at, whole)?));
            }
        }
        let length = length.min(PIECE.next_multiple_of(unit));
        let (own, below) = (buffers.0.of_length(length as usize), buffers.1.of_length(length as usize));
        self.own.read_at(at, own)?;
        self.below.read_at(at, below)?;
        let mut dropped = 0;
        for (first, count) in equal_runs(own, below, unit as usize) {
            dropped += self.overlay.forget(at + first * unit, count * unit)?;
        }
        Ok((length.next_multiple_of(unit), dropped))
    }
}

/// The runs of units in which two buffers are equal: first unit and count.
fn equal_runs(own: &[u8], below: &[u8], unit: usize) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let units = (0..).zip(own.chunks(unit).zip(below.chunks(unit)));
    for (number, _) in units.filter(|(_, (own, below))| own == below) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}
