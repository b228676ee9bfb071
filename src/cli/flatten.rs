//! `rebasefs flatten`: a rebase onto no backing file, with the same options where they make sense.

use std::process::ExitCode;

use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::rebase;
use crate::error::Result;

/// What is typed: as for `rebase`, without what a backing file needs.
#[derive(Debug)]
pub(super) struct Arguments(rebase::Arguments);

impl Arguments {
    /// Whether `-q` was typed.
    pub(super) fn is_quiet(&self) -> bool {
        self.0.is_quiet()
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    rebase::run(&arguments.0)
}

impl Args for Arguments {
    fn augment_args(command: Command) -> Command {
        let command = rebase::Arguments::augment_args(command);
        ["backing", "backing_format", "is_unsafe", "reclaim", "save_difference", "difference"]
            .into_iter()
            .fold(command, |command, name| command.mut_arg(name, |argument| argument.hide(true)))
            .mut_arg("images", |argument| argument.help("The image to flatten, or several"))
            .about("Let an image hold all that the guest sees, and need no backing file any more")
            .long_about(None)
            .after_help(
                "Examples:\n  rebasefs flatten cow.qcow2\n  rebasefs flatten -c --progress=bar *.qcow2",
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Arguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        rebase::Arguments::from_arg_matches(matches)?.flattening().map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
