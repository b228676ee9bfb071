//! `rebasefs map`: which layer holds what, as a table, as JSON, as a picture.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::options::{self, Opening, Output, Refused};
use super::picture::{Colour, Grid, Kind, Picture};
use super::print::{self, print};
use super::size;
use crate::chain::{Chain, MapEntry};
use crate::error::{Context, Error, Result};
use crate::file::{Access, output};
use crate::shown::Shown;

/// Show which layer of the chain holds which bytes of the disk
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs map --output=json cow.qcow2
  rebasefs map --picture cow.qcow2
  rebasefs map --start-offset 1G --max-length 64M cow.qcow2")]
pub(super) struct Arguments {
    /// Format of the image; without it, it is recognised from the file
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to print the map: for people, only what is stored as data
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Begin at this guest offset
    #[arg(short, long, default_value = "0", value_name = "OFFSET")]
    start_offset: String,
    /// Look at this many bytes at most
    #[arg(short, visible_short_alias = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// Draw where the bytes come from: a cell a range, a colour and a character a layer
    #[arg(long, conflicts_with = "output")]
    picture: bool,
    /// Draw the same for a page, into FILE; - for the standard output
    #[arg(long, value_name = "FILE", conflicts_with = "output")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let start = size::parse(&arguments.start_offset, "start offset")?;
    let length = match &arguments.max_length {
        Some(text) => size::parse(text, "maximum length")?,
        None => u64::MAX,
    };
    let format = options::format(arguments.format.as_deref())?;
    let chain = arguments.opening.opener().look_at_raw().chain(&arguments.file, format, Access::ReadOnly)?;
    if let Some(file) = &arguments.svg {
        let output = output::Output::or_standard(file, chain.files().map(|file| file.identity()));
        let output = output.doing(|| "writing the picture".to_owned())?;
        draw(&chain, start, length, Grid::for_page)?.write_svg(&output)?;
    }
    if arguments.picture {
        let columns = print::columns();
        let picture = draw(&chain, start, length, |smallest| Grid::for_terminal(columns, smallest))?;
        print(&picture.text(columns, print::is_coloured()))?;
    }
    match arguments.output {
        _ if arguments.picture || arguments.svg.is_some() => {}
        Output::Json => print_json(&chain, start, length)?,
        Output::Human => print_table(&chain, start, length)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// An entry a line, as qemu-img has it. An empty map has one entry of length zero.
fn print_json(chain: &Chain, start: u64, length: u64) -> Result<()> {
    let mut entries = chain.map(start, length).peekable();
    let nothing = MapEntry { start, ..MapEntry::default() };
    let nothing = entries.peek().is_none().then_some(Ok(nothing));
    let mut separator = "[";
    for entry in nothing.into_iter().chain(entries) {
        print(&format!("{separator}{}", entry?.as_json()))?;
        separator = ",\n";
    }
    print("]\n")
}

fn print_table(chain: &Chain, start: u64, length: u64) -> Result<()> {
    print(&format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File"))?;
    for entry in chain.map(start, length) {
        let entry = entry?;
        if !entry.data || entry.zero {
            continue;
        }
        let (Some(offset), Some(file)) = (entry.offset, &entry.file) else {
            let error =
                Error::unsupported("the image has compressed clusters, which lie at no offset of their own");
            return Err(error.path(chain.layers()[entry.depth].file().path()).hint("use `--output=json`"));
        };
        let [start, length, offset] = [entry.start, entry.length, offset].map(hexadecimal);
        print(&format!("{start:<16}{length:<16}{offset:<16}{}\n", file.shown()))?;
    }
    Ok(())
}

/// Kinds before those of the layers.
const NOWHERE: usize = 0;
const ZEROS: usize = 1;
const LAYERS: usize = 2;

/// The picture of a range: data by layer, what some layer says is zeros, what no layer holds.
fn draw(chain: &Chain, start: u64, length: u64, grid: impl FnOnce(u64) -> Grid) -> Result<Picture> {
    let kind = |symbol, colour, rank, name: String| Kind { symbol, colour, rank, name };
    let mut kinds = vec![
        kind('.', Colour::Empty, 0, "in no layer".to_owned()),
        kind('-', Colour::Faint, 1, "zeros in a layer".to_owned()),
    ];
    kinds.extend(chain.layers().iter().enumerate().map(|(depth, layer)| {
        let name = format!("{depth}: {} ({})", layer.file().path().shown(), layer.format());
        kind(symbol(depth), Colour::Strong(depth), 2, name)
    }));
    let size = chain.virtual_size();
    let (start, end) = (start.min(size), start.saturating_add(length).min(size));
    let title = chain.top().map_or_else(String::new, |top| top.file().path().shown().to_string());
    let mut picture = Picture::new(title, start, end, kinds, grid(smallest(chain)));
    for entry in chain.map(start, length) {
        let entry = entry?;
        let kind = match entry {
            MapEntry { zero: false, data: true, depth, .. } => LAYERS + depth,
            MapEntry { present: true, .. } => ZEROS,
            _ => NOWHERE,
        };
        picture.add(entry.start, entry.length, kind);
    }
    Ok(picture)
}

/// A layer's character; there are only so many.
fn symbol(depth: usize) -> char {
    u32::try_from(depth).ok().and_then(|depth| char::from_digit(depth, 36)).unwrap_or('+')
}

/// Bytes that the top layer holds or does not hold together.
fn smallest(chain: &Chain) -> u64 {
    let clusters = chain.top().and_then(|top| top.as_qcow2()).map(|image| image.header().cluster_size());
    clusters.unwrap_or(4096)
}

/// As C prints `%#x`.
fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
