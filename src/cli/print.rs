//! Printing: what several subcommands write to the standard output, and in which words.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;
use serde_json::ser::PrettyFormatter;

use crate::error::{Error, Result};

/// Writes text to the standard output. A reader that has gone away (`… | head`) has what it wanted.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io(e, "cannot write to the standard output"))
        }
        _ => Ok(()),
    }
}

/// Writes a line of diagnosis to the standard error.
pub(super) fn complain(text: &str) {
    // Where it cannot be written there is nobody to tell.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes a value as qemu-img writes JSON: indented by four spaces, with a newline at the end.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(json(value)? + "\n"))
}

/// A value as qemu-img writes JSON.
pub(super) fn json(value: &impl Serialize) -> Result<String> {
    let mut bytes = Vec::new();
    let mut serializer =
        serde_json::Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"    "));
    let written = value.serialize(&mut serializer);
    written.map_err(|e| Error::io(e.into(), "cannot write JSON"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A number of bytes with three significant digits: `193 KiB`, `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The next unit from 1000 on, so that there are never four digits before the point.
    let unit = (0..UNITS.len() - 1).find(|&n| (bytes as f64) < 1000.0 * 1024f64.powi(n as i32));
    let unit = unit.unwrap_or(UNITS.len() - 1);
    let value = bytes as f64 / 1024f64.powi(unit as i32);
    format!("{} {}", significant(value, 3), UNITS[unit])
}

/// Like C's `%.{digits}g` for values that need no exponent.
fn significant(value: f64, digits: usize) -> String {
    let whole = format!("{value:.0}").len();
    let text = format!("{value:.*}", digits.saturating_sub(whole));
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_worded_as_qemu_words_them() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (197_632, "193 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            (1000 << 20, "0.977 GiB"),
            (10_000_000, "9.54 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }
}
