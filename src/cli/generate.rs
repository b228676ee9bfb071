//! `rebasefs generate`: manual pages and shell completions, made from the command line's own
//! definition, so that they are never behind it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand, ValueHint};
use clap_complete::Shell;

use super::print::print;
use crate::error::{Context, Error, Result};
use crate::file::CacheMode;
use crate::file::output::Output;
use crate::layer::Format;

/// Make manual pages, or completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs generate man /usr/local/share/man/man1
  rebasefs generate completions bash > /usr/share/bash-completion/completions/rebasefs")]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Write a manual page for the program and each command into a directory
    Man {
        /// The directory, which is made if it is missing
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// `command` is the whole command line.
pub(super) fn run(arguments: Arguments, mut command: clap::Command) -> Result<ExitCode> {
    match arguments.what {
        What::Man { directory } => {
            std::fs::create_dir_all(&directory)
                .map_err(|e| Error::io(e, "cannot write the manual pages").path(&directory))?;
            let mut command = command.disable_help_subcommand(true);
            command.build();
            write_pages(command, &directory).doing(|| "writing the manual pages".to_owned())?;
        }
        What::Completions { shell } => {
            let mut text = Vec::new();
            command.build();
            let mut command = with_values(command);
            clap_complete::generate(shell, &mut command, "rebasefs", &mut text);
            print(&String::from_utf8_lossy(&text))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A page for the command and each of its subcommands.
fn write_pages(command: clap::Command, directory: &Path) -> Result<()> {
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write_pages(subcommand.clone(), directory)?;
    }
    let page = clap_mangen::Man::new(command);
    Output::new(&directory.join(page.get_filename()), [])?.write(|mut out| page.render(&mut out))
}

/// The same command line with the values that a shell can offer where the command itself takes more: it says
/// what is wrong with a format that it does not know.
fn with_values(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = command.mut_args(|argument| {
        let offered: &[&str] = match argument.get_id().as_str() {
            "format" | "a_format" | "b_format" | "backing_format" => &Format::NAMES,
            "cache" | "backing_cache" => &CacheMode::NAMES,
            "backing" => return argument.value_hint(ValueHint::FilePath),
            "mountpoint" | "directory" => return argument.value_hint(ValueHint::DirPath),
            _ => return argument,
        };
        argument.value_parser(PossibleValuesParser::new(offered))
    });
    names.iter().fold(command, |command, name| command.mut_subcommand(name, with_values))
}
