//! Printing: what several subcommands write to the standard output, and in which words.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use super::progress;
use crate::chain::info::json;
use crate::error::{Error, Result};
use crate::shown;

/// Writes text to the standard output. A reader that has gone away (`… | head`) has what it wanted.
pub(super) fn print(text: &str) -> Result<()> {
    let write = || {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    };
    match progress::aside(write) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io(e, "cannot write to the standard output"))
        }
        _ => Ok(()),
    }
}

/// Writes a line of diagnosis to the standard error.
pub(super) fn complain(text: &str) {
    // Where it cannot be written there is nobody to tell.
    let _ = progress::aside(|| writeln!(io::stderr().lock(), "{}", shown::line(text)));
}

/// How many columns the terminal on the standard error has; 80 where nobody knows.
pub(super) fn columns_of_stderr() -> u16 {
    terminal_size::terminal_size_of(io::stderr()).map_or(80, |(width, _)| width.0)
}

/// The same of the standard output. Where that is no terminal, `COLUMNS` can say it.
pub(super) fn columns() -> usize {
    let said = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| usize::from(width.0));
    terminal.or_else(said).filter(|columns| *columns > 0).unwrap_or(80)
}

/// Whether colours are wanted on the standard output: it is a terminal that has them, and neither
/// `NO_COLOR` nor another convention says otherwise.
pub(super) fn is_coloured() -> bool {
    anstream::AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never
}

/// Whether the locale has more characters than ASCII: the first of its variables that is set says so.
pub(super) fn is_unicode() -> bool {
    let said = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| std::env::var(name).unwrap_or_default());
    let locale = said.into_iter().find(|value| !value.is_empty()).unwrap_or_default().to_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Writes a value as qemu-img writes JSON: indented by four spaces, with a newline at the end.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(json(value)? + "\n"))
}
