//! The plan: which guest ranges need a look, found from metadata alone.
//!
//! A range needs a look where some view of the overlay falls through to the backing file, unless
//! the old and the new chain lead to the same bytes there. Reads no guest data.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use super::{Difference, Progress};
use crate::chain::{Chain, Source};
use crate::error::Result;
use crate::file::Place;
use crate::layer::{Detail, GuestOffset, Overlay};

/// A range of guest bytes: begins at a multiple of what the overlay fills as a whole and ends at
/// one.
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
#[derive(Clone)]
pub(super) struct Plan<'a> {
    overlay: &'a dyn Overlay,
    old: Sources<'a>,
    new: Sources<'a>,
    /// Where they differ at most, if that is known.
    difference: Option<&'a Difference>,
    progress: &'a Progress,
    /// Bytes that are looked at together where any of them needs a look.
    whole: u64,
    /// The longest piece in bytes, a multiple of `whole`.
    piece: u64,
    at: GuestOffset,
    /// Where the walk ends: at the end of the overlay, or between two pieces.
    end: GuestOffset,
    /// End of the run of missing bytes that `at` lies in.
    missing_end: GuestOffset,
    /// Missing bytes met so far that are equal by metadata.
    equal: u64,
    /// How many of these lie in the whole that `at` lies in.
    equal_here: u64,
}

impl<'a> Plan<'a> {
    /// A plan in pieces of at most `piece` bytes, or what is filled as a whole if that is more.
    pub fn new(
        overlay: &'a dyn Overlay,
        old: &'a Chain,
        new: &'a Chain,
        progress: &'a Progress,
        piece: u64,
    ) -> Self {
        Self {
            overlay,
            old: Sources::new(old, overlay.end()),
            new: Sources::new(new, overlay.end()),
            difference: None,
            progress,
            whole: overlay.whole(),
            piece: piece.next_multiple_of(overlay.whole()),
            at: GuestOffset(0),
            end: GuestOffset(overlay.end()),
            missing_end: GuestOffset(0),
            equal: 0,
            equal_here: 0,
        }
    }

    /// The plan when it is known already where the two chains differ at most.
    pub fn knowing(self, difference: Option<&'a Difference>) -> Self {
        Self { difference, ..self }
    }

    /// Walks to the end, in parts of `part` bytes (rounded up to pieces) by as many threads as there
    /// are processors: how much needs a look, and how much does not. Remembers so many ranges; what
    /// more there is, is found again when it is its turn.
    pub fn survey(self, remembered: usize, part: u64) -> Result<Survey<'a>> {
        let plans = self.split(part);
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(plans.len());
        let remembered = remembered / plans.len().max(1);
        let (size, todo) = (self.piece, Mutex::new(plans.into_iter().enumerate()));
        let found = Mutex::new(BTreeMap::new());
        let work = || {
            let next = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some((number, plan)) = next() {
                let part = plan.walk(remembered);
                found.lock().unwrap_or_else(PoisonError::into_inner).insert(number, part);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut survey = Survey { equal: 0, open: 0, pieces: Pieces { parts: VecDeque::new(), size } };
        for part in found.into_values() {
            let part = part?;
            survey.equal += part.equal;
            survey.open += part.open;
            survey.pieces.parts.push_back(part);
        }
        Ok(survey)
    }

    /// Plans for one part of the disk each, in order.
    fn split(&self, part: u64) -> Vec<Self> {
        let starts = (self.at.0..self.end.0).step_by(part.next_multiple_of(self.piece) as usize);
        let mut plans: Vec<Self> = Vec::new();
        for start in starts.map(GuestOffset) {
            if let Some(last) = plans.last_mut() {
                last.end = start;
            }
            plans.push(Self { at: start, missing_end: start, ..self.clone() });
        }
        plans
    }

    fn walk(mut self, remembered: usize) -> Result<Part<'a>> {
        let mut part = Part { equal: 0, open: 0, known: VecDeque::new(), rest: None };
        let end = self.overlay.end();
        loop {
            let before = self.clone();
            let Some(range) = self.next_piece()? else { break };
            part.open += range.end.0.min(end) - range.start.0;
            let is_full = part.known.len() == remembered;
            match part.known.back_mut() {
                _ if part.rest.is_some() => {}
                Some(last) if last.end == range.start => last.end = range.end,
                _ if is_full => part.rest = Some(before),
                _ => part.known.push_back(range),
            }
        }
        Ok(Part { equal: self.equal, ..part })
    }

    /// The next range that needs a look.
    pub fn next_piece(&mut self) -> Result<Option<Range>> {
        let whole = self.whole;
        let mut found: Option<Range> = None;
        while self.at < self.end {
            let limit = found.map_or(u64::MAX, |range| boundary_behind(range.start, self.piece));
            if self.at.0 >= limit {
                break;
            }
            // Metadata alone can be gigabytes.
            self.progress.stop_if_cancelled()?;
            let (verdict, length) = self.look()?;
            if verdict != Verdict::Open {
                self.pass(length, verdict == Verdict::Equal);
                continue;
            }
            // Where anything is open, all is looked at that is filled together with it.
            let start = GuestOffset(self.at.0 / whole * whole);
            let range = match found {
                None => Range { start, end: start },
                Some(range) if range.end >= start => range,
                Some(_) => break,
            };
            // What was equal before it there is looked at as well.
            self.equal -= std::mem::take(&mut self.equal_here);
            let end =
                (self.at.0 + length).next_multiple_of(whole).min(boundary_behind(range.start, self.piece));
            found = Some(Range { end: GuestOffset(end), ..range });
            self.at = GuestOffset(end);
        }
        Ok(found)
    }

    /// Goes on behind `length` bytes that need no look.
    fn pass(&mut self, length: u64, is_equal: bool) {
        let end = self.at + length;
        let start_of_whole = GuestOffset(end.0 / self.whole * self.whole);
        if start_of_whole > self.at {
            self.equal_here = 0;
        }
        if is_equal {
            self.equal += length;
            self.equal_here += end - start_of_whole.max(self.at);
        }
        self.at = end;
    }

    /// What metadata says of the bytes at `at`, and for how many of them.
    fn look(&mut self) -> Result<(Verdict, u64)> {
        if self.at >= self.missing_end {
            let run = self.overlay.missing_at(self.at, self.end - self.at)?;
            if !run.is_missing {
                return Ok((Verdict::Held, run.length));
            }
            self.missing_end = self.at + run.length;
        }
        let mut length = self.missing_end - self.at;
        if let Some(difference) = self.difference {
            let (may_differ, reach) = difference.at(self.at, length);
            if !may_differ {
                return Ok((Verdict::Equal, reach));
            }
            length = reach;
        }
        // The cheap question first: where it is answered, nobody asks the file system.
        for detail in [Detail::Owner, Detail::Holes] {
            let old = self.old.source(self.at, length, detail)?;
            let new = self.new.source(self.at, old.1, detail)?;
            length = new.1;
            if old.0 == new.0 {
                return Ok((Verdict::Equal, length));
            }
        }
        let (old, length) = self.old.shared_place(self.at, length)?;
        if old.is_none() {
            return Ok((Verdict::Open, length));
        }
        let (new, length) = self.new.shared_place(self.at, length)?;
        Ok((if old == new { Verdict::Equal } else { Verdict::Open }, length))
    }
}

/// What the first walk found, in bytes of guest address space that the overlay does not hold.
pub(super) struct Survey<'a> {
    /// Equal by metadata.
    pub equal: u64,
    /// Needs a look.
    pub open: u64,
    /// Where that is.
    pub pieces: Pieces<'a>,
}

/// What needs a look, handed out in pieces.
pub(super) struct Pieces<'a> {
    /// In order.
    parts: VecDeque<Part<'a>>,
    /// The longest piece in bytes.
    size: u64,
}

/// What needs a look in a part of the disk.
struct Part<'a> {
    /// Bytes that are equal by metadata.
    equal: u64,
    /// Bytes that need a look.
    open: u64,
    /// As far as it was remembered, neighbours joined.
    known: VecDeque<Range>,
    /// The walk to what was not.
    rest: Option<Plan<'a>>,
}

impl Pieces<'_> {
    /// The next one.
    pub fn next(&mut self) -> Result<Option<Range>> {
        while let Some(part) = self.parts.front_mut() {
            if let Some(piece) = part.next(self.size)? {
                return Ok(Some(piece));
            }
            self.parts.pop_front();
        }
        Ok(None)
    }
}

impl Part<'_> {
    fn next(&mut self, size: u64) -> Result<Option<Range>> {
        let Some(range) = self.known.front_mut() else {
            return self.rest.as_mut().map_or(Ok(None), Plan::next_piece);
        };
        let end = GuestOffset(boundary_behind(range.start, size).min(range.end.0));
        let piece = Range { end, ..*range };
        range.start = end;
        if range.start == range.end {
            self.known.pop_front();
        }
        Ok(Some(piece))
    }
}

/// Pieces end at multiples of their size, so that two of them seldom share a cluster.
fn boundary_behind(start: GuestOffset, piece: u64) -> u64 {
    (start.0 / piece + 1) * piece
}

/// Asks a chain where bytes come from, and remembers the last answers: they may reach far, and the
/// other chain may answer in small steps.
#[derive(Clone)]
struct Sources<'a> {
    chain: &'a Chain,
    /// The end of the overlay.
    end: GuestOffset,
    owner: Answer<Source>,
    holes: Answer<Source>,
    shared: Answer<Option<Place>>,
}

impl<'a> Sources<'a> {
    fn new(chain: &'a Chain, end: u64) -> Self {
        let (owner, shared) = (Answer::none(Source::Zero), Answer::none(None));
        Self { chain, end: GuestOffset(end), owner, holes: owner, shared }
    }

    fn source(&mut self, at: GuestOffset, length: u64, detail: Detail) -> Result<(Source, u64)> {
        let answer = match detail {
            Detail::Owner => &mut self.owner,
            Detail::Holes => &mut self.holes,
        };
        let ask = |reach| self.chain.source_at(at, reach, detail);
        let (source, skip, length) = answer.at(at, length, self.end, ask)?;
        Ok((source.advanced(skip), length))
    }

    fn shared_place(&mut self, at: GuestOffset, length: u64) -> Result<(Option<Place>, u64)> {
        let ask = |reach| self.chain.shared_place_at(at, reach);
        let (place, skip, length) = self.shared.at(at, length, self.end, ask)?;
        Ok((place.map(|place| place.advanced(skip)), length))
    }
}

/// What was answered for a range.
#[derive(Clone, Copy)]
struct Answer<T> {
    answer: T,
    start: GuestOffset,
    end: GuestOffset,
}

impl<T: Copy> Answer<T> {
    /// For no range at all.
    fn none(answer: T) -> Self {
        Self { answer, start: GuestOffset(0), end: GuestOffset(0) }
    }

    /// The answer that holds at `at`, how far behind its beginning that is, and for how many of
    /// `length` bytes it holds. Asks for all up to `end`: what it will be about next, too.
    fn at(
        &mut self,
        at: GuestOffset,
        length: u64,
        end: GuestOffset,
        ask: impl FnOnce(u64) -> Result<(T, u64)>,
    ) -> Result<(T, u64, u64)> {
        if at < self.start || at >= self.end {
            let (answer, length) = ask(end - at)?;
            *self = Self { answer, start: at, end: at + length };
        }
        Ok((self.answer, at - self.start, length.min(self.end - at)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::chain::Opener;
    use crate::file::{Access, LocalFile};
    use crate::layer::qcow2::Writer;
    use crate::layer::qcow2::create::{Spec, create};

    const CLUSTER: u64 = 64 << 10;

    /// The chain of a raw file with data in these clusters and holes elsewhere.
    fn raw(path: &Path, clusters: &[u64]) -> Chain {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(32 * CLUSTER).unwrap();
        for cluster in clusters {
            file.write_all_at(&vec![1; CLUSTER as usize], cluster * CLUSTER).unwrap();
        }
        Opener::new().chain(path, None, Access::ReadOnly).unwrap()
    }

    #[test]
    fn pieces_are_the_same_however_few_of_them_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let (path, progress) = (directory.path().join("cow"), Progress::default());
        let spec = Spec { size: 32 * CLUSTER, ..Spec::default() };
        create(&LocalFile::create(&path).unwrap(), None, &spec).unwrap();
        let image = Opener::new().layer(&path, None, Access::ReadWrite).unwrap();
        let overlay = Writer::open(image.as_qcow2().unwrap()).unwrap();
        let old = raw(&directory.path().join("old"), &[1, 2, 3, 4, 5, 9, 30, 31]);
        let new = raw(&directory.path().join("new"), &[4, 12, 13, 14, 16]);
        let bytes = |piece: Range| (piece.start.0 / CLUSTER, piece.end.0 / CLUSTER);
        // Clusters of data in both are open, too; a piece ends at a multiple of four clusters.
        let expected = vec![(1, 4), (4, 6), (9, 10), (12, 15), (16, 17), (30, 32)];
        let parts =
            [4, 8, 100].into_iter().flat_map(|part| [0, 1, 2, 3, 100].map(|remembered| (part, remembered)));
        for (part, remembered) in parts {
            let plan = Plan::new(&overlay, &old, &new, &progress, 4 * CLUSTER);
            let Survey { equal, open, mut pieces } = plan.survey(remembered, part * CLUSTER).unwrap();
            assert_eq!((equal, open), (20 * CLUSTER, 12 * CLUSTER));
            let found: Vec<_> = std::iter::from_fn(|| pieces.next().unwrap()).map(bytes).collect();
            assert_eq!(found, expected, "{remembered} remembered of parts of {part}");
        }
    }
}
