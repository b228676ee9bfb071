//! `rebasefs check`: whether an image is sound.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value};

use super::options::{self, Opening, Output, Refused};
use super::print::{complain, print, print_json};
use crate::error::{Error, Result};
use crate::file::Access;
use crate::file::CacheMode;
use crate::layer::Layer;
use crate::layer::qcow2::check::{CheckReport, check};

/// Exit code for a format that has nothing to check.
const NOT_SUPPORTED: u8 = 63;

/// Look for errors and leaked clusters in an image
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 sound, 1 could not be checked, 2 corrupt, 3 leaked clusters, 63 the format has nothing to check.

Example:
  rebasefs check cow.qcow2
  rebasefs check --output=json cow.qcow2 | jq .leaks")]
pub(super) struct Arguments {
    /// Format of the image; without it, it is recognised from the file
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Print findings only, not the summary
    #[arg(short, long)]
    quiet: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Cache mode: writeback, writethrough, none, directsync or unsafe
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    cache: CacheMode,
    #[arg(short, long, hide = true, value_name = "leaks|all")]
    repair: Option<String>,
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
    if let Some(what) = &arguments.repair {
        let error =
            Error::unsupported(format!("--repair {what} is not supported: rebasefs check changes nothing"));
        return Err(error.hint("repair it with `qemu-img check -r`"));
    }
    let format = options::format(arguments.format.as_deref())?;
    let layer = arguments.opening.opener().caching(arguments.cache, arguments.cache).layer(
        &arguments.file,
        format,
        Access::ReadOnly,
    )?;
    let Some(image) = layer.as_qcow2() else {
        complain("rebasefs: This image format does not support checks");
        return Ok(ExitCode::from(NOT_SUPPORTED));
    };
    let report = check(image)?;
    for message in &report.messages {
        complain(message);
    }
    match arguments.output {
        Output::Json => print_json(&as_json(&report, &arguments.file.to_string_lossy(), &*layer))?,
        Output::Human if arguments.quiet => {}
        Output::Human => print(&as_text(&report))?,
    }
    Ok(ExitCode::from(exit_code(&report)))
}

fn exit_code(report: &CheckReport) -> u8 {
    match report {
        CheckReport { check_errors: 1.., .. } => 1,
        CheckReport { corruptions: 1.., .. } => 2,
        CheckReport { leaks: 1.., .. } => 3,
        _ => 0,
    }
}

/// The fields of qemu-img's ImageCheck; those that it leaves out when they are zero are left out.
fn as_json(report: &CheckReport, name: &str, layer: &dyn Layer) -> Value {
    let mut fields = Map::new();
    fields.insert("image-end-offset".into(), report.image_end_offset.into());
    fields.insert("total-clusters".into(), report.total_clusters.into());
    fields.insert("check-errors".into(), report.check_errors.into());
    let optional = [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    for (name, number) in optional.into_iter().filter(|&(_, number)| number > 0) {
        fields.insert(name.into(), number.into());
    }
    fields.insert("filename".into(), name.into());
    fields.insert("format".into(), layer.format().to_string().into());
    fields.into()
}

fn as_text(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.is_sound() && report.leaks == 0 {
        text += "No errors were found on the image.\n";
    }
    let findings = [
        (
            report.corruptions,
            "errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
        ),
        (
            report.leaks,
            "leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.",
        ),
        (report.check_errors, "internal errors have occurred during the check."),
    ];
    for (number, what) in findings.into_iter().filter(|&(number, _)| number > 0) {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n{number} {what}\n");
    }
    text + &shares(report) + &format!("Image end offset: {}\n", report.image_end_offset)
}

fn shares(report: &CheckReport) -> String {
    let CheckReport { total_clusters: total, allocated_clusters: allocated, .. } = *report;
    if total == 0 || allocated == 0 {
        return String::new();
    }
    let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
    format!(
        "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
        percent(allocated, total),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated)
    )
}
