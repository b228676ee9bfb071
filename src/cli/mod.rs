//! The command line: what was typed, checked, handed to the library, printed. One file a
//! subcommand.

mod check;
mod compare;
mod create;
mod info;
mod map;
mod mount;
mod options;
mod rebase;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Result;

/// Mount a copy-on-write disk image as a flat file, and rebase it safely while it is mounted.
#[derive(Debug, Parser)]
#[command(name = "rebasefs", version, about, subcommand_required = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::Arguments),
    Rebase(rebase::Arguments),
    Info(info::Arguments),
    Map(map::Arguments),
    Compare(compare::Arguments),
    Check(check::Arguments),
    Create(create::Arguments),
}

impl Cli {
    /// Does what was typed. The exit codes are those of qemu-img's command of the same name.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Mount(arguments) => mount::run(arguments),
            Command::Rebase(arguments) => rebase::run(arguments),
            Command::Info(arguments) => info::run(arguments),
            Command::Map(arguments) => map::run(arguments),
            Command::Compare(arguments) => compare::run(arguments),
            Command::Check(arguments) => check::run(arguments),
            Command::Create(arguments) => create::run(arguments),
        }
    }
}
