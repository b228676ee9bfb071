//! The picture of a dry run: what a rebase would copy, compare and leave alone.

use std::path::Path;

use crate::chain::Chain;
use crate::cli::picture::{Colour, Grid, Kind, Picture};
use crate::error::Result;
use crate::file::output::Output;
use crate::layer::{Detail, GuestOffset};
use crate::rebase::Rehearsal;
use crate::shown::Shown;

/// From what weighs least to what weighs most.
const EQUAL: usize = 0;
const HELD: usize = 1;
const COMPARED: usize = 2;
const ZEROED: usize = 3;
const COPIED: usize = 4;

const KINDS: [(char, Colour, &str); 5] = [
    ('=', Colour::Empty, "skipped: equal by metadata"),
    ('o', Colour::Faint, "skipped: held by the overlay"),
    ('?', Colour::Strong(0), "compared, and found equal"),
    ('z', Colour::Strong(2), "becomes zero clusters"),
    ('c', Colour::Strong(1), "copied"),
];

/// Draws what was found for a page.
pub(super) fn write_svg(
    found: &Rehearsal,
    chain: &Chain,
    backing: Option<&Path>,
    output: &Output<'_>,
) -> Result<()> {
    let Some(top) = chain.top() else { return Ok(()) };
    let name = top.file().path().shown();
    let title = match backing {
        Some(backing) => format!("{name}, rebased onto {}", backing.shown()),
        None => format!("{name}, flattened"),
    };
    let smallest = top.as_qcow2().map_or(4096, |image| image.header().cluster_size());
    let kinds = KINDS.iter().zip(0..).map(|((symbol, colour, name), rank)| Kind {
        symbol: *symbol,
        colour: *colour,
        rank,
        name: (*name).to_owned(),
    });
    let grid = Grid::for_page(smallest);
    let mut picture = Picture::new(title, 0, top.virtual_size(), kinds.collect(), grid);
    draw(&mut picture, found, &Chain::new([top.clone()]))?;
    picture.write_svg(output)
}

/// `top` is the overlay alone.
fn draw(picture: &mut Picture, found: &Rehearsal, top: &Chain) -> Result<()> {
    let copied = found.ranges.iter().map(|range| (range.start, range.length, range.is_zero));
    let mut copied =
        Runs::new(copied.map(|(at, length, is_zero)| (at.0, length, if is_zero { ZEROED } else { COPIED })));
    let mut compared = Runs::new(found.compared.iter().map(|(at, length)| (at.0, *length, COMPARED)));
    for extent in top.extents(.., Detail::Owner) {
        let (GuestOffset(mut at), owned) = extent?;
        let below = if owned.depth.is_none() { EQUAL } else { HELD };
        let stop = at + owned.extent.length;
        while at < stop {
            let (over, reach) = copied.at(at, stop);
            let (looked, reach) = compared.at(at, reach);
            picture.add(at, reach - at, over.or(looked).unwrap_or(below));
            at = reach;
        }
    }
    Ok(())
}

/// Runs in order, asked for ever higher offsets.
struct Runs<I: Iterator>(std::iter::Peekable<I>);

impl<I: Iterator<Item = (u64, u64, usize)>> Runs<I> {
    fn new(runs: I) -> Self {
        Self(runs.peekable())
    }

    /// The kind of the run that `at` lies in, and where that answer ends, at most at `limit`.
    fn at(&mut self, at: u64, limit: u64) -> (Option<usize>, u64) {
        while self.0.next_if(|(start, length, _)| start + length <= at).is_some() {}
        match self.0.peek() {
            Some((start, length, kind)) if *start <= at => (Some(*kind), limit.min(start + length)),
            Some((start, ..)) => (None, limit.min(*start)),
            None => (None, limit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_from_the_lowest_to_the_highest() {
        let mut runs = Runs::new([(10, 5, 7), (15, 5, 8), (40, 2, 7)].into_iter());
        let asked = [(0, 100), (10, 12), (12, 100), (15, 100), (20, 30), (30, 100), (41, 100), (42, 100)];
        let found = asked.map(|(at, limit)| runs.at(at, limit));
        let expected = [
            (None, 10),
            (Some(7), 12),
            (Some(7), 15),
            (Some(8), 20),
            (None, 30),
            (None, 40),
            (Some(7), 42),
            (None, 100),
        ];
        assert_eq!(found, expected);
    }
}
