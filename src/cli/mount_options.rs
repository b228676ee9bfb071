//! What follows `-o` of `rebasefs mount`: the words of mount(8), and those that say the command's own
//! options where there is no other place for them, as in `/etc/fstab`.

use std::path::PathBuf;
use std::str::FromStr;

use super::options::Opening;
use crate::error::{Error, Result};
use crate::layer::Format;
use crate::mount::{MountOptions, Writing};

/// The words of one `-o`, or of several.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    pub mount: MountOptions,
    pub format: Option<Format>,
    pub threads: Option<u16>,
    pub log: Option<PathBuf>,
    pub opening: Opening,
    pub writing: Writing,
    /// Whether `rw` is among them, which lets nothing be written to the disk.
    pub say_rw: bool,
}

impl Words {
    /// The last word on a matter counts.
    pub(super) fn merged(several: Vec<Self>) -> Self {
        let mount = MountOptions::merged(several.iter().map(|words| words.mount.clone()).collect());
        several.into_iter().fold(Self { mount, ..Self::default() }, |all, next| Self {
            mount: all.mount,
            format: next.format.or(all.format),
            threads: next.threads.or(all.threads),
            log: next.log.or(all.log),
            opening: all.opening.or(next.opening),
            writing: all.writing.max(next.writing),
            say_rw: all.say_rw || next.say_rw,
        })
    }

    fn add(&mut self, word: &str) -> Result<()> {
        match word.split_once('=') {
            None if word == "force_share" => self.opening.force_share = true,
            None if word == "guess_formats" => self.opening.guess_formats = true,
            None if word == "rw" => {
                self.say_rw = true;
                self.mount.add(word)?;
            }
            // `rw` is what mount(8) says of every mount.
            None if word == "writable" => self.writing = self.writing.max(Writing::Bytes),
            None if word == "growable" => self.writing = Writing::BytesAndSize,
            Some(("format", name)) => self.format = Some(Format::from_name(name)?),
            Some(("log", file)) => self.log = Some(file.into()),
            Some(("threads", number)) => self.threads = Some(threads(number)?),
            _ => self.mount.add(word)?,
        }
        Ok(())
    }
}

/// How many threads may serve.
pub(super) fn threads(typed: &str) -> Result<u16> {
    let number = typed.parse().ok().filter(|number| (1..=256).contains(number));
    number.ok_or_else(|| {
        Error::invalid(format!("'{typed}' is no number of threads")).hint("from 1 to 256 are possible")
    })
}

impl FromStr for Words {
    type Err = Error;

    /// Words separated by commas.
    fn from_str(list: &str) -> Result<Self> {
        let mut words = Self::default();
        list.split(',').filter(|word| !word.is_empty()).try_for_each(|word| words.add(word))?;
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_own_options_are_words_too() {
        let list = ["format=qcow2,ro,threads=3,nofail", "log=/var/log/a,force_share", "threads=4,writable"];
        let words = Words::merged(list.map(|list| list.parse().unwrap()).into());
        assert_eq!((words.format, words.threads), (Some(Format::Qcow2), Some(4)));
        assert_eq!(words.log.as_deref(), Some("/var/log/a".as_ref()));
        assert_eq!(words.writing, Writing::Bytes);
        assert!(words.opening.force_share && !words.opening.guess_formats);
    }

    #[test]
    fn wrong_values_are_refused() {
        for (list, words) in
            [("threads=0", "1 to 256"), ("threads=x", "'x'"), ("format=vhdy", "vhdy"), ("logg=a", "logg=a")]
        {
            let error = list.parse::<Words>().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
