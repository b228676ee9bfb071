//! Bytes written to a control file → a command. Pure: opens nothing, runs nothing.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::words;
use crate::error::{Error, Result};
use crate::layer::Reference;
use crate::rebase::{Mode, Options, Request};
use crate::shown::Shown;

/// No command is longer, in bytes. A backing file name has at most 1023.
const MAX_LENGTH: usize = 4096;

/// What is made of these writes to `ctl/rebase`, and to `ctl/backing`: what a command is in words, or
/// what is wrong with it. For fuzzing, which sees nothing else of this module.
#[doc(hidden)]
pub fn in_words<'a>(writes: impl IntoIterator<Item = &'a [u8]>) -> Vec<Result<String>> {
    let mut line = Line::default();
    let mut said = Vec::new();
    let mut take = |line: Vec<u8>| {
        said.extend([Command::rebase(&line), Command::backing(line)].map(|command| Ok(command?.in_words())));
    };
    for written in writes {
        if let Ok(Some(line)) = line.push(written) {
            take(line);
        }
    }
    line.finish().map(take);
    said
}

/// What somebody wrote to a control file since it was opened, as far as it is not yet a command.
#[derive(Debug, Default)]
pub(super) struct Line {
    bytes: Vec<u8>,
}

impl Line {
    /// Takes what was written. The line, once its newline has come; what is refused is forgotten.
    pub(super) fn push(&mut self, written: &[u8]) -> Result<Option<Vec<u8>>> {
        self.bytes.extend_from_slice(written);
        let end = self.bytes.iter().position(|&byte| byte == b'\n');
        let length = end.unwrap_or(self.bytes.len());
        let follows = end.map_or(0, |end| self.bytes.len() - end - 1);
        if length > MAX_LENGTH {
            self.bytes.clear();
            return Err(Error::invalid(format!("a command has at most {MAX_LENGTH} bytes")));
        }
        if follows > 0 {
            self.bytes.clear();
            return Err(Error::invalid("something follows the newline")
                .hint("one command a write; a name cannot contain a newline here"));
        }
        Ok(end.map(|end| {
            let mut line = std::mem::take(&mut self.bytes);
            line.truncate(end);
            line
        }))
    }

    /// The line that was written without a newline before the file was closed, if there is one.
    pub(super) fn finish(&mut self) -> Option<Vec<u8>> {
        (!self.bytes.is_empty()).then(|| std::mem::take(&mut self.bytes))
    }
}

/// A job that somebody asks for.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) task: Task,
    pub(super) options: Options,
    pub(super) request: Request,
}

/// What is to be done with the backing file that a command names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Rebase,
    /// Find out what a rebase would do.
    Rehearse,
    /// Find out where it differs from the present one.
    Compare,
}

impl Command {
    /// What a line in `ctl/backing` asks for: a safe rebase onto the file that it names, or, if it is the
    /// word `flatten`, onto none. Spaces belong to the name. An empty line is most often a variable
    /// of the shell that has no value.
    pub(super) fn backing(line: Vec<u8>) -> Result<Self> {
        refuse_stray_bytes(&line, "the name")?;
        match &line[..] {
            b"" => Err(Error::invalid("an empty line names no backing file")
                .hint("`echo flatten > ctl/backing` is a rebase onto none")),
            b"flatten" => Self::new(Task::Rebase, Options::onto(OsString::new())),
            _ => Self::new(Task::Rebase, Options::onto(OsString::from_vec(line))),
        }
    }

    /// What a line in `ctl/difference` asks for: a comparison with the file that it names, an empty one
    /// with none. Spaces belong to the name.
    pub(super) fn difference(line: Vec<u8>) -> Result<Self> {
        refuse_stray_bytes(&line, "the name")?;
        Self::new(Task::Compare, Options::onto(OsString::from_vec(line)))
    }

    /// What a line in `ctl/rebase` asks for: the options of `rebasefs rebase`, as a shell splits
    /// them.
    pub(super) fn rebase(line: &[u8]) -> Result<Self> {
        refuse_stray_bytes(line, "the line")?;
        let options = words::options(line)?;
        Self::new(if options.dry_run { Task::Rehearse } else { Task::Rebase }, options)
    }

    fn new(task: Task, options: Options) -> Result<Self> {
        Ok(Self { task, request: options.request()?, options })
    }

    /// Whether it lets guests see other bytes.
    pub(super) fn changes_bytes(&self) -> bool {
        self.request.mode == Mode::Unsafe
    }

    /// In words that can be read in a sentence.
    pub(super) fn in_words(&self) -> String {
        let kind = match (self.task, self.request.mode) {
            (Task::Compare, _) => return format!("comparison with {}", self.backing_in_words()),
            (Task::Rehearse, _) => "dry run: ",
            (Task::Rebase, Mode::Unsafe) => "unsafe: ",
            (Task::Rebase, Mode::Safe) => "",
        };
        match &self.request.backing {
            Some(_) => format!("{kind}rebase onto {}", self.backing_in_words()),
            None if self.changes_bytes() => format!("{kind}remove the backing file"),
            None => format!("{kind}flatten"),
        }
    }

    fn backing_in_words(&self) -> String {
        let name = |backing: &Reference| format!("'{}'", backing.name.shown());
        self.request.backing.as_ref().map_or_else(|| "no backing file".to_owned(), name)
    }
}

fn refuse_stray_bytes(line: &[u8], what: &str) -> Result<()> {
    if line.contains(&0) {
        return Err(Error::invalid(format!("{what} contains a NUL byte")));
    }
    if line.last() == Some(&b'\r') {
        return Err(Error::invalid(format!("{what} ends with a carriage return"))
            .hint("was the line written with the line ends of Windows? end it with a newline alone"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(line: &[u8]) -> Option<OsString> {
        let command = Command::backing(line.to_vec()).unwrap();
        command.request.backing.map(|reference| reference.name)
    }

    #[test]
    fn a_newline_completes_what_came_in_pieces() {
        let mut line = Line::default();
        assert_eq!(line.push(b"new").unwrap(), None);
        assert_eq!(line.push(b".img\n").unwrap(), Some(b"new.img".to_vec()));
        assert_eq!(line.finish(), None);
    }

    #[test]
    fn a_line_without_newline_is_complete_when_the_file_is_closed() {
        let mut line = Line::default();
        assert_eq!(line.finish(), None);
        line.push(b"new.img").unwrap();
        assert_eq!(line.finish(), Some(b"new.img".to_vec()));
        assert_eq!(line.finish(), None);
    }

    #[test]
    fn a_word_flattens_an_empty_line_is_refused_and_nothing_at_all_does_nothing() {
        let mut line = Line::default();
        assert_eq!(named(b"flatten"), None);
        assert_eq!(named(b"./flatten"), Some("./flatten".into()));
        assert_eq!(named(b"flatten "), Some("flatten ".into()));
        assert_eq!(line.push(b"\n").unwrap(), Some(Vec::new()));
        let refused = Command::backing(Vec::new()).unwrap_err();
        assert_eq!(refused.kind(), crate::error::ErrorKind::InvalidArgument);
        assert_eq!(line.push(b"").unwrap(), None);
        assert_eq!(line.finish(), None);
    }

    #[test]
    fn spaces_and_any_bytes_but_nul_belong_to_the_name() {
        assert_eq!(named(b"  a b "), Some("  a b ".into()));
        assert_eq!(named("ä.img".as_bytes()), Some("ä.img".into()));
        assert_eq!(named(b"\xff"), Some(OsString::from_vec(vec![0xff])));
        assert!(Command::backing(b"a\0b".to_vec()).unwrap_err().to_string().contains("NUL"));
        assert!(Command::backing(b"a\r".to_vec()).unwrap_err().to_string().contains("line ends of Windows"));
    }

    #[test]
    fn a_command_reads_well_in_a_sentence() {
        let words = |line: &[u8]| Command::rebase(line).unwrap().in_words();
        assert_eq!(Command::backing(b"a b".to_vec()).unwrap().in_words(), "rebase onto 'a b'");
        assert_eq!(words(b"--dry-run -b x"), "dry run: rebase onto 'x'");
        assert_eq!(words(b"-u -F raw -b 'a b'"), "unsafe: rebase onto 'a b'");
        assert_eq!(words(b"-b ''"), "flatten");
        assert_eq!(words(b"-u -b ''"), "unsafe: remove the backing file");
        let words = |line: &[u8]| Command::difference(line.to_vec()).unwrap().in_words();
        assert_eq!([words(b"a b"), words(b"")], ["comparison with 'a b'", "comparison with no backing file"]);
    }

    #[test]
    fn what_is_too_long_or_two_lines_is_refused_and_forgotten() {
        let mut line = Line::default();
        assert_eq!(line.push(&[b'a'; MAX_LENGTH]).unwrap(), None);
        assert!(line.push(b"a").unwrap_err().to_string().contains("at most 4096"));
        assert_eq!(line.finish(), None);
        assert!(line.push(b"a\nb").unwrap_err().to_string().contains("follows the newline"));
        assert_eq!(line.finish(), None);
    }
}
