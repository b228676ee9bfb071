//! The plan: which guest ranges need a look, found from metadata alone.
//!
//! A range needs a look where some view of the overlay falls through to the backing file, unless
//! the old and the new chain lead to the same bytes there. Reads no guest data.

use crate::chain::{Chain, Source};
use crate::error::Result;
use crate::layer::{Detail, GuestOffset, Overlay};

/// A range of guest bytes: begins at a multiple of the overlay's unit and ends at one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub start: GuestOffset,
    pub end: GuestOffset,
}

impl Range {
    pub fn length(self) -> u64 {
        self.end - self.start
    }
}

/// What metadata says of a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The overlay holds them, in every view.
    Held,
    /// Old and new chain lead to the same bytes.
    Equal,
    /// Only a look can tell.
    Open,
}

/// Walks the disk once and says what needs a look, in pieces.
pub(super) struct Plan<'a> {
    overlay: &'a dyn Overlay,
    old: Sources<'a>,
    new: Sources<'a>,
    /// The longest piece in bytes, a multiple of the unit.
    piece: u64,
    at: GuestOffset,
    /// End of the run of missing bytes that `at` lies in.
    missing_end: GuestOffset,
    /// Missing bytes met so far that are equal by metadata.
    equal: u64,
}

impl<'a> Plan<'a> {
    /// A plan in pieces of at most `piece` bytes, or one unit if that is more.
    pub fn new(overlay: &'a dyn Overlay, old: &'a Chain, new: &'a Chain, piece: u64) -> Self {
        Self {
            overlay,
            old: Sources::new(old),
            new: Sources::new(new),
            piece: piece.next_multiple_of(overlay.unit()),
            at: GuestOffset(0),
            missing_end: GuestOffset(0),
            equal: 0,
        }
    }

    /// Walks to the end: how many missing bytes are equal by metadata, and how many bytes need a
    /// look.
    pub fn measure(mut self) -> Result<(u64, u64)> {
        let (mut open, end) = (0, self.overlay.end());
        while let Some(range) = self.next_piece()? {
            open += range.end.0.min(end) - range.start.0;
        }
        Ok((self.equal, open))
    }

    /// The next range that needs a look.
    pub fn next_piece(&mut self) -> Result<Option<Range>> {
        let unit = self.overlay.unit();
        let mut found: Option<Range> = None;
        while self.at.0 < self.overlay.end() {
            let limit = found.map_or(u64::MAX, |range| self.boundary_behind(range.start));
            if self.at.0 >= limit {
                break;
            }
            let (verdict, length) = self.look()?;
            if verdict != Verdict::Open {
                self.equal += if verdict == Verdict::Equal { length } else { 0 };
                self.at = self.at + length;
                continue;
            }
            // A unit in which anything is open is looked at as a whole.
            let start = GuestOffset(self.at.0 / unit * unit);
            let range = match found {
                None => Range { start, end: start },
                Some(range) if range.end >= start => range,
                Some(_) => break,
            };
            // What was equal before it in that unit is looked at as well.
            self.equal = self.equal.saturating_sub(self.at - range.end.max(start));
            let end = (self.at.0 + length).next_multiple_of(unit).min(self.boundary_behind(range.start));
            found = Some(Range { end: GuestOffset(end), ..range });
            self.at = GuestOffset(end);
        }
        Ok(found)
    }

    /// Pieces end at multiples of their size, so that two of them seldom share a cluster.
    fn boundary_behind(&self, start: GuestOffset) -> u64 {
        (start.0 / self.piece + 1) * self.piece
    }

    /// What metadata says of the bytes at `at`, and for how many of them.
    fn look(&mut self) -> Result<(Verdict, u64)> {
        if self.at >= self.missing_end {
            let rest = self.overlay.end() - self.at.0;
            let run = self.overlay.missing_at(self.at, rest)?;
            if !run.is_missing {
                return Ok((Verdict::Held, run.length));
            }
            self.missing_end = self.at + run.length;
        }
        let rest = self.missing_end - self.at;
        let (old, length) = self.old.at(self.at, rest)?;
        let (new, length) = self.new.at(self.at, length)?;
        Ok((if old == new { Verdict::Equal } else { Verdict::Open }, length))
    }
}

/// Asks a chain where bytes come from, and remembers the last answer: it may reach far, and the
/// other chain may answer in small steps.
struct Sources<'a> {
    chain: &'a Chain,
    source: Source,
    start: GuestOffset,
    end: GuestOffset,
}

impl<'a> Sources<'a> {
    fn new(chain: &'a Chain) -> Self {
        Self { chain, source: Source::Zero, start: GuestOffset(0), end: GuestOffset(0) }
    }

    fn at(&mut self, at: GuestOffset, length: u64) -> Result<(Source, u64)> {
        if at < self.start || at >= self.end {
            let (source, length) = self.chain.source_at(at, length, Detail::Holes)?;
            (self.source, self.start, self.end) = (source, at, at + length);
        }
        Ok((self.source.advanced(at - self.start), length.min(self.end - at)))
    }
}
