//! `rebasefs check`: whether an image is sound; with `-r`, making it so.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::options::{self, Opening, Output, Refused};
use super::print::{complain, print, print_json};
use crate::chain::{Chain, Opener};
use crate::error::{Error, Result};
use crate::file::{Access, CacheMode};
use crate::layer::qcow2::check::{CheckReport, check};
use crate::layer::qcow2::repair::{self, Repaired};
use crate::layer::{Format, Layer};
use crate::rebase::{Below, ForWriting};

/// Exit code for a format that has nothing to check.
const NOT_SUPPORTED: u8 = 63;

/// Look for errors and leaked clusters in an image
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 sound, 1 could not be checked, 2 corrupt, 3 leaked clusters, 63 the format has nothing to check.

Example:
  rebasefs check cow.qcow2
  rebasefs check -r leaks cow.qcow2
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
    /// Repair the image: leaked clusters, or all errors of refcounts and their flags as well
    #[arg(short, long, value_enum, value_name = "WHAT")]
    repair: Option<Repair>,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// What is to be repaired, in qemu-img's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Repair {
    /// Free what is not used.
    Leaks,
    /// Also errors of refcounts, and refcount structures.
    All,
}

impl From<Repair> for repair::Repair {
    fn from(typed: Repair) -> Self {
        match typed {
            Repair::Leaks => Self::Leaks,
            Repair::All => Self::All,
        }
    }
}

impl Arguments {
    /// Whether `-q` was typed.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether it writes.
    pub(super) fn repairs(&self) -> bool {
        self.repair.is_some()
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let format = options::format(arguments.format.as_deref())?;
    let access = if arguments.repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let opener = arguments.opening.opener().forgive_l1().caching(arguments.cache, arguments.cache);
    if arguments.repair.is_some() && !opener.takes_locks() {
        let error = Error::invalid("--force-share cannot repair: it opens images beside those who write");
        return Err(error.hint("leave out `-U`"));
    }
    let layer = opener.layer(&arguments.file, format, access)?;
    let Some(image) = layer.as_qcow2() else {
        complain("rebasefs: This image format does not support checks");
        return Ok(ExitCode::from(NOT_SUPPORTED));
    };
    let outcome = match arguments.repair {
        None => Outcome { left: check(image)?, ..Outcome::default() },
        Some(what) => repaired(&layer, &opener, what)?,
    };
    list(&outcome.before, outcome.unlisted_before);
    list(&outcome.left.messages, outcome.left.unlisted);
    list(&outcome.notes, 0);
    match arguments.output {
        Output::Json => print_json(&as_json(&outcome, &arguments.file.to_string_lossy(), layer.format()))?,
        Output::Human if arguments.quiet => {}
        Output::Human => print(&(fixed(&outcome) + &as_text(&outcome.left)))?,
    }
    Ok(ExitCode::from(exit_code(&outcome.left)))
}

/// What is to be printed.
#[derive(Default)]
struct Outcome {
    /// What was found before a repair, and why not all of it could be repaired.
    before: Vec<String>,
    /// How many more findings there were.
    unlisted_before: u64,
    notes: Vec<String>,
    leaks_fixed: u64,
    corruptions_fixed: u64,
    left: CheckReport,
}

/// A finding a line; of many, how many more there are.
fn list(messages: &[String], unlisted: u64) {
    messages.iter().for_each(|message| complain(message));
    if unlisted > 0 {
        complain(&format!("{unlisted} more findings are counted, and not listed"));
    }
}

fn repaired(layer: &Arc<dyn Layer>, opener: &Opener, what: Repair) -> Result<Outcome> {
    let alone = Chain::new([layer.clone()]);
    let own = ForWriting::open(&alone, opener, Below::Ignored)?;
    let repaired = repair::repair(&own.image, what.into())?;
    let (leaks_fixed, corruptions_fixed) = (repaired.leaks_fixed(), repaired.corruptions_fixed());
    let Repaired { found, left, notes } = repaired;
    let (before, unlisted_before) = match found == left {
        true => Default::default(),
        false => (found.messages, found.unlisted),
    };
    Ok(Outcome { before, unlisted_before, notes, leaks_fixed, corruptions_fixed, left })
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
fn as_json(outcome: &Outcome, name: &str, format: Format) -> Value {
    let report = &outcome.left;
    let mut fields = Map::new();
    fields.insert("image-end-offset".into(), report.image_end_offset.into());
    fields.insert("total-clusters".into(), report.total_clusters.into());
    fields.insert("check-errors".into(), report.check_errors.into());
    let optional = [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", outcome.corruptions_fixed),
        ("leaks-fixed", outcome.leaks_fixed),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    for (name, number) in optional.into_iter().filter(|&(_, number)| number > 0) {
        fields.insert(name.into(), number.into());
    }
    fields.insert("filename".into(), name.into());
    fields.insert("format".into(), format.to_string().into());
    fields.into()
}

fn fixed(outcome: &Outcome) -> String {
    match outcome {
        Outcome { leaks_fixed: 0, corruptions_fixed: 0, .. } => String::new(),
        Outcome { leaks_fixed, corruptions_fixed, .. } => format!(
            "The following inconsistencies were found and repaired:\n\n    \
             {leaks_fixed} leaked clusters\n    {corruptions_fixed} corruptions\n\n\
             Double checking the fixed image now...\n"
        ),
    }
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
