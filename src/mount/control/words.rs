//! A line of options, as a shell would split it, → what they mean. Pure.
//!
//! The options are those of `rebasefs rebase`. Those that say which image, how it was opened or how
//! the outcome is printed have no meaning in a mount, and are refused with the reason.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::error::{Error, Result};
use crate::rebase::Options;
use crate::shown::Shown;

/// An option of the command line that means nothing here: its long and short name, whether a value
/// follows, and why it is refused.
struct Refused(&'static str, Option<char>, ArgAction, &'static str);

const REFUSED: [Refused; 11] = [
    Refused("format", Some('f'), ArgAction::Set, "the image is open already"),
    Refused("cache", Some('t'), ArgAction::Set, "the image is open already"),
    Refused("force-share", Some('U'), ArgAction::SetTrue, "the image is open already"),
    Refused(
        "guess-formats",
        None,
        ArgAction::SetTrue,
        "it is an option of mount: `rebasefs mount --guess-formats IMAGE DIRECTORY`",
    ),
    Refused("output", None, ArgAction::Set, "the outcome is in ctl/status, and ranges are in ctl/rebase"),
    Refused("progress", Some('p'), ArgAction::SetTrue, "ctl/status shows how far it has come"),
    Refused("quiet", Some('q'), ArgAction::SetTrue, "nothing is printed here"),
    Refused("help", Some('h'), ArgAction::SetTrue, "`rebasefs rebase --help` prints it"),
    Refused("image-opts", None, ArgAction::SetTrue, "the image is open already"),
    Refused("object", None, ArgAction::Set, "rebasefs has no QEMU objects"),
    Refused(IMAGE, None, ArgAction::Set, "the image is the one that is mounted; a backing file follows -b"),
];

/// The one word that is no option.
const IMAGE: &str = "image";

/// The options in a line.
///
/// # Errors
/// One line that says what is wrong with them.
pub(super) fn options(line: &[u8]) -> Result<Options> {
    let mut words = shlex::bytes::Shlex::new(line);
    let typed: Vec<OsString> = words.by_ref().map(OsString::from_vec).collect();
    if words.had_error {
        let error = Error::invalid("a quotation mark is not closed, or nothing follows a backslash");
        return Err(error.hint("the line is split into words as by a shell"));
    }
    let matches = command().try_get_matches_from(typed).map_err(|e| in_one_line(&e))?;
    refuse(&matches)?;
    Options::from_arg_matches(&matches).map_err(|e| in_one_line(&e))
}

fn command() -> Command {
    let command = Command::new("ctl/rebase").no_binary_name(true).disable_help_flag(true);
    Options::augment_args(command).args(REFUSED.map(|Refused(name, short, action, _)| {
        // Any bytes: it is refused whatever it says.
        let parser = if action.takes_values() { ValueParser::os_string() } else { ValueParser::bool() };
        let arg = Arg::new(name).action(action).value_parser(parser).hide(true);
        let arg = if name == IMAGE { arg } else { arg.long(name) };
        match short {
            Some(short) => arg.short(short),
            None => arg,
        }
    }))
}

fn refuse(matches: &ArgMatches) -> Result<()> {
    let is_typed = |name| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
    let Some(Refused(name, short, _, why)) = REFUSED.iter().find(|refused| is_typed(refused.0)) else {
        return Ok(());
    };
    let what = match (*name, short) {
        (IMAGE, _) => {
            let word = matches.get_one::<OsString>(IMAGE).map(|word| word.shown().to_string());
            format!("'{}'", word.unwrap_or_default())
        }
        (name, Some(short)) => format!("-{short} (--{name})"),
        (name, None) => format!("--{name}"),
    };
    Err(Error::invalid(format!("{what} has no place in ctl/rebase")).hint(*why))
}

/// What clap says in paragraphs: the first one, and its advice.
fn in_one_line(error: &clap::Error) -> Error {
    let text = error.to_string();
    let mut paragraphs = text.split("\n\n").map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    let first = paragraphs.next().unwrap_or_default();
    let what = Error::invalid(first.strip_prefix("error: ").unwrap_or(&first));
    match paragraphs.find_map(|text| text.strip_prefix("tip: ").map(str::to_owned)) {
        Some(tip) => what.hint(tip),
        // A value that one of our own errors refuses has the hint of that one.
        None if first.ends_with(')') => what,
        None => what.hint("`rebasefs rebase --help` explains the options"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(line: &str) -> String {
        let said = options(line.as_bytes()).unwrap_err().to_string();
        assert!(!said.contains('\n'), "{said}");
        said
    }

    #[test]
    fn words_are_split_as_by_a_shell() {
        let typed = options(b"-u -F raw  -b 'a  b'\\''s \"new\".img'").unwrap();
        assert_eq!(typed.backing, Some("a  b's \"new\".img".into()));
        assert!(typed.is_unsafe && typed.backing_format == Some("raw".to_owned()));
        let typed = options(b"--dry-run --backing=\xff").unwrap();
        assert_eq!(typed.backing, Some(OsString::from_vec(vec![0xff])));
        assert!(typed.dry_run && !typed.is_unsafe);
        assert_eq!(options(b"-b ''").unwrap().backing, Some("".into()));
    }

    #[test]
    fn what_is_wrong_fits_one_line() {
        assert!(wrong("-b 'new.img").contains("not closed"));
        assert!(wrong("-b").contains("a value is required for '--backing <FILE>'"));
        assert!(wrong("-b x --dry-runs").contains("unexpected argument '--dry-runs' found"));
        assert!(wrong("-b x --dry-runs").contains("a similar argument exists: '--dry-run'"));
        assert!(wrong("-b x -u --verify").contains("cannot be used with"));
        let said = wrong("-b x -F floppy");
        assert!(said.contains("floppy") && said.matches(" (").count() == 1, "{said}");
        assert!(wrong("-b x -b y").contains("cannot be used multiple times"));
    }

    #[test]
    fn what_means_nothing_here_is_refused_with_the_reason() {
        for (line, words) in [
            ("-f qcow2 -b x", "-f (--format) has no place in ctl/rebase (the image is open already)"),
            (
                "-b x cow.qcow2",
                "'cow.qcow2' has no place in ctl/rebase (the image is the one that is mounted",
            ),
            ("-p -b x", "-p (--progress) has no place"),
            ("-qb x", "-q (--quiet) has no place"),
            ("--output json -b x", "ranges are in ctl/rebase"),
            ("-U -b x", "-U (--force-share)"),
            ("-t none -b x", "-t (--cache)"),
            ("--help", "(`rebasefs rebase --help` prints it)"),
            (
                "--guess-formats -b x",
                "it is an option of mount: `rebasefs mount --guess-formats IMAGE DIRECTORY`",
            ),
            ("--object secret,id=x -b x", "rebasefs has no QEMU objects"),
        ] {
            assert!(wrong(line).contains(words), "{line}: {}", wrong(line));
        }
    }
}
