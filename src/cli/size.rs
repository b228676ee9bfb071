//! Sizes as people type and read them, by QEMU's rules.
//!
//! Pure.

use crate::error::{Error, Result};

/// Units from small to large; each is 1024 times the one before.
const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const SUFFIXES: &str = "bkmgtpe";

/// A number of bytes: decimal with a suffix (`1.5G`), or hexadecimal (`0x1000`). `what` names it in
/// the error.
pub(super) fn parse(text: &str, what: &str) -> Result<u64> {
    let wrong = || {
        Error::invalid(format!("invalid {what} '{text}'"))
            .hint("write it like `512`, `64k`, `1.5G` or `0x200`")
    };
    let bytes = bytes(text.trim_start()).ok_or_else(wrong)?;
    match i64::try_from(bytes) {
        Ok(_) => Ok(bytes as u64),
        Err(_) => Err(Error::invalid(format!("invalid {what} '{text}': at most {} is possible", i64::MAX))),
    }
}

/// Exact: the fraction of a number like `0.1T` is cut off, as QEMU cuts it.
fn bytes(text: &str) -> Option<u128> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok().map(u128::from);
    }
    let last = text.chars().last()?;
    let (number, shift) = match last.is_ascii_digit() || last == '.' {
        true => (text, 0),
        false => (text.strip_suffix(last)?, 10 * SUFFIXES.find(last.to_ascii_lowercase())?),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    // Bytes cannot be divided; QEMU takes a fraction of nothing.
    let is_divided = shift == 0 && fraction.bytes().any(|digit| digit != b'0');
    if whole.len() + fraction.len() == 0 || !is_number(whole) || !is_number(fraction) || is_divided {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let fraction = format!("0.{fraction}0").parse::<f64>().ok()?;
    whole.checked_mul(1 << shift)?.checked_add((fraction * (1u64 << shift) as f64) as u128)
}

/// A number of bytes with three significant digits: `193 KiB`, `1.5 GiB`.
pub(super) fn text(bytes: u64) -> String {
    // The next unit from 1000 on, so that there are never four digits before the point.
    let unit = (0..UNITS.len() - 1).find(|&n| (bytes as f64) < 1000.0 * 1024f64.powi(n as i32));
    let unit = unit.unwrap_or(UNITS.len() - 1);
    let value = bytes as f64 / 1024f64.powi(unit as i32);
    format!("{} {}", significant(value, 3), UNITS[unit])
}

/// Like C's `%.{digits}g` for values below 10^`digits`.
fn significant(value: f64, digits: usize) -> String {
    let before_point = if value < 1.0 { 0 } else { format!("{}", value.trunc()).len() };
    let text = format!("{value:.*}", digits.saturating_sub(before_point));
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        // Rounded up to one digit more than there is room for.
        false if text.len() > digits => format!("1e+{digits:02}"),
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
            (99_960 << 10, "97.6 MiB"),
            (1023 << 10, "0.999 MiB"),
            (1_048_260_000, "1e+03 MiB"),
            (10_484_711, "10 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, words) in cases {
            assert_eq!(text(bytes), words);
        }
    }

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let read = |text| parse(text, "size").ok();
        let right = [
            ("0", 0),
            ("1.5k", 1536),
            ("0x10", 16),
            ("1B", 1),
            (" 5", 5),
            ("+5", 5),
            ("0.1k", 102),
            ("1.k", 1024),
            ("1.", 1),
            ("1024.0", 1024),
            ("1.0b", 1),
            (".5k", 512),
            ("64K", 65536),
            ("7.9E", 9_108_079_886_394_091_136),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, bytes) in right {
            assert_eq!(read(text), Some(bytes), "{text}");
        }
        for text in ["", "k", "1.5", "1e3", "1kb", "5 ", "-5", "8E", "9223372036854775808", "1.2.3k", "é"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
