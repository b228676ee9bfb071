//! Reading: what the library says of an image against what `qemu-img convert` makes of it.
//!
//! Owns the comparison: byte for byte, in pieces of many sizes, and every extent against the bytes
//! that it stands for. The images are drawn in the modules, one a kind of trouble.

mod chains;
mod clusters;
mod damage;
mod features;
mod hostile;
mod mounted;
mod names;
mod random;
mod snapshots;

use rebasefs::chain::{Chain, Opener, Owned};
use rebasefs::error::Result;
use rebasefs::file::Access;
use rebasefs::layer::{Detail, ExtentKind, GuestOffset};

use crate::random_chain::Random;
use crate::scratch::Scratch;

/// Opens an image of the scratch directory and all below it, as its user does.
pub fn open(s: &Scratch, image: &str) -> Result<Chain> {
    Opener::new().chain(&s.path(image), None, Access::ReadOnly)
}

/// The message of an image that cannot be opened.
pub fn open_fails(s: &Scratch, image: &str) -> String {
    open(s, image).expect_err("opening the image must fail").to_string()
}

/// The library reads from `image` what qemu-img converts it to. `cell` says in a failure which of
/// the many images of a test it was.
pub fn reads_like_qemu(s: &Scratch, format: &str, image: &str, cell: &str) {
    let chain = open(s, image).unwrap_or_else(|e| panic!("{cell}: {e}"));
    reads_as(&chain, &s.guest_bytes(format, image), cell);
}

/// The chain reads as these bytes, whole and in pieces, and its extents say so too.
pub fn reads_as(chain: &Chain, expected: &[u8], cell: &str) {
    assert_eq!(chain.virtual_size(), expected.len() as u64, "{cell}: virtual size");
    for piece in [4 << 20, 65536, 4095, 512] {
        reads_in_pieces(chain, expected, piece, cell);
    }
    reads_at_odd_places(chain, expected, cell);
    for detail in [Detail::Owner, Detail::Holes] {
        for at_most in [u64::MAX, 5000] {
            extents_tell_the_truth(chain, expected, detail, at_most, cell);
        }
        runs_tell_the_truth(chain.extents(.., detail).joined(), chain, expected, cell);
        runs_tell_the_truth(chain.extents(.., detail), chain, expected, cell);
    }
}

fn reads_in_pieces(chain: &Chain, expected: &[u8], piece: usize, cell: &str) {
    let mut buffer = vec![0xee; piece];
    for (number, bytes) in expected.chunks(piece).enumerate() {
        let at = number * piece;
        let found = &mut buffer[..bytes.len()];
        chain.read_at(GuestOffset(at as u64), found).unwrap_or_else(|e| panic!("{cell}: {e}"));
        same_bytes(found, bytes, at, cell);
    }
}

/// At offsets and of lengths that fit no boundary; also across the end, where zeros follow.
fn reads_at_odd_places(chain: &Chain, expected: &[u8], cell: &str) {
    let mut random = Random::new(expected.len() as u64);
    for _ in 0..200 {
        let at = random.below(expected.len() as u64 + 1000) as usize;
        let mut found = vec![0xee; 1 + random.below(100_000) as usize];
        let mut bytes = expected.get(at..).unwrap_or_default().to_vec();
        bytes.resize(found.len(), 0);
        chain.read_at(GuestOffset(at as u64), &mut found).unwrap_or_else(|e| panic!("{cell}: {e}"));
        same_bytes(&found, &bytes, at, cell);
    }
}

fn extents_tell_the_truth(chain: &Chain, expected: &[u8], detail: Detail, at_most: u64, cell: &str) {
    let mut at = 0;
    while at < expected.len() {
        let asked = at_most.min((expected.len() - at) as u64);
        let owned = chain.extent_at(GuestOffset(at as u64), asked, detail);
        let owned = owned.unwrap_or_else(|e| panic!("{cell}: {e}"));
        let length = owned.extent.length;
        assert!((1..=asked).contains(&length), "{cell}: {owned:?} at {at:#x}, {asked} bytes asked for");
        let bytes = &expected[at..at + length as usize];
        same_bytes(&bytes_of(chain, owned), bytes, at, &format!("{cell}: {detail:?} says {owned:?}"));
        at += length as usize;
    }
}

/// Extents that leave nothing out.
fn runs_tell_the_truth(
    runs: impl Iterator<Item = Result<(GuestOffset, Owned)>>,
    chain: &Chain,
    expected: &[u8],
    cell: &str,
) {
    let mut end = 0;
    for run in runs {
        let (at, owned) = run.unwrap_or_else(|e| panic!("{cell}: {e}"));
        assert_eq!(at.0 as usize, end, "{cell}: a run begins where the one before ends");
        let found = bytes_of(chain, owned);
        same_bytes(&found, &expected[end..end + found.len()], end, &format!("{cell}: {owned:?}"));
        end += found.len();
    }
    assert_eq!(end, expected.len(), "{cell}: the whole disk");
}

/// The bytes that an extent says it stands for.
fn bytes_of(chain: &Chain, owned: Owned) -> Vec<u8> {
    let mut bytes = vec![0; owned.extent.length as usize];
    let layer = owned.depth.map(|depth| &chain.layers()[depth]);
    match (owned.extent.kind, layer) {
        (ExtentKind::Data(host), Some(layer)) => layer.data_file().read_at(host, &mut bytes),
        (ExtentKind::Compressed(place), Some(layer)) => layer.read_compressed(place, &mut bytes),
        (ExtentKind::Zero(_), Some(_)) | (ExtentKind::NotMine, None) => Ok(()),
        _ => panic!("an owner and a kind that contradict each other: {owned:?}"),
    }
    .expect("reading what an extent stands for");
    bytes
}

fn same_bytes(found: &[u8], expected: &[u8], at: usize, cell: &str) {
    if let Some(i) = found.iter().zip(expected).position(|(a, b)| a != b) {
        let (a, b) = (found[i], expected[i]);
        panic!("{cell}: {a:#04x} at guest offset {:#x}, expected {b:#04x}", at + i);
    }
}
