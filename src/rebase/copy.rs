//! Comparing and copying: workers take pieces of the plan, read both chains, and fill the overlay
//! with what differs.
//!
//! Workers own disjoint ranges; the overlay orders its metadata by itself. What was filled is made
//! durable at the end, also when the rebase is stopped or fails: the next one finds it there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::compare::differences;
use super::plan::{Plan, Range};
use super::{Phase, Progress, Report};
use crate::chain::Chain;
use crate::error::{Context, Error, Result};
use crate::file::AlignedBuffer;
use crate::layer::{Content, GuestOffset, Overlay};

/// Bytes that a worker compares at once, or one unit if that is more.
const PIECE: u64 = 256 << 10;
/// More workers than this fight for memory bandwidth only, and each has two buffers.
const MAX_WORKERS: usize = 8;

/// Lets the overlay hold, durably, all in which `old` and `new` differ.
pub(super) fn copy_differences(
    overlay: &dyn Overlay,
    old: &Chain,
    new: &Chain,
    progress: &Progress,
) -> Result<Report> {
    let (equal, open) = Plan::new(overlay, old, new, PIECE).measure().doing(|| "planning".to_owned())?;
    progress.set_total(open);
    progress.enter(Phase::Copy);
    let job = Job {
        overlay,
        old,
        new,
        progress,
        plan: Mutex::new(Ok(Plan::new(overlay, old, new, PIECE))),
        copied: AtomicU64::new(0),
        zeroed: AtomicU64::new(0),
    };
    let copied = job.run();
    progress.enter(Phase::Commit);
    let committed = overlay.commit();
    copied?;
    committed?;
    let (copied, zeroed) = (job.copied.into_inner(), job.zeroed.into_inner());
    Ok(Report { missing: equal + open, equal, compared: open, copied, zeroed, reclaimed: 0 })
}

/// What the workers share.
struct Job<'a> {
    overlay: &'a dyn Overlay,
    old: &'a Chain,
    new: &'a Chain,
    progress: &'a Progress,
    /// What is left of the plan, or the first error, which ends the work.
    plan: Mutex<Result<Plan<'a>, Option<Error>>>,
    copied: AtomicU64,
    zeroed: AtomicU64,
}

impl Job<'_> {
    fn run(&self) -> Result<()> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|| self.work());
            }
            self.work();
        });
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *plan {
            Ok(_) => Ok(()),
            Err(error) => Err(error.take().unwrap_or_else(|| Error::invalid("the rebase failed before"))),
        }
    }

    /// Takes pieces until there are no more, or until somebody fails.
    fn work(&self) {
        let mut buffers = Default::default();
        while let Some(range) = self.take() {
            if let Err(error) = self.look_at(range, &mut buffers) {
                self.fail(error);
            }
        }
    }

    fn take(&self) -> Option<Range> {
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(rest) = &mut *plan else { return None };
        let next = self.progress.stop_if_cancelled().and_then(|()| rest.next_piece());
        next.unwrap_or_else(|error| {
            *plan = Err(Some(error));
            None
        })
    }

    fn fail(&self, error: Error) {
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        if plan.is_ok() {
            *plan = Err(Some(error));
        }
    }

    fn look_at(&self, range: Range, buffers: &mut (AlignedBuffer, AlignedBuffer)) -> Result<()> {
        let length = range.length() as usize;
        let (old, new) = (buffers.0.of_length(length), buffers.1.of_length(length));
        self.read(self.old, range, old).doing(|| "reading the old backing file".to_owned())?;
        self.read(self.new, range, new).doing(|| "reading the new backing file".to_owned())?;
        for difference in differences(old, new, self.overlay.unit() as usize) {
            let at = range.start + difference.bytes.start as u64;
            let content = match difference.is_zero {
                true => Content::Zero(difference.bytes.len() as u64),
                false => Content::Data(&old[difference.bytes]),
            };
            self.fill(at, content)?;
        }
        self.progress.advance(range.length().min(self.overlay.end() - range.start.0));
        Ok(())
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
        self.copied.fetch_add(filled.copied, Ordering::Relaxed);
        self.zeroed.fetch_add(filled.zeroed, Ordering::Relaxed);
        Ok(())
    }
}
