//! Compressed clusters. The first byte chooses kind and cluster size, the rest is the payload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebasefs::layer::qcow2::Compression;
use rebasefs::layer::qcow2::testing::{deflate, inflate};

fuzz_target!(|bytes: &[u8]| {
    let Some((&shape, payload)) = bytes.split_first() else { return };
    let kind = if shape & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    let size = 1 << (9 + u32::from(shape >> 1) % 13);
    // Every byte of the cluster comes from the payload, none from what was in the buffer before.
    let (mut one, mut other) = (vec![0; size], vec![0xff; size]);
    let first = inflate(kind, payload, &mut one);
    let second = inflate(kind, payload, &mut other);
    assert_eq!(first.is_ok(), second.is_ok());
    if first.is_ok() {
        assert!(one == other);
        if let Some(again) = deflate(kind, &one).filter(|_| size <= 4096) {
            inflate(kind, &again, &mut other).expect("we have made it");
            assert!(one == other);
        }
    }
});
