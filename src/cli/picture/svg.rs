//! A picture as an SVG document: the cells as a grid, the legend below. Pure.
//!
//! The page may be light or dark: the colours follow `prefers-color-scheme`, and the document paints
//! its own background.

use std::fmt::Write;

use super::{Colour, Picture};
use crate::cli::size;

/// Cells in a row.
pub(super) const COLUMNS: usize = 128;

/// In user units.
const CELL: usize = 7;
const MARGIN: usize = 24;
const LABELS: usize = 72;
const WIDTH: usize = LABELS + COLUMNS * CELL + 2 * MARGIN;
const TOP: usize = 76;
const LINE: usize = 22;
/// The cells of a disk that has only a few.
const WIDEST: usize = 56;
/// A grid of few rows has higher ones.
const LOW: usize = 8;
/// As many characters of a name fit beside the figures.
const NAME: usize = 96;

/// The colours of a light page, and those that a dark one has in their place. Written out: viewers other than
/// browsers know no variables, and would draw all of it black.
const STYLE: &str = "\
.page{fill:#ffffff}text{fill:#1f2328;font:14px system-ui,sans-serif}.title{font-size:17px;font-weight:600}
.weak{fill:#59636e}.number{text-anchor:end;font-variant-numeric:tabular-nums}.small{font-size:12px}
.empty{fill:#e8ebef}.faint{fill:#c3c9d0}\
.s0{fill:#0969da}.s1{fill:#e8710a}.s2{fill:#1a8f5c}.s3{fill:#a83fa8}\
.s4{fill:#c9a300}.s5{fill:#00a0b8}.s6{fill:#8a4b22}.s7{fill:#cf2a4f}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}text{fill:#e6edf3}.weak{fill:#9aa4af}\
.empty{fill:#1d2229}.faint{fill:#434b55}\
.s0{fill:#4c9dff}.s1{fill:#ff9d45}.s2{fill:#3fc389}.s3{fill:#d980d9}\
.s4{fill:#e6c229}.s5{fill:#35c9de}.s6{fill:#c08457}.s7{fill:#ff6b86}}
";

pub(super) fn document(picture: &Picture) -> String {
    let rows = picture.cells.len().div_ceil(COLUMNS);
    let height = if rows <= LOW { 3 * CELL } else { 2 * CELL };
    let legend = TOP + rows * height + 14;
    let total = legend + picture.legend().count() * LINE + MARGIN;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" width=\"{WIDTH}\" \
         height=\"{total}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{total}\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"36\">{short}</text>\n\
         <text class=\"weak\" x=\"{MARGIN}\" y=\"58\">{size}, a cell is {cell}; a cell that holds several things \
         shows what weighs most in it</text>\n",
        title = escaped(&picture.title),
        short = escaped(&shortened(&picture.title)),
        size = size::text(picture.end - picture.start),
        cell = size::text(picture.cell),
    );
    let shown: Vec<usize> = picture.shown().collect();
    for (row, cells) in shown.chunks(COLUMNS).enumerate() {
        draw_row(&mut text, picture, row, cells, height);
    }
    draw_legend(&mut text, picture, legend);
    text + "</svg>\n"
}

fn draw_row(text: &mut String, picture: &Picture, row: usize, cells: &[usize], height: usize) {
    let start = picture.start + (row * COLUMNS) as u64 * picture.cell;
    let (y, x) = (TOP + row * height, MARGIN + LABELS);
    // Every label where rows are high, else every second.
    if height > 2 * CELL || row.is_multiple_of(2) {
        let label = size::text(start);
        let (right, base) = (x - 8, y + height / 2 + 4);
        let _ = writeln!(text, "<text class=\"weak small number\" x=\"{right}\" y=\"{base}\">{label}</text>");
    }
    // One row alone may be that of a small disk.
    let pitch = if row == 0 { (COLUMNS * CELL / cells.len().max(1)).clamp(CELL, WIDEST) } else { CELL };
    let mut column = 0;
    for run in cells.chunk_by(|one, next| one == next) {
        let kind = &picture.kinds[run[0]];
        let from = start + column as u64 * picture.cell;
        let to = from.saturating_add(run.len() as u64 * picture.cell).min(picture.end);
        let _ = writeln!(
            text,
            "<rect class=\"{}\" x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{}\"><title>{from:#x} – {to:#x} ({}): \
             {}</title></rect>",
            class(kind.colour),
            x + column * pitch,
            run.len() * pitch,
            height - 1,
            size::text(to - from),
            escaped(&kind.name),
        );
        column += run.len();
    }
}

fn draw_legend(text: &mut String, picture: &Picture, top: usize) {
    for (number, (kind, bytes)) in picture.legend().enumerate() {
        let y = top + number * LINE;
        let base = y + 12;
        let _ = writeln!(
            text,
            "<rect class=\"{}\" x=\"{MARGIN}\" y=\"{y}\" width=\"14\" height=\"14\" rx=\"2\"/>\
             <text class=\"number\" x=\"{}\" y=\"{base}\">{}</text>\
             <text class=\"weak number\" x=\"{}\" y=\"{base}\">{}</text>\
             <text x=\"{}\" y=\"{base}\">{}</text>",
            class(kind.colour),
            MARGIN + 104,
            size::text(bytes),
            MARGIN + 168,
            escaped(&picture.percent(bytes)),
            MARGIN + 184,
            escaped(&shortened(&kind.name)),
        );
    }
}

fn class(colour: Colour) -> &'static str {
    const STRONG: [&str; Colour::STRONG] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"];
    match colour {
        Colour::Empty => "empty",
        Colour::Faint => "faint",
        Colour::Strong(number) => STRONG[number % Colour::STRONG],
    }
}

fn shortened(name: &str) -> String {
    let count = name.chars().count();
    match count > NAME {
        false => name.to_owned(),
        true => "…".chars().chain(name.chars().skip(count + 1 - NAME)).collect(),
    }
}

/// Text as XML has it. What XML cannot have at all, such as control characters in a file name, becomes �.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            _ if character.is_control() => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::picture;
    use super::*;

    #[test]
    fn names_cannot_break_out_of_the_document() {
        let document = document(&picture());
        assert!(document.contains("a&lt;b&gt;.qcow2") && !document.contains("a<b"));
        assert_eq!(escaped("a\u{1}&\"\u{ffff}"), "a\u{fffd}&amp;&quot;\u{fffd}");
    }

    #[test]
    fn a_run_of_cells_is_one_rectangle_with_its_range() {
        let document = document(&picture());
        assert_eq!(document.matches("<rect class=\"empty\"").count(), 3, "two runs and the legend");
        assert!(document.contains("<title>0x20 – 0x30 (16 B): base</title>"), "{document}");
        assert!(document.contains("<title>0x30 – 0x64 (52 B): nothing</title>"), "{document}");
    }
}
