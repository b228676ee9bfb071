//! Differences in a file: JSON, bound to the files that they were found between.
//!
//! Whoever loads one trusts it as he trusts the images: what it does not list is not compared. A file
//! that was cut short, changed or made for other chains is refused; memory stays bounded by its size.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::layers::{self, SavedLayer};
use super::{Difference, MAX_RANGES};
use crate::chain::Chain;
use crate::error::{Context, Error, Result};
use crate::file::Identity;
use crate::file::output::Output;

/// What the file says it is.
const TYPE: &str = "rebasefs difference";
/// Changes when old programs would misread new files.
const VERSION: u32 = 2;
/// A larger file is not read. The most ranges of one difference take about half of it.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    #[serde(rename = "type")]
    kind: String,
    version: u32,
    /// SHA-256 of `differences` as it is written, in hexadecimal.
    checksum: String,
    #[serde(borrow)]
    differences: &'a serde_json::value::RawValue,
}

/// A difference and what it is bound to.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    /// The chains, top first.
    old: Vec<SavedLayer>,
    new: Vec<SavedLayer>,
    /// Start and end in bytes of guest address space.
    ranges: Vec<(u64, u64)>,
}

impl Saved {
    /// A difference that was found between these chains.
    pub(super) fn new(old: &Chain, new: &Chain, difference: &Difference) -> Result<Self> {
        Ok(Self { old: layers::saved(old)?, new: layers::saved(new)?, ranges: difference.ranges.clone() })
    }

    fn check(&self) -> std::result::Result<(), &'static str> {
        let is_in_order = self.ranges.iter().all(|(start, end)| start < end)
            && self.ranges.windows(2).all(|pair| pair[0].1 < pair[1].0);
        match is_in_order && self.ranges.len() <= MAX_RANGES {
            true => Ok(()),
            false => Err("its ranges are empty, too many or not in order"),
        }
    }
}

/// Writes differences to a file, which is there as a whole afterwards or as it was before. It must be none of
/// those `in_play`.
pub(super) fn save(
    path: &Path,
    differences: &[Saved],
    in_play: impl Iterator<Item = Identity>,
) -> Result<()> {
    let saved = Output::new(path, in_play).and_then(|output| output.write(|out| write(out, differences)));
    saved.doing(|| "saving the difference".to_owned())
}

fn write(out: &mut dyn Write, differences: &[Saved]) -> std::io::Result<()> {
    let differences = serde_json::value::to_raw_value(differences)?;
    let checksum = checksum(&differences);
    let document = Document { kind: TYPE.to_owned(), version: VERSION, checksum, differences: &differences };
    serde_json::to_writer(&mut *out, &document)?;
    out.write_all(b"\n")
}

fn checksum(differences: &serde_json::value::RawValue) -> String {
    layers::hexadecimal(&Sha256::digest(differences.get().as_bytes()))
}

/// Reads a file of differences.
pub(super) fn load(path: &Path) -> Result<Vec<Saved>> {
    let read = || {
        let file = File::open(path).map_err(|e| Error::io(e, "cannot open for reading"))?;
        let mut text = String::new();
        let limited = file.take(MAX_BYTES + 1).read_to_string(&mut text);
        limited.map_err(|e| Error::io(e, "cannot read"))?;
        match text.len() as u64 > MAX_BYTES {
            true => Err(not_ours("is too large to be one")),
            false => decode(&text),
        }
    };
    read().path(path).doing(|| "loading a difference".to_owned())
}

fn decode(text: &str) -> Result<Vec<Saved>> {
    let not_valid = |e: serde_json::Error| not_ours(&format!("is not one: {e}"));
    let document: Document<'_> = serde_json::from_str(text).map_err(not_valid)?;
    if document.kind != TYPE {
        return Err(not_ours("is not one"));
    }
    if document.version != VERSION {
        let what = format!("is of version {}, this program knows {VERSION}", document.version);
        return Err(Error::unsupported(what).hint(NEW));
    }
    if document.checksum != checksum(document.differences) {
        return Err(not_ours("was changed after it was saved (another checksum)"));
    }
    let differences: Vec<Saved> = serde_json::from_str(document.differences.get()).map_err(not_valid)?;
    differences.iter().try_for_each(Saved::check).map_err(not_ours)?;
    Ok(differences)
}

const NEW: &str = "a new one is made with `--save-difference FILE`";

fn not_ours(what: &str) -> Error {
    Error::corrupt(what).hint(NEW)
}

/// Of the differences in the file at `path` the one between these chains as they are now.
pub(super) fn choose(path: &Path, saved: &[Saved], old: &Chain, new: &Chain) -> Result<Difference> {
    let (old, new) = (layers::saved(old)?, layers::saved(new)?);
    let mut why = None;
    for one in saved {
        let Some(mismatch) = layers::mismatch(&one.old, &old).or_else(|| layers::mismatch(&one.new, &new))
        else {
            return Ok(Difference { ranges: one.ranges.clone() });
        };
        // The one that is meant says best what is wrong.
        let is_meant = layers::have_same_top(&one.old, &old) && layers::have_same_top(&one.new, &new);
        if is_meant || why.is_none() {
            why = Some(mismatch);
        }
    }
    let what = match why {
        Some(why) => format!("does not fit: {why}"),
        None => "is empty".to_owned(),
    };
    Err(Error::invalid(what)
        .path(path)
        .hint("leave out `--difference`, or make it anew with `--save-difference FILE`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ranges: &[(u64, u64)]) -> String {
        let mut bytes = Vec::new();
        let saved = Saved { old: Vec::new(), new: Vec::new(), ranges: ranges.to_vec() };
        write(&mut bytes, &[saved]).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_was_written_is_read_back() {
        assert_eq!(decode(&text(&[(0, 4096), (8192, u64::MAX)])).unwrap()[0].ranges.len(), 2);
    }

    #[test]
    fn whatever_is_changed_or_cut_off_is_refused() {
        let text = text(&[(0, 4096), (8192, 65536)]);
        for length in 0..text.trim_end().len() {
            decode(&text[..length]).unwrap_err();
        }
        for (at, byte) in text.trim_end().bytes().enumerate() {
            for other in [b'0', b'9', b'"', b'x'].into_iter().filter(|other| *other != byte) {
                let mut bytes = text.clone().into_bytes();
                bytes[at] = other;
                decode(&String::from_utf8(bytes).unwrap()).unwrap_err();
            }
        }
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        for ranges in [&[(5, 5)][..], &[(9, 5)], &[(0, 5), (5, 9)], &[(6, 9), (0, 5)], &[(0, 5), (3, 9)]] {
            assert!(decode(&text(ranges)).is_err(), "{ranges:?}");
        }
    }
}
