//! `rebasefs compare`: whether two images show a guest the same bytes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::options::{self, Opening, Refused};
use super::print::{complain, print};
use crate::chain::Chain;
use crate::chain::compare::{Comparison, Trouble, Verdict};
use crate::error::Result;
use crate::file::{Access, CacheMode};

const DIFFERENT: u8 = 1;
const NO_METADATA: u8 = 3;
const NO_DATA: u8 = 4;

/// Compare the guest-visible bytes of two images
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 identical, 1 different, 2 an image cannot be opened, 3 its tables or 4 its data cannot be read.

Example:
  rebasefs compare -f raw -F qcow2 before.raw cow.qcow2")]
pub(super) struct Arguments {
    /// Format of the first image; without it, it is recognised from the file
    #[arg(short = 'f', long = "a-format", value_name = "FMT")]
    first_format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<String>,
    /// Strict: different sizes and different allocation count as differences
    #[arg(short, long)]
    strict: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Cache mode: writeback, writethrough, none, directsync or unsafe
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    cache: CacheMode,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The first image
    #[arg(value_name = "FILE1")]
    first: PathBuf,
    /// The second image
    #[arg(value_name = "FILE2")]
    second: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let opener = arguments.opening.opener().look_at_raw().caching(arguments.cache, arguments.cache);
    let open = |path, format: &Option<String>| {
        opener.chain(path, options::format(format.as_deref())?, Access::ReadOnly)
    };
    let first = open(&arguments.first, &arguments.first_format)?;
    let second = open(&arguments.second, &arguments.second_format)?;
    let code = match arguments.compare(&first, &second) {
        Ok(code) => code,
        Err(trouble) => {
            let (code, error) = match trouble {
                Trouble::Metadata(error) => (NO_METADATA, error),
                Trouble::Data(error) => (NO_DATA, error),
            };
            complain(&format!("rebasefs: {error}"));
            code
        }
    };
    Ok(ExitCode::from(code))
}

impl Arguments {
    /// Whether `-q` was typed.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }

    fn compare(&self, first: &Chain, second: &Chain) -> Result<u8, Trouble> {
        let (one, two) = (first.virtual_size(), second.virtual_size());
        if self.strict && one != two {
            return self.say(DIFFERENT, "Strict mode: Image size mismatch!");
        }
        let mut meter = Meter { is_shown: self.progress && !self.quiet, total: one.max(two), shown: None };
        let comparison = Comparison { first, second, is_strict: self.strict };
        let mut verdict = comparison.run(0, one.min(two), |done| meter.show(done))?;
        if verdict == Verdict::Same && one != two {
            self.say(0, "Warning: Image size mismatch!")?;
            // The longer one is the same if zeros follow.
            let longer = if one > two { first } else { second };
            let rest = Comparison { first: longer, second: &Chain::default(), is_strict: false };
            verdict = rest.run(one.min(two), one.max(two), |done| meter.show(done))?;
        }
        match verdict {
            Verdict::Same => self.say(0, "Images are identical."),
            Verdict::Content(at) => self.say(DIFFERENT, &format!("Content mismatch at offset {at}!")),
            Verdict::Allocation(at) => {
                self.say(DIFFERENT, &format!("Strict mode: Offset {at} block status mismatch!"))
            }
        }
    }

    fn say(&self, code: u8, text: &str) -> Result<u8, Trouble> {
        if !self.quiet {
            print(&format!("{text}\n")).map_err(Trouble::Data)?;
        }
        Ok(code)
    }
}

/// Progress as qemu-img shows it, at most once a percent.
struct Meter {
    is_shown: bool,
    total: u64,
    shown: Option<u64>,
}

impl Meter {
    fn show(&mut self, done: u64) {
        let percent = done as f64 * 100.0 / self.total.max(1) as f64;
        if self.is_shown && self.shown != Some(percent as u64) {
            self.shown = Some(percent as u64);
            // Progress that nobody can see is no reason to stop.
            let _ = print(&format!("    ({percent:.2}/100%)\r"));
        }
    }
}
