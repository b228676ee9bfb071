//! Texts whose size somebody was told a moment ago: `tar` and `rsync` ask for the size of a file that they
//! have opened, and want to read as much. The kernel does not say which opening is asked about.

use std::time::{Duration, Instant};

use crate::mount::tree::ControlFile;

/// How old a text may be when it is read.
const FRESH: Duration = Duration::from_secs(1);

/// No text is kept that is longer, in bytes.
const MAX_LENGTH: usize = 1 << 20;

/// The last text of each file that may be another one a moment later.
#[derive(Debug, Default)]
pub(super) struct Told {
    texts: [Option<Text>; 2],
    /// How many there were.
    number: u64,
}

#[derive(Debug)]
struct Text {
    number: u64,
    /// Which state of the jobs it tells of.
    change: u64,
    at: Instant,
    text: Vec<u8>,
}

/// Files that say something else although no command was given: figures, and what an image takes on its disk.
fn place(file: ControlFile) -> Option<usize> {
    match file {
        ControlFile::Status => Some(0),
        ControlFile::Info => Some(1),
        _ => None,
    }
}

impl Told {
    /// Notes that somebody was told the size of this text.
    pub(super) fn tell(&mut self, file: ControlFile, change: u64, text: Vec<u8>) {
        if let Some(place) = place(file).filter(|_| text.len() <= MAX_LENGTH) {
            self.number += 1;
            self.texts[place] = Some(Text { number: self.number, change, at: Instant::now(), text });
        }
    }

    /// The text that is to be read, where somebody was told its size since the one with number `last`;
    /// each is read once, and none when the state is another one.
    pub(super) fn text(&self, file: ControlFile, change: u64, last: &mut u64) -> Option<Vec<u8>> {
        let told = self.texts[place(file)?].as_ref()?;
        let is_to_be_read = told.number > *last && told.change == change && told.at.elapsed() < FRESH;
        *last = told.number;
        is_to_be_read.then(|| told.text.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_once_and_not_after_a_change() {
        let mut told = Told::default();
        told.tell(ControlFile::Status, 3, b"state: running".to_vec());
        let mut last = 0;
        assert_eq!(told.text(ControlFile::Info, 3, &mut last), None);
        assert_eq!(told.text(ControlFile::Status, 4, &mut 0), None);
        // Less than a second ago, on any machine but one that stands still.
        let read = told.text(ControlFile::Status, 3, &mut last);
        assert!(read.is_none_or(|text| text == b"state: running"));
        assert_eq!(told.text(ControlFile::Status, 3, &mut last), None);
    }
}
