//! `rebasefs info`: what can be said of an image without reading guest data.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::options::{self, Opening, Output, Refused};
use super::print::{print, print_json};
use super::size;
use crate::chain::info::{Child, FormatSpecific, ImageInfo, SnapshotInfo};
use crate::error::{Error, Result};
use crate::file::Access;
use crate::shown;
use crate::sys;

/// Show what an image is: sizes, backing file, snapshots, features
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs info cow.qcow2
  rebasefs info --output=json --backing-chain cow.qcow2 | jq -r '.[].filename'")]
pub(super) struct Arguments {
    /// Format of the image; without it, it is recognised from the file
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Show the images below it, too
    #[arg(short, long)]
    backing_chain: bool,
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
    let infos = arguments.look()?;
    match arguments.output {
        Output::Human => {
            let texts: Vec<String> = infos.iter().map(text).collect::<Result<_>>()?;
            print(&texts.join("\n"))?;
        }
        Output::Json if arguments.backing_chain => print_json(&infos)?,
        Output::Json => infos.iter().try_for_each(print_json)?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn look(&self) -> Result<Vec<ImageInfo>> {
        let opener = self.opening.opener().look_at_raw().forgive_l1();
        let format = options::format(self.format.as_deref())?;
        if self.backing_chain {
            let chain = opener.chain(&self.file, format, Access::ReadOnly)?;
            return chain.layers().iter().map(|layer| ImageInfo::of(&**layer)).collect();
        }
        let layer = opener.layer(&self.file, format, Access::ReadOnly)?;
        Ok(vec![ImageInfo::of(&*layer)?])
    }
}

fn text(info: &ImageInfo) -> Result<String> {
    let mut lines = vec![
        format!("image: {}", shown::line(&info.filename)),
        format!("file format: {}", info.format),
        format!("virtual size: {} ({} bytes)", size::text(info.virtual_size), info.virtual_size),
        format!("disk size: {}", size::text(info.actual_size)),
    ];
    lines.extend(info.cluster_size.map(|bytes| format!("cluster_size: {bytes}")));
    lines.extend(info.dirty_flag.then(|| "cleanly shut down: no".to_owned()));
    let shown = |name: &Option<String>| name.as_ref().map(|name| shown::line(name).into_owned());
    lines.extend(shown(&info.backing_filename).map(|name| match shown(&info.full_backing_filename) {
        None => format!("backing file: {name} (cannot determine actual path)"),
        Some(full) if full == name => format!("backing file: {name}"),
        Some(full) => format!("backing file: {name} (actual path: {full})"),
    }));
    lines.extend(shown(&info.backing_filename_format).map(|name| format!("backing file format: {name}")));
    if !info.snapshots.is_empty() {
        lines.push("Snapshot list:".to_owned());
        lines.push(columns(&["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"].map(str::to_owned)));
        lines.extend(info.snapshots.iter().map(snapshot_line));
    }
    let mut text = lines.join("\n") + "\n";
    if let Some(specific) = &info.format_specific {
        text += "Format specific information:\n";
        text += &specific_text(specific)?;
    }
    info.children.iter().for_each(|child| text += &child_text(child));
    Ok(text)
}

fn specific_text(specific: &FormatSpecific) -> Result<String> {
    let value = serde_json::to_value(specific);
    let value = value.map_err(|e| Error::io(e.into(), "cannot describe the format"))?;
    let mut text = String::new();
    outline(&mut text, 1, &value["data"]);
    Ok(text)
}

/// A JSON value as an outline: dashes of names become spaces, lists are numbered.
fn outline(text: &mut String, depth: usize, value: &Value) {
    let entries: Vec<(String, &Value)> = match value {
        Value::Object(members) => {
            members.iter().map(|(name, value)| (name.replace('-', " "), value)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(n, value)| (format!("[{n}]"), value)).collect(),
        _ => return,
    };
    for (name, value) in entries {
        let indent = " ".repeat(4 * depth);
        // Writing to a string cannot fail.
        let _ = match value {
            Value::Object(_) | Value::Array(_) => writeln!(text, "{indent}{name}:"),
            Value::String(word) => writeln!(text, "{indent}{name}: {}", shown::line(word)),
            other => writeln!(text, "{indent}{name}: {other}"),
        };
        outline(text, depth + 1, value);
    }
}

fn child_text(child: &Child) -> String {
    let Child { name, info } = child;
    format!(
        "Child node '/{name}':\n    filename: {}\n    protocol type: {}\n    file length: {} ({} bytes)\n    \
         disk size: {}\n",
        shown::line(&info.filename),
        info.format,
        size::text(info.virtual_size),
        info.virtual_size,
        size::text(info.actual_size)
    )
}

fn snapshot_line(snapshot: &SnapshotInfo) -> String {
    let date = match sys::local_time(i64::from(snapshot.date_sec)) {
        Some([year, month, day, hour, minute, second]) => {
            format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
        }
        None => snapshot.date_sec.to_string(),
    };
    let (seconds, milliseconds) = (snapshot.vm_clock_sec, snapshot.vm_clock_nsec / 1_000_000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    columns(&[
        shown::line(&snapshot.id).into_owned(),
        shown::line(&snapshot.name).into_owned(),
        size::text(snapshot.vm_state_size),
        date,
        format!("{hours:04}:{minutes:02}:{:02}.{milliseconds:03}", seconds % 60),
        snapshot.icount.map_or_else(|| "--".to_owned(), |count| count.to_string()),
    ])
}

/// Columns as wide as qemu-img's, counted in bytes: two to the left, the others to the right.
fn columns(cells: &[String; 6]) -> String {
    let widths: [usize; 6] = [7, 16, 8, 19, 15, 10];
    let padded = cells.iter().zip(widths).enumerate().map(|(n, (cell, width))| {
        let padding = " ".repeat(width.saturating_sub(cell.len()));
        if n < 2 { format!("{cell}{padding}") } else { format!("{padding}{cell}") }
    });
    padded.collect::<Vec<_>>().join(" ")
}
