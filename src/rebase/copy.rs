//! Comparing and copying: workers take pieces of the plan, read both chains, and fill the overlay
//! with what differs.
//!
//! Workers own disjoint ranges; the overlay orders its metadata by itself. What was filled is made
//! durable at the end, also when the rebase is stopped or fails: the next one finds it there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::compare::differences;
use super::plan::{Pieces, Plan, Range, Survey};
use super::{Difference, Later, Phase, Progress, Report};
use crate::chain::{Chain, Owned, Payloads};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::AlignedBuffer;
use crate::layer::{Content, Detail, ExtentKind, GuestOffset, Overlay};

/// Bytes that a worker compares at once, or what is filled as a whole if that is more.
const PIECE: u64 = 256 << 10;
/// Ranges of the plan that are kept in memory, in a mebibyte.
const MAX_REMEMBERED: usize = 64 << 10;
/// The plan is made in so many parts at most, and in none that is smaller than so many bytes.
const MAX_PARTS: u64 = 64;
const LEAST_PART: u64 = 64 << 20;
/// More workers than this fight for memory bandwidth only, and each has two buffers.
const MAX_WORKERS: usize = 8;

/// Lets the overlay hold, durably, all in which the `old` and the `new` chain differ. If it is `known`
/// where that may be, the rest is not read. What is looked at `later` is announced.
pub(super) fn copy_differences(
    overlay: &dyn Overlay,
    (old, new): (&Chain, &Chain),
    known: Option<&Difference>,
    progress: &Progress,
    later: Later,
) -> Result<Report> {
    let plan = Plan::new(overlay, old, new, progress, PIECE).knowing(known);
    let part = overlay.end().div_ceil(MAX_PARTS).max(LEAST_PART);
    let Survey { equal, open, pieces } = plan.survey(MAX_REMEMBERED, part).doing(|| "planning".to_owned())?;
    progress.add_total(open.saturating_add(later.bytes(open)));
    progress.enter(Phase::Copy);
    let job = Job {
        overlay,
        old,
        new,
        progress,
        pieces: Mutex::new(Ok(pieces)),
        copied: AtomicU64::new(0),
        zeroed: AtomicU64::new(0),
    };
    let copied = job.run(open.div_ceil(PIECE));
    progress.enter(Phase::Commit);
    let committed = overlay.commit();
    copied.and(committed).map_err(or_make_room)?;
    let (copied, zeroed) = (job.copied.into_inner(), job.zeroed.into_inner());
    Ok(Report { missing: equal + open, equal, compared: open, copied, zeroed, reclaimed: 0 })
}

/// Where the overlay has no room to grow.
fn or_make_room(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NoSpace => {
            error.hint("make room and start it again: what was copied already is not copied twice")
        }
        _ => error,
    }
}

/// A part of a range in bytes from its start, and the unit in which it is compared.
struct Part {
    start: usize,
    end: usize,
    unit: usize,
}

/// What the workers share.
struct Job<'a> {
    overlay: &'a dyn Overlay,
    old: &'a Chain,
    new: &'a Chain,
    progress: &'a Progress,
    /// What is left to do, or the first error, which ends the work.
    pieces: Mutex<Result<Pieces<'a>, Option<Error>>>,
    copied: AtomicU64,
    zeroed: AtomicU64,
}

/// What a worker keeps from piece to piece.
#[derive(Default)]
struct Memory {
    old: AlignedBuffer,
    new: AlignedBuffer,
    payloads: Payloads,
}

impl Job<'_> {
    fn run(&self, pieces: u64) -> Result<()> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        // None for whom there is nothing to do: many small rebases may run at the same time.
        let workers = (processors.min(MAX_WORKERS) as u64).min(pieces);
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|| self.work());
            }
            self.work();
        });
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *pieces {
            Ok(_) => Ok(()),
            Err(error) => Err(error.take().unwrap_or_else(|| Error::invalid("the rebase failed before"))),
        }
    }

    /// Takes pieces until there are no more, or until somebody fails.
    fn work(&self) {
        let mut memory = Memory::default();
        while let Some(range) = self.take() {
            if let Err(error) = self.look_at(range, &mut memory) {
                self.fail(error);
            }
        }
    }

    fn take(&self) -> Option<Range> {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(rest) = &mut *pieces else { return None };
        let next = self.progress.stop_if_cancelled().and_then(|()| rest.next());
        next.unwrap_or_else(|error| {
            *pieces = Err(Some(error));
            None
        })
    }

    fn fail(&self, error: Error) {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        if pieces.is_ok() {
            *pieces = Err(Some(error));
        }
    }

    fn look_at(&self, range: Range, memory: &mut Memory) -> Result<()> {
        let looked_at = range.length().min(self.overlay.end() - range.start.0);
        self.overlay.is_compared(range.start, looked_at);
        for range in self.without_equal_payloads(range, &mut memory.payloads)? {
            self.compare(range, memory)?;
        }
        self.progress.advance(looked_at);
        Ok(())
    }

    /// The parts of a range that are not known to be equal by their compressed payloads, in multiples
    /// of what the overlay fills as a whole.
    fn without_equal_payloads(&self, range: Range, payloads: &mut Payloads) -> Result<Vec<Range>> {
        let whole = self.overlay.whole();
        let mut rest: Vec<Range> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (is_equal, length) = payloads
                .are_equal((self.old, self.new), at, range.end - at)
                .doing(|| "comparing compressed clusters".to_owned())?;
            let next = at + length;
            if !is_equal {
                let start = GuestOffset(at.0 / whole * whole);
                let end = GuestOffset(next.0.next_multiple_of(whole));
                match rest.last_mut() {
                    Some(last) if last.end >= start => last.end = end,
                    _ => rest.push(Range { start, end }),
                }
            }
            at = next;
        }
        Ok(rest)
    }

    fn compare(&self, range: Range, memory: &mut Memory) -> Result<()> {
        let length = range.length() as usize;
        let (old, new) = (memory.old.of_length(length), memory.new.of_length(length));
        self.read(self.old, range, old).doing(|| "reading the old backing file".to_owned())?;
        self.read(self.new, range, new).doing(|| "reading the new backing file".to_owned())?;
        for Part { start, end, unit } in self.parts(range)? {
            for difference in differences(&old[start..end], &new[start..end], unit) {
                let bytes = start + difference.bytes.start..start + difference.bytes.end;
                let at = range.start + bytes.start as u64;
                let content = match difference.is_zero {
                    true => Content::Zero(bytes.len() as u64),
                    false => self.data(at, &old[bytes])?,
                };
                self.fill(at, content)?;
            }
        }
        Ok(())
    }

    /// Bytes of the old chain, and where they lie if that is one place.
    fn data<'b>(&'b self, at: GuestOffset, bytes: &'b [u8]) -> Result<Content<'b>> {
        let length = bytes.len() as u64;
        let Owned { depth, extent } = self.old.extent_at(at, length, Detail::Owner)?;
        Ok(match (depth, extent.kind) {
            (Some(depth), ExtentKind::Data(host)) if extent.length == length => {
                Content::Stored(bytes, &**self.old.layers()[depth].data_file(), host)
            }
            _ => Content::Data(bytes),
        })
    }

    /// What of a range is to be compared, and in which units. What the overlay fills as a whole is
    /// compared as a whole where nothing of it is there; else what is missing of it, unit by unit.
    fn parts(&self, range: Range) -> Result<Vec<Part>> {
        let (unit, whole) = (self.overlay.unit(), self.overlay.whole());
        if unit == whole {
            return Ok(vec![Part { start: 0, end: range.length() as usize, unit: unit as usize }]);
        }
        let mut parts = Vec::new();
        for start in (range.start.0..range.end.0).step_by(whole as usize) {
            let end = (start + whole).min(self.overlay.end());
            let mut at = start;
            while at < end {
                let missing = self.overlay.missing_at(GuestOffset(at), end - at)?;
                let is_whole = at == start && at + missing.length == end;
                let unit = if is_whole { whole } else { unit };
                let next = (at + missing.length).next_multiple_of(unit);
                if missing.is_missing {
                    let within = |at: u64| (at - range.start.0) as usize;
                    parts.push(Part { start: within(at), end: within(next), unit: unit as usize });
                }
                at = next;
            }
        }
        Ok(parts)
    }

    /// Reads what a chain has in a range; zeros behind the end of the overlay, where the last
    /// unit may reach.
    fn read(&self, chain: &Chain, range: Range, buffer: &mut [u8]) -> Result<()> {
        let inside = range.end.0.min(self.overlay.end()) - range.start.0;
        let (inside, outside) = buffer.split_at_mut(inside as usize);
        outside.fill(0);
        chain.read_at(range.start, inside)
    }

    fn fill(&self, at: GuestOffset, content: Content<'_>) -> Result<()> {
        let filled = self.overlay.fill(at, content);
        let filled = filled.doing(|| format!("copying guest offset {at:#x} into the overlay"))?;
        self.progress.keep(filled.copied + filled.zeroed);
        self.copied.fetch_add(filled.copied, Ordering::Relaxed);
        self.zeroed.fetch_add(filled.zeroed, Ordering::Relaxed);
        Ok(())
    }
}
