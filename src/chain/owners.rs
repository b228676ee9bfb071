//! Long chains: which layer owns what is found out once, and remembered in bounded space.
//!
//! Asking layer after layer costs a look into a table for each of them; a cloud's chains have
//! hundreds. So whole segments are resolved at once, a layer at a time, and only by the layers that
//! hold anything in the region around them. Layers that are written to must not be remembered.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::Owned;
use crate::error::Result;
use crate::layer::{Detail, Extent, ExtentKind, GuestOffset, Layer};

/// Shorter chains are asked layer by layer.
pub(super) const FEWEST_LAYERS: usize = 4;
/// Bytes of the guest that are resolved at once. Some hundred clusters.
const SEGMENT: u64 = 32 << 20;
/// Bytes of the guest for which it is known which layers hold anything: what an L2 table of clusters
/// of 64 KiB covers.
const REGION: u64 = 512 << 20;
/// Bytes of memory for what is remembered.
const BUDGET: u64 = 6 << 20;

/// What is remembered of a chain of layers that do not change.
#[derive(Debug)]
pub(super) struct Owners {
    /// Named by the number of the segment.
    segments: Cache<u64, Arc<Segment>, Bytes>,
    /// Named by the number of the region: the depths of the layers that hold anything there.
    regions: Cache<u64, Arc<[u32]>, Bytes>,
    /// Bytes of the guest that a segment has, and a region, which is a multiple of that.
    spans: (u64, u64),
}

/// A resolved segment.
#[derive(Debug)]
struct Segment {
    /// In order, without gaps. None at all where some layer could not answer.
    runs: Box<[OwnedRun]>,
}

/// A run of guest bytes and who owns it, up to the next run.
#[derive(Clone, Copy, Debug)]
struct OwnedRun {
    start: GuestOffset,
    depth: Option<u32>,
    kind: ExtentKind,
}

#[derive(Clone, Debug)]
struct Bytes;

impl Weighter<u64, Arc<Segment>> for Bytes {
    fn weight(&self, _: &u64, segment: &Arc<Segment>) -> u64 {
        (segment.runs.len() * size_of::<OwnedRun>() + 64) as u64
    }
}

impl Weighter<u64, Arc<[u32]>> for Bytes {
    fn weight(&self, _: &u64, depths: &Arc<[u32]>) -> u64 {
        (depths.len() * size_of::<u32>() + 64) as u64
    }
}

impl Owners {
    pub(super) fn new() -> Self {
        Self::with_spans(SEGMENT, REGION)
    }

    fn with_spans(segment: u64, region: u64) -> Self {
        Self {
            spans: (segment, region),
            segments: Cache::with_weighter(1024, BUDGET, Bytes),
            regions: Cache::with_weighter(64, BUDGET / 4, Bytes),
        }
    }

    /// Who of `layers`, always the same, owns the bytes at `at`; at most `length` of them. `None`
    /// where that cannot be told without failing: ask one by one, to fail for these bytes only.
    pub(super) fn find(&self, layers: &[Arc<dyn Layer>], at: GuestOffset, length: u64) -> Option<Owned> {
        let number = at.0 / self.spans.0;
        let segment = self.segments.get(&number).unwrap_or_else(|| {
            let runs = self.resolve(layers, number).unwrap_or_default();
            let segment = Arc::new(Segment { runs });
            self.segments.insert(number, segment.clone());
            segment
        });
        segment.find(at, length, (number + 1) * self.spans.0)
    }

    fn resolve(&self, layers: &[Arc<dyn Layer>], number: u64) -> Result<Box<[OwnedRun]>> {
        let start = GuestOffset(number * self.spans.0);
        let end = start + self.spans.0;
        let mut search = Search { pending: vec![(start, end)], found: Vec::new() };
        for &depth in &*self.depths_around(layers, start)? {
            search.ask(&*layers[depth as usize], depth)?;
            if search.pending.is_empty() {
                break;
            }
        }
        let nobody = |(start, _)| OwnedRun { start, depth: None, kind: ExtentKind::NotMine };
        let Search { pending, mut found } = search;
        found.extend(pending.into_iter().map(nobody));
        found.sort_unstable_by_key(|run| run.start);
        Ok(found.into())
    }

    fn depths_around(&self, layers: &[Arc<dyn Layer>], at: GuestOffset) -> Result<Arc<[u32]>> {
        let number = at.0 / self.spans.1;
        let region = (GuestOffset(number * self.spans.1), self.spans.1);
        self.regions.get_or_insert_with(&number, || {
            let mut depths = Vec::new();
            for (depth, layer) in (0..).zip(layers) {
                if holds_anything(&**layer, region)? {
                    depths.push(depth);
                }
            }
            Ok(depths.into())
        })
    }
}

/// Whether a layer has an answer of its own in so many bytes from `start` on. Where it ends there
/// are zeros, which is one.
fn holds_anything(layer: &dyn Layer, (start, length): (GuestOffset, u64)) -> Result<bool> {
    let end = start + length;
    if end.0 > layer.virtual_size() {
        return Ok(true);
    }
    let mut at = start;
    while at < end {
        let extent = layer.extent_at(at, end - at, Detail::Owner)?;
        if extent.kind != ExtentKind::NotMine {
            return Ok(true);
        }
        at = at + extent.length;
    }
    Ok(false)
}

impl Segment {
    fn find(&self, at: GuestOffset, length: u64, end: u64) -> Option<Owned> {
        let next = self.runs.partition_point(|run| run.start <= at);
        let run = self.runs.get(next.checked_sub(1)?)?;
        let run_end = self.runs.get(next).map_or(end, |next| next.start.0);
        let kind = run.kind.advanced(at - run.start);
        let extent = Extent { kind, length: length.min(run_end - at.0) };
        Some(Owned { depth: run.depth.map(|depth| depth as usize), extent })
    }
}

/// A segment that is being resolved.
struct Search {
    /// Start and end of what nobody has claimed yet, in order.
    pending: Vec<(GuestOffset, GuestOffset)>,
    found: Vec<OwnedRun>,
}

impl Search {
    /// Lets the next layer claim what it holds of what is pending.
    fn ask(&mut self, layer: &dyn Layer, depth: u32) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let Some(&(_, end)) = pending.last() else { return Ok(()) };
        // One answer may be good for several pending runs.
        let (mut answer, mut answer_at, mut answer_end) =
            (ExtentKind::NotMine, GuestOffset(0), GuestOffset(0));
        for (start, run_end) in pending {
            let mut at = start;
            while at < run_end {
                if at >= answer_end {
                    let extent = own_extent(layer, at, end - at)?;
                    (answer, answer_at, answer_end) = (extent.kind, at, at + extent.length);
                }
                let claimed_end = answer_end.min(run_end);
                match answer {
                    ExtentKind::NotMine => self.leave(at, claimed_end),
                    kind => {
                        let kind = kind.advanced(at - answer_at);
                        self.found.push(OwnedRun { start: at, depth: Some(depth), kind });
                    }
                }
                at = claimed_end;
            }
        }
        Ok(())
    }

    fn leave(&mut self, start: GuestOffset, end: GuestOffset) {
        match self.pending.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => self.pending.push((start, end)),
        }
    }
}

/// What a layer says of its own; zeros behind its end.
fn own_extent(layer: &dyn Layer, at: GuestOffset, length: u64) -> Result<Extent> {
    let size = layer.virtual_size();
    match at.0 < size {
        true => layer.extent_at(at, length.min(size - at.0), Detail::Owner),
        false => Ok(Extent { kind: ExtentKind::Zero(None), length }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;
    use crate::file::{HostFile, HostOffset};
    use crate::layer::{Compressed, Format};

    /// A layer of cells of one sector each.
    #[derive(Debug)]
    struct Cells(Vec<Cell>);

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Cell {
        Mine,
        Zero,
        Nothing,
        Damaged,
    }

    const SECTOR: u64 = 512;
    const CELLS: usize = 40;

    impl Layer for Cells {
        fn format(&self) -> Format {
            Format::Qcow2
        }

        fn virtual_size(&self) -> u64 {
            self.0.len() as u64 * SECTOR
        }

        fn extent_at(&self, at: GuestOffset, length: u64, _: Detail) -> Result<Extent> {
            let number = (at.0 / SECTOR) as usize;
            let cell = self.0[number];
            let run = self.0[number..].iter().take_while(|next| **next == cell).count() as u64;
            let kind = match cell {
                Cell::Mine => ExtentKind::Data(HostOffset(at.0 + 7)),
                Cell::Zero => ExtentKind::Zero(None),
                Cell::Nothing => ExtentKind::NotMine,
                Cell::Damaged => return Err(Error::corrupt("damaged")),
            };
            Ok(Extent { kind, length: length.min(run * SECTOR - at.0 % SECTOR) })
        }

        fn read_compressed(&self, _: Compressed, _: &mut [u8]) -> Result<()> {
            unimplemented!("nothing is read")
        }

        fn file(&self) -> &Arc<dyn HostFile> {
            unimplemented!("nothing is read")
        }
    }

    fn cell() -> impl Strategy<Value = Cell> {
        prop_oneof![4 => Just(Cell::Mine), 2 => Just(Cell::Zero), 30 => Just(Cell::Nothing), 1 => Just(Cell::Damaged)]
    }

    /// What asking one after the other gives at `at`.
    fn walk(layers: &[Arc<dyn Layer>], at: GuestOffset) -> Result<(Option<usize>, ExtentKind)> {
        for (depth, layer) in layers.iter().enumerate() {
            let kind = own_extent(&**layer, at, 1)?.kind;
            if kind != ExtentKind::NotMine {
                return Ok((Some(depth), kind));
            }
        }
        Ok((None, ExtentKind::NotMine))
    }

    proptest! {
        #[test]
        fn what_is_remembered_is_what_asking_one_by_one_gives(
            cells in vec(vec(cell(), 1..=CELLS), 1..12),
            spans in prop_oneof![Just((1, 1)), Just((4, 12)), Just((8, 8)), Just((64, 64))],
        ) {
            let layers: Vec<Arc<dyn Layer>> = cells.into_iter().map(|cells| Arc::new(Cells(cells)) as _).collect();
            let owners = Owners::with_spans(spans.0 * SECTOR, spans.1 * SECTOR);
            for at in (0..CELLS as u64 * SECTOR).step_by(256).map(GuestOffset) {
                let Some(found) = owners.find(&layers, at, 5000) else { continue };
                prop_assert!((1..=5000).contains(&found.extent.length));
                for further in (0..found.extent.length).step_by(256) {
                    let expected = walk(&layers, at + further).unwrap();
                    prop_assert_eq!((found.depth, found.extent.kind.advanced(further)), expected);
                }
            }
        }
    }

    #[test]
    fn a_damaged_layer_leaves_the_segments_around_it_alone() {
        let mut cells = vec![Cell::Nothing; CELLS];
        cells[20] = Cell::Damaged;
        let layers: Vec<Arc<dyn Layer>> =
            vec![Arc::new(Cells(cells)), Arc::new(Cells(vec![Cell::Mine; CELLS]))];
        let owners = Owners::with_spans(4 * SECTOR, 4 * SECTOR);
        let found = |cell: u64| owners.find(&layers, GuestOffset(cell * SECTOR), 1).map(|owned| owned.depth);
        assert_eq!((found(19), found(20), found(23), found(24)), (Some(Some(1)), None, None, Some(Some(1))));
    }
}
