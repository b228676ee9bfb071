//! `rebasefs map`: which layer holds what.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::options::{self, Opening, Output, Refused};
use super::print::print;
use super::size;
use crate::chain::{Chain, MapEntry};
use crate::error::{Error, Result};
use crate::file::Access;

/// Show which layer of the chain holds which bytes of the disk
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs map --output=json cow.qcow2
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
    #[arg(short, long, value_name = "LENGTH")]
    max_length: Option<String>,
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
    let chain = arguments.opening.opener().chain(&arguments.file, format, Access::ReadOnly)?;
    match arguments.output {
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
        print(&format!("{separator}{}", line(&entry?)))?;
        separator = ",\n";
    }
    print("]\n")
}

fn line(entry: &MapEntry) -> String {
    let MapEntry { start, length, depth, present, zero, data, compressed, offset, .. } = entry;
    let offset = offset.map(|offset| format!(", \"offset\": {offset}")).unwrap_or_default();
    format!(
        "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
         \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
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
            return Err(error.path(chain.layers()[entry.depth].file().path()).hint("use --output=json"));
        };
        let [start, length, offset] = [entry.start, entry.length, offset].map(hexadecimal);
        print(&format!("{start:<16}{length:<16}{offset:<16}{}\n", file.display()))?;
    }
    Ok(())
}

/// As C prints `%#x`.
fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
