//! `rebasefs rebase`: the engine without a mount, with qemu-img's options.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::options::Opening;
use crate::chain::Chain;
use crate::error::Result;
use crate::file::Access;
use crate::layer::{Format, Reference};
use crate::rebase::{Mode, Progress, Request, rebase};

/// Give an image another backing file and keep every guest-visible byte
///
/// Old and new backing file are compared, what differs is copied into the image, then the header
/// names the new one. If it is stopped at any moment, the image is whole; start it again.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rebasefs rebase -b new.img -F raw cow.qcow2")]
pub(super) struct Arguments {
    /// The new backing file, as it is to stand in the header: relative to the image's directory;
    /// "" to have none any more
    #[arg(short, long, value_name = "FILE")]
    backing: OsString,
    /// Format of the new backing file; recognised from the file if left out
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Unsafe: change the reference only, for a backing file that was moved or renamed
    #[arg(short, long = "unsafe")]
    unsafe_: bool,
    #[command(flatten)]
    opening: Opening,
    /// The image to rebase
    image: PathBuf,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let format = arguments.format.as_deref().map(Format::from_name).transpose()?;
    arguments.backing_format.as_deref().map(Format::from_name).transpose()?;
    let opener = arguments.opening.opener();
    let mode = if arguments.unsafe_ { Mode::Unsafe } else { Mode::Safe };
    let chain = match mode {
        Mode::Safe => opener.chain(&arguments.image, format, Access::ReadWrite)?,
        Mode::Unsafe => Chain::new([opener.layer(&arguments.image, format, Access::ReadWrite)?]),
    };
    let backing = (!arguments.backing.is_empty())
        .then_some(Reference { name: arguments.backing, format: arguments.backing_format });
    rebase(&chain, &opener, &Request { backing, mode }, &Progress::default())?;
    Ok(ExitCode::SUCCESS)
}
