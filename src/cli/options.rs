//! Options that several subcommands share.

use clap::{Args, ValueEnum};

use crate::chain::{Guess, Opener};
use crate::error::{Error, Result};
use crate::layer::Format;

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
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Opening {
    /// Open images even if another process has them open for writing; what is read may be torn
    #[arg(short = 'U', long)]
    pub(super) force_share: bool,
    /// Trust every image of the chain: recognise formats that images do not record, whatever they lead to
    #[arg(long)]
    pub(super) guess_formats: bool,
}

impl Opening {
    /// As either of them allows.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            force_share: self.force_share || other.force_share,
            guess_formats: self.guess_formats || other.guess_formats,
        }
    }

    /// What opens images that way.
    pub(super) fn opener(self) -> Opener {
        let guess = if self.guess_formats { Guess::Anything } else { Guess::Harmless };
        let opener = Opener::new().guess(guess);
        if self.force_share { opener.force_share() } else { opener }
    }
}

/// Options of qemu-img that lead out of what rebasefs is: refused by name, not as unknown.
#[derive(Clone, Debug, Args)]
pub(super) struct Refused {
    #[arg(long, hide = true)]
    image_opts: bool,
    #[arg(long, hide = true, value_name = "OBJDEF")]
    object: Option<String>,
}

impl Refused {
    /// An error if one of them was typed.
    pub(super) fn check(&self) -> Result<()> {
        if self.image_opts {
            let error =
                Error::unsupported("--image-opts is not supported: rebasefs opens files, not block nodes");
            return Err(error.hint("name the file, and its format with `-f FORMAT`"));
        }
        match &self.object {
            None => Ok(()),
            Some(object) => {
                let what = format!("--object {object} is not supported: rebasefs has no QEMU objects");
                Err(Error::unsupported(what).hint("encrypted and remote images need qemu-img"))
            }
        }
    }
}

/// The format that was typed, if one was.
pub(super) fn format(name: Option<&str>) -> Result<Option<Format>> {
    name.map(Format::from_name).transpose()
}
