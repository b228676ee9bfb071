//! `ctl/map`: the map of the chain as JSON, made as it is read. Keeps no more of it than one read wants,
//! since the map of a large disk in many pieces is larger than memory should be.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::{Chain, MapEntry};
use crate::error::Result;

/// How long the text is, in bytes; `None` if the map cannot be read, or when `stop` says so.
pub(super) fn length(chain: &Chain, stop: &AtomicBool) -> Option<u64> {
    let (mut entries, mut bytes) = (0, 0);
    for entry in chain.map(0, u64::MAX) {
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        entries += 1;
        bytes += entry.ok()?.as_json().len() as u64;
    }
    if entries == 0 {
        (entries, bytes) = (1, MapEntry::default().as_json().len() as u64);
    }
    // Brackets, a newline at the end, and what divides the entries.
    let between = 2 * (entries - 1);
    Some(bytes + between + 3)
}

/// A reader's place in the text.
#[derive(Debug, Default)]
pub(super) struct MapText {
    /// The text that was made last, and where in the whole it begins.
    text: Vec<u8>,
    begin: u64,
    /// The guest offset from which on nothing was written yet.
    guest: u64,
    is_finished: bool,
}

impl MapText {
    /// Fills `buffer` with the text from `offset` on; returns how much there was. Whoever goes back has
    /// it made anew from the beginning.
    pub(super) fn read(&mut self, chain: &Chain, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if offset < self.begin || offset == 0 {
            *self = Self::default();
        }
        let end = offset + buffer.len() as u64;
        let mut entries = chain.map(self.guest, u64::MAX);
        while self.end() < end && !self.is_finished {
            self.forget_before(offset);
            let next = entries.next().transpose()?;
            self.add(next);
        }
        self.forget_before(offset);
        let start = offset.saturating_sub(self.begin).min(self.text.len() as u64) as usize;
        let length = buffer.len().min(self.text.len() - start);
        buffer[..length].copy_from_slice(&self.text[start..start + length]);
        Ok(length)
    }

    fn end(&self) -> u64 {
        self.begin + self.text.len() as u64
    }

    fn forget_before(&mut self, offset: u64) {
        let read = offset.saturating_sub(self.begin).min(self.text.len() as u64);
        // Not for each line: the rest is moved.
        if read >= 1 << 16 || read == self.text.len() as u64 {
            self.text.drain(..read as usize);
            self.begin += read;
        }
    }

    /// An entry a line, as qemu-img has it. An empty map has one entry of length zero.
    fn add(&mut self, entry: Option<MapEntry>) {
        let is_first = self.begin == 0 && self.text.is_empty();
        let entry = if is_first { Some(entry.unwrap_or_default()) } else { entry };
        match entry {
            Some(entry) => {
                self.text.extend_from_slice(if is_first { b"[" } else { b",\n" });
                self.text.extend_from_slice(entry.as_json().as_bytes());
                self.guest = entry.start + entry.length;
            }
            None => {
                self.text.extend_from_slice(b"]\n");
                self.is_finished = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::chain::Opener;
    use crate::file::Access;

    fn read_all(chain: &Chain, piece: usize) -> String {
        let (mut map, mut all) = (MapText::default(), Vec::new());
        loop {
            let mut buffer = vec![0; piece];
            match map.read(chain, all.len() as u64, &mut buffer).unwrap() {
                0 => return String::from_utf8(all).unwrap(),
                length => all.extend_from_slice(&buffer[..length]),
            }
            assert!(map.text.len() <= (1 << 16) + piece + 200);
        }
    }

    #[test]
    fn the_text_is_the_same_in_pieces_of_any_size_and_when_it_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        (0..1000).for_each(|n| file.write_all_at(&[7], n * 16384).unwrap());
        let chain = Opener::new().chain(&path, None, Access::ReadOnly).unwrap();
        let text = read_all(&chain, 1 << 20);
        assert_eq!(length(&chain, &AtomicBool::new(false)), Some(text.len() as u64));
        assert_eq!(length(&chain, &AtomicBool::new(true)), None);
        assert!(text.starts_with("[{ \"start\": 0") && text.ends_with("}]\n") && text.lines().count() > 1900);
        assert_eq!(read_all(&chain, 4096), text);
        assert_eq!(read_all(&chain, 77), text);
        let (mut map, mut buffer) = (MapText::default(), [0; 10]);
        for offset in [150_000, 3, 70_000, 0] {
            assert_eq!(map.read(&chain, offset, &mut buffer).unwrap(), 10);
            assert_eq!(buffer, text.as_bytes()[offset as usize..][..10]);
        }
        assert_eq!(map.read(&chain, 1 << 40, &mut buffer).unwrap(), 0);
        assert_eq!(map.read(&chain, text.len() as u64 - 4, &mut buffer).unwrap(), 4);
        assert!(text.as_bytes().ends_with(&buffer[..4]));
    }

    #[test]
    fn an_empty_map_has_one_entry() {
        let text = read_all(&Chain::default(), 4096);
        assert_eq!(length(&Chain::default(), &AtomicBool::new(false)), Some(text.len() as u64));
        assert!(text.starts_with("[{ \"start\": 0, \"length\": 0,") && text.ends_with("}]\n"), "{text}");
    }
}
