//! The options that say what a rebase shall do: the same on the command line and in `ctl/rebase`.
//!
//! What says where the image is and how the outcome is shown belongs to the command line alone.

use std::ffi::OsString;

use clap::Args;

use super::{Mode, Request};
use crate::error::{Error, Result};
use crate::file::CacheMode;
use crate::layer::{Format, Reference};

/// What was asked for, as it was typed.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Options {
    /// The new backing file, as it is to stand in the header: relative to the image's directory;
    /// "" to have none any more
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<OsString>,
    /// Format of the new backing file; recognised from the file if left out
    #[arg(short = 'F', visible_short_alias = 'B', long, value_name = "FORMAT", value_parser = format_name)]
    pub backing_format: Option<String>,
    /// Unsafe: change the reference only, for a backing file that was moved or renamed
    #[arg(short = 'u', long = "backing-unsafe")]
    pub is_unsafe: bool,
    /// Cache mode of the backing files
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    pub backing_cache: CacheMode,
    /// Change nothing: say what would be compared and copied
    #[arg(long, conflicts_with = "is_unsafe")]
    pub dry_run: bool,
    /// Before the header names the new backing file, compare all that the image will read as, from
    /// what is on disk, with what it reads as now
    #[arg(long, conflicts_with = "is_unsafe")]
    pub verify: bool,
    /// Afterwards, drop what the image holds although the new backing file has the same bytes, and
    /// free its space
    #[arg(long, conflicts_with_all = ["is_unsafe", "dry_run"])]
    pub reclaim: bool,
    /// Store what is copied as compressed clusters, as far as it shrinks
    #[arg(short, long)]
    pub compress: bool,
}

impl Options {
    /// A safe rebase onto the file of this name; an empty name flattens.
    pub fn onto(name: OsString) -> Self {
        Self { backing: Some(name), ..Self::default() }
    }

    /// What the engine is to do.
    ///
    /// # Errors
    /// No backing file is named, or what cannot be done is asked for.
    pub fn request(&self) -> Result<Request> {
        // qemu-img removes the backing file then, silently in unsafe mode.
        let Some(name) = &self.backing else {
            let error = Error::invalid("no backing file given");
            return Err(error.hint("`-b FILE` for another one, `-b \"\"` for none"));
        };
        if let (Some(format), false) = (&self.backing_format, self.is_unsafe) {
            Format::from_name(format)?;
        }
        let reference = || Reference { name: name.clone(), format: self.backing_format.clone() };
        Ok(Request {
            backing: (!name.is_empty()).then(reference),
            mode: if self.is_unsafe { Mode::Unsafe } else { Mode::Safe },
            verify: self.verify,
            reclaim: self.reclaim,
            compress: self.compress,
            differences: None,
        })
    }
}

/// The name of a backing format, as it is to be recorded. To be read it must be one that we read.
fn format_name(name: &str) -> Result<String> {
    match Format::is_named(name) {
        true => Ok(name.to_owned()),
        false => Format::from_name(name).map(|_| name.to_owned()),
    }
}
