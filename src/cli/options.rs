//! Options that several subcommands share.

use clap::{Args, ValueEnum};

use crate::chain::{Guess, Opener};

/// How a result is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs, with the fields that qemu-img prints.
    Json,
}

/// How images are opened.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Opening {
    /// Open images even if another process has them open for writing; what is read may be torn
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Trust every image of the chain: recognise formats that images do not record, whatever they lead to
    #[arg(long)]
    guess_formats: bool,
}

impl Opening {
    /// What opens images that way.
    pub(super) fn opener(self) -> Opener {
        let guess = if self.guess_formats { Guess::Anything } else { Guess::Harmless };
        let opener = Opener::new().guess(guess);
        if self.force_share { opener.force_share() } else { opener }
    }
}
