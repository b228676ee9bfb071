//! A picture as text: rows of symbols, each behind its offset, and a legend. Pure.

use std::fmt::Write;

use anstyle::{Ansi256Color, Color, Style};

use super::{Colour, Kind, Picture};
use crate::cli::size;

/// Columns of the offset before a row, with the space behind it.
const MARGIN: usize = 10;

/// How many cells a row has where there are so many columns: a number that divides well.
pub(super) fn cells_in_a_row(columns: usize) -> usize {
    let room = columns.saturating_sub(MARGIN).min(256);
    let step = if room >= 64 { 16 } else { 8 };
    (room / step * step).max(8)
}

pub(super) fn text(picture: &Picture, columns: usize, is_coloured: bool) -> String {
    let mut text = String::new();
    line(&mut text, &picture.title, columns);
    line(&mut text, &format!("a cell is {}", size::text(picture.cell)), columns);
    let shown: Vec<usize> = picture.shown().collect();
    let width = cells_in_a_row(columns);
    for (row, cells) in shown.chunks(width).enumerate() {
        let at = picture.start + (row * width) as u64 * picture.cell;
        let _ = write!(text, "{:>9} ", size::text(at));
        // Neighbours alike are one piece, so that colours are not said for each cell.
        for run in cells.chunk_by(|one, next| one == next) {
            let kind = &picture.kinds[run[0]];
            let symbols: String = run.iter().map(|_| kind.symbol).collect();
            text += &painted(kind, &symbols, is_coloured);
        }
        text.push('\n');
    }
    for (kind, bytes) in picture.legend() {
        let sample = painted(kind, &kind.symbol.to_string().repeat(2), is_coloured);
        let figures = format!("{:>9} {:>7}", size::text(bytes), picture.percent(bytes));
        // The sample's two columns, and spaces.
        let room = columns.saturating_sub(2 + 2 + figures.len() + 2).max(8);
        let _ = writeln!(text, "{sample}  {figures}  {}", shortened(&kind.name, room));
    }
    text
}

fn line(text: &mut String, words: &str, columns: usize) {
    text.push_str(&shortened(words, columns.max(20)));
    text.push('\n');
}

/// The end of a name says more than its beginning.
fn shortened(name: &str, room: usize) -> String {
    let count = name.chars().count();
    match count > room {
        false => name.to_owned(),
        true => "…".chars().chain(name.chars().skip(count + 1 - room)).collect(),
    }
}

fn painted(kind: &Kind, symbols: &str, is_coloured: bool) -> String {
    let style = style(kind.colour);
    if is_coloured { format!("{style}{symbols}{style:#}") } else { symbols.to_owned() }
}

/// Dark symbols on light colours: readable on light and dark terminals.
fn style(colour: Colour) -> Style {
    // Of the 256 colours, shades that people who do not tell red from green can tell apart.
    const STRONG: [u8; Colour::STRONG] = [75, 215, 114, 219, 227, 123, 181, 250];
    let on = |colour| Some(Color::from(Ansi256Color(colour)));
    match colour {
        Colour::Empty => Style::new().dimmed(),
        Colour::Faint => Style::new(),
        Colour::Strong(number) => Style::new().fg_color(on(16)).bg_color(on(STRONG[number % Colour::STRONG])),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::picture;
    use super::*;

    #[test]
    fn rows_begin_with_their_offsets_and_the_legend_names_what_there_is() {
        let text = text(&picture(), 40, false);
        let expected = "\
of a disk
a cell is 16 B
      0 B ..1....
..       96 B  96.0 %  nothing
00        1 B   1.0 %  a<b>.qcow2
11        3 B   3.0 %  base
";
        // One cell of three holds 1 byte of the one and 3 of the other.
        assert_eq!(text, expected);
    }

    #[test]
    fn long_names_lose_their_beginning() {
        assert_eq!(shortened("abcdef", 6), "abcdef");
        assert_eq!(shortened("/a/long/näme", 6), "…/näme");
    }

    #[test]
    fn colours_come_and_go_with_the_cells() {
        let text = text(&picture(), 40, true);
        let row = text.lines().nth(2).unwrap();
        assert_eq!(row.matches("\u{1b}[0m").count(), 3, "{row:?}");
        assert!(row.ends_with("\u{1b}[0m"), "{row:?}");
    }
}
