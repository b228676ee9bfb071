//! Text as a person may be shown it: on one line, and without anything that a terminal obeys. What an
//! image, a name or another program can hold is written with escapes here, and nowhere else.
//!
//! Escapes are Rust's: `\n`, `\u{1b}`, and `\xff` for a byte that is no UTF-8. A backslash stays as it
//! is: what is shown is for reading, and programs have `--output=json`.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::{self, Display, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether a terminal or a reader of lines takes the character for anything but itself: control
/// characters, what ends a line, and what turns the direction of the text around it. A tab is harmless.
fn is_harmful(c: char) -> bool {
    let turns_or_ends = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() && c != '\t' || turns_or_ends
}

/// The same text, on one line.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    // Writing to a string cannot fail.
    let _ = OneLine(&mut shown).write_str(text);
    shown.into()
}

/// JSON text, in which strings alone can hold what is harmful: there it is written as JSON escapes it.
pub(crate) fn json(text: &str) -> Cow<'_, str> {
    // JSON's own line ends stand between its values; in a string they are escaped already.
    let is_harmful = |c: char| is_harmful(c) && c != '\n';
    if !text.contains(is_harmful) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        // Writing to a string cannot fail. None of them is beyond U+FFFF.
        let _ = match is_harmful(c) {
            true => write!(shown, "\\u{:04x}", u32::from(c)),
            false => shown.write_char(c),
        };
    }
    shown.into()
}

/// What is written through it comes out on one line.
pub(crate) struct OneLine<W>(pub W);

impl<W: Write> Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(is_harmful) {
            let (before, from) = rest.split_at(at);
            self.0.write_str(before)?;
            let mut characters = from.chars();
            characters.next().into_iter().try_for_each(|c| write!(self.0, "{}", c.escape_default()))?;
            rest = characters.as_str();
        }
        self.0.write_str(rest)
    }
}

/// Names, which may have any bytes.
pub(crate) trait Shown {
    /// The name on one line.
    fn shown(&self) -> impl Display;
}

impl Shown for OsStr {
    fn shown(&self) -> impl Display {
        Name(self)
    }
}

impl Shown for Path {
    fn shown(&self) -> impl Display {
        Name(self.as_os_str())
    }
}

struct Name<'a>(&'a OsStr);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_bytes().utf8_chunks() {
            OneLine(&mut *f).write_str(chunk.valid())?;
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_escaped_and_nothing_else() {
        for harmless in ["", "a b\tc", "größer 大", "C:\\vm\\new.img", "'\"%`$"] {
            assert!(matches!(line(harmless), Cow::Borrowed(same) if same == harmless));
        }
        assert_eq!(line("a\u{1b}[31m\nb\r\u{7f}\u{9b}2J\0"), "a\\u{1b}[31m\\nb\\r\\u{7f}\\u{9b}2J\\u{0}");
        assert_eq!(line("\u{202e}gpj.img\u{2028}"), "\\u{202e}gpj.img\\u{2028}");
    }

    #[test]
    fn names_show_the_bytes_that_are_no_text() {
        let name = OsStr::from_bytes(b"n\xff\xc3\xa4\xe2\x82\n");
        assert_eq!(name.shown().to_string(), "n\\xffä\\xe2\\x82\\n");
        assert_eq!(Path::new(name).shown().to_string(), "n\\xffä\\xe2\\x82\\n");
    }

    #[test]
    fn json_stays_the_same_value() {
        let name = "a\u{7f}\u{9b}\u{202e}\u{1b}\nä";
        let written = serde_json::to_string_pretty(&[name]).unwrap();
        let shown = json(&written);
        assert_eq!(shown, "[\n  \"a\\u007f\\u009b\\u202e\\u001b\\nä\"\n]");
        assert_eq!(serde_json::from_str::<[String; 1]>(&shown).unwrap(), [name]);
    }
}
