//! Pictures of a disk: a cell for each range of guest bytes, coloured by what the range holds most of.
//!
//! Who draws adds up runs of bytes by [`Kind`]; `terminal` and `svg` show the same cells. Memory follows
//! the number of cells, however many runs there are.

mod svg;
mod terminal;

use crate::error::{Context, Result};
use crate::file::output::Output;

/// What bytes can be, with a line in the legend.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    /// What stands in its cells, so that they can be told apart without colours.
    pub symbol: char,
    pub colour: Colour,
    /// A cell shows the kind of the highest rank that it holds, and of these the one with most bytes.
    pub rank: u8,
    pub name: String,
}

/// The colours of a picture, which terminals and pages have each their own shades of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colour {
    /// Nothing is there.
    Empty,
    /// There, but of no weight.
    Faint,
    /// One of eight that are easily told apart; counted round.
    Strong(usize),
}

impl Colour {
    /// How many there are of [`Strong`](Self::Strong).
    const STRONG: usize = 8;
}

/// A picture: of which bytes, in which cells, and what they hold.
#[derive(Debug)]
pub(super) struct Picture {
    title: String,
    start: u64,
    end: u64,
    /// Bytes of a cell: a power of two.
    cell: u64,
    kinds: Vec<Kind>,
    /// Bytes in the whole picture by kind.
    totals: Vec<u64>,
    /// Of each cell, bytes by kind.
    cells: Vec<Vec<(usize, u64)>>,
}

/// How many cells there may be, and how small.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    columns: usize,
    rows: usize,
    /// Bytes.
    smallest: u64,
}

impl Grid {
    /// One that suits a terminal of so many columns. `smallest`: bytes that are allocated together.
    pub fn for_terminal(columns: usize, smallest: u64) -> Self {
        Self { columns: terminal::cells_in_a_row(columns), rows: 16, smallest }
    }

    /// One that suits a page.
    pub fn for_page(smallest: u64) -> Self {
        Self { columns: svg::COLUMNS, rows: 32, smallest }
    }

    /// Bytes of a cell, for a disk of so many bytes.
    fn cell(self, bytes: u64) -> u64 {
        let most = (self.columns * self.rows) as u64;
        let cell = bytes.div_ceil(most).checked_next_power_of_two().unwrap_or(1 << 63);
        cell.max(self.smallest.max(1).next_power_of_two())
    }
}

impl Picture {
    /// An empty one of these guest bytes.
    pub fn new(title: String, start: u64, end: u64, kinds: Vec<Kind>, grid: Grid) -> Self {
        let cell = grid.cell(end - start);
        let cells = vec![Vec::new(); (end - start).div_ceil(cell) as usize];
        Self { title, start, end, cell, totals: vec![0; kinds.len()], kinds, cells }
    }

    /// A run of bytes of a kind. What lies outside the picture does not count.
    pub fn add(&mut self, start: u64, length: u64, kind: usize) {
        let (mut at, end) = (start.max(self.start), start.saturating_add(length).min(self.end));
        while at < end {
            let number = (at - self.start) / self.cell;
            let next = self.start.saturating_add((number + 1).saturating_mul(self.cell)).min(end);
            self.put(number as usize, kind, next - at);
            at = next;
        }
    }

    fn put(&mut self, number: usize, kind: usize, bytes: u64) {
        let cell = &mut self.cells[number];
        match cell.iter_mut().find(|(has, _)| *has == kind) {
            Some((_, sum)) => *sum += bytes,
            None => cell.push((kind, bytes)),
        }
        self.totals[kind] += bytes;
    }

    /// What each cell shows.
    fn shown(&self) -> impl Iterator<Item = usize> {
        self.cells.iter().map(|cell| {
            let most =
                cell.iter().max_by_key(|(kind, bytes)| (self.kinds[*kind].rank, *bytes, usize::MAX - kind));
            most.map_or(0, |(kind, _)| *kind)
        })
    }

    /// The kinds that there are any bytes of.
    fn legend(&self) -> impl Iterator<Item = (&Kind, u64)> {
        self.kinds.iter().zip(self.totals.iter().copied()).filter(|(_, bytes)| *bytes > 0)
    }

    fn percent(&self, bytes: u64) -> String {
        let percent = bytes as f64 * 100.0 / ((self.end - self.start).max(1) as f64);
        if percent > 0.0 && percent < 0.1 { "<0.1 %".to_owned() } else { format!("{percent:.1} %") }
    }

    /// For a terminal of so many columns.
    pub fn text(&self, columns: usize, is_coloured: bool) -> String {
        terminal::text(self, columns, is_coloured)
    }

    /// Writes it for a page.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_svg(&self, output: &Output<'_>) -> Result<()> {
        let written = output.write(|out| out.write_all(svg::document(self).as_bytes()));
        written.doing(|| "writing the picture".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn kinds() -> Vec<Kind> {
        let kind = |symbol, colour, rank, name: &str| Kind { symbol, colour, rank, name: name.to_owned() };
        vec![
            kind('.', Colour::Empty, 0, "nothing"),
            kind('0', Colour::Strong(0), 1, "a<b>.qcow2"),
            kind('1', Colour::Strong(1), 1, "base"),
        ]
    }

    pub(super) fn picture() -> Picture {
        let grid = Grid { columns: 4, rows: 2, smallest: 10 };
        let mut picture = Picture::new("of a disk".to_owned(), 0, 100, kinds(), grid);
        picture.add(0, 40, 0);
        picture.add(40, 1, 1);
        picture.add(41, 3, 2);
        picture.add(44, 60, 0);
        picture
    }

    #[test]
    fn a_cell_shows_what_weighs_most_and_then_what_there_is_most_of() {
        let picture = picture();
        assert_eq!(picture.cell, 16);
        assert_eq!(picture.shown().collect::<Vec<_>>(), [0, 0, 2, 0, 0, 0, 0]);
        assert_eq!(picture.totals, [96, 1, 3]);
    }

    #[test]
    fn disks_of_every_size_have_cells_enough() {
        let grid = Grid::for_terminal(80, 65536);
        for size in [0, 1, 512, 1 << 20, (1 << 40) + 512, i64::MAX as u64, u64::MAX] {
            let mut picture = Picture::new(String::new(), 0, size, kinds(), grid);
            picture.add(0, size, 1);
            assert_eq!(picture.totals[1], size);
            assert!(picture.cells.len() <= grid.columns * grid.rows);
        }
    }
}
