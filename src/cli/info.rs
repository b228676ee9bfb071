//! `rebasefs info` (skeleton).

use std::process::ExitCode;

use clap::Args;

use crate::error::{Error, Result};

/// Not built yet.
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments) -> Result<ExitCode> {
    Err(Error::unsupported("not built yet"))
}
