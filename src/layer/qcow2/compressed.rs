//! Compressed clusters: from the bytes in the file to the bytes of the cluster, and back.
//!
//! Pure: no I/O. The output has a fixed size, so a payload that inflates without end costs no more
//! than a cluster; and a frame that demands more memory than any cluster can need is refused.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::header::Compression;
use crate::error::{Error, Result};

/// log2 of the largest window that a Zstandard frame may ask for: what every decoder should offer
/// (RFC 8878, *Window Descriptor*), and four times the largest cluster. The library would take 128 MiB.
const WINDOW_LOG_MAX: u32 = 23;

/// Fills `cluster` from `payload`, which may be followed by bytes that do not belong to it.
///
/// # Errors
/// The payload is no such stream, or ends before the cluster is full.
pub fn inflate(compression: Compression, payload: &[u8], cluster: &mut [u8]) -> Result<()> {
    let filled = match compression {
        Compression::Zlib => inflate_zlib(payload, cluster),
        Compression::Zstd => inflate_zstd(payload, cluster),
    };
    match filled {
        Some(length) if length == cluster.len() => Ok(()),
        Some(length) => {
            let what = format!("the compressed cluster holds {length} bytes only of {}", cluster.len());
            Err(Error::corrupt(what))
        }
        None => Err(Error::corrupt("the compressed cluster cannot be decompressed")),
    }
}

/// A raw deflate stream. What it would hold beyond the cluster is not looked at, as in QEMU.
fn inflate_zlib(payload: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        if written == cluster.len() {
            return Some(written);
        }
        let status = stream.decompress(&payload[read..], &mut cluster[written..], FlushDecompress::Finish);
        let stuck = (stream.total_in() as usize, stream.total_out() as usize) == (read, written);
        match status.ok()? {
            Status::StreamEnd => return Some(stream.total_out() as usize),
            Status::Ok | Status::BufError if stuck => return None,
            Status::Ok | Status::BufError => {}
        }
    }
}

fn inflate_zstd(payload: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let mut decoder = Decoder::new().ok()?;
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).ok()?;
    let mut input = InBuffer::around(payload);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        let hint = decoder.run(&mut input, &mut output).ok()?;
        if output.pos() == output.capacity() || hint == 0 && input.pos() == payload.len() {
            return Some(output.pos());
        }
        if (input.pos(), output.pos()) == before {
            return None;
        }
    }
}

/// The payload of a cluster, or `None` where it would not be smaller than the cluster itself.
pub fn deflate(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut payload = vec![0; cluster.len() - 1];
    let length = match compression {
        Compression::Zlib => {
            // QEMU inflates with a window of 2^12 bytes only.
            let mut stream = Compress::new_with_window_bits(flate2::Compression::default(), false, 12);
            let status = stream.compress(cluster, &mut payload, FlushCompress::Finish).ok()?;
            (status == Status::StreamEnd).then_some(stream.total_out() as usize)?
        }
        Compression::Zstd => zstd::bulk::compress_to_buffer(cluster, &mut payload, 0).ok()?,
    };
    payload.truncate(length);
    Some(payload)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const KINDS: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    proptest! {
        #[test]
        fn no_payload_makes_inflating_panic(payload in vec(any::<u8>(), 0..600), size in 9..17u32) {
            for compression in KINDS {
                let _ = inflate(compression, &payload, &mut vec![0; 1 << size]);
            }
        }

        #[test]
        fn no_damage_makes_inflating_panic(at in 0..40usize, byte: u8, end in 0..400usize) {
            for compression in KINDS {
                let mut payload = deflate(compression, &sample()).unwrap();
                payload.truncate(end.max(1));
                let at = at % payload.len();
                payload[at] = byte;
                let _ = inflate(compression, &payload, &mut vec![0; 65536]);
            }
        }

        #[test]
        fn what_is_deflated_inflates_to_the_same(bytes in vec(0..4u8, 1024)) {
            for compression in KINDS {
                let payload = deflate(compression, &bytes).unwrap();
                let mut cluster = vec![0xee; bytes.len()];
                inflate(compression, &payload, &mut cluster).unwrap();
                prop_assert_eq!(&cluster, &bytes);
            }
        }
    }

    fn sample() -> Vec<u8> {
        (0..65536u32).map(|i| (i / 7) as u8).collect()
    }

    /// A frame that says it needs a window of 2^`log` bytes; one block of one byte, repeated.
    fn zstd_frame(log: u8, length: u32) -> Vec<u8> {
        let block = length << 3 | 1 << 1 | 1;
        let head = [0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3];
        [&head[..], &block.to_le_bytes()[..3], &[0x5a]].concat()
    }

    #[test]
    fn a_zstd_frame_that_demands_a_huge_window_is_refused() {
        let mut cluster = vec![0; 65536];
        inflate(Compression::Zstd, &zstd_frame(23, 65536), &mut cluster).unwrap();
        assert!(cluster == vec![0x5a; 65536]);
        for log in [24, 27, 31, 41] {
            assert!(inflate(Compression::Zstd, &zstd_frame(log, 65536), &mut cluster).is_err(), "2^{log}");
        }
    }

    #[test]
    fn a_payload_that_inflates_without_end_fills_the_cluster_and_no_more() {
        for compression in KINDS {
            let payload = deflate(compression, &vec![0x77; 64 << 20]).unwrap();
            let mut cluster = vec![0; 65536];
            inflate(compression, &payload, &mut cluster).unwrap();
            assert!(cluster == vec![0x77; 65536]);
        }
    }

    #[test]
    fn both_kinds_survive_a_round_trip_with_garbage_behind_the_payload() {
        for compression in KINDS {
            let mut payload = deflate(compression, &sample()).unwrap();
            payload.extend([0xaa; 300]);
            let mut cluster = vec![0; 65536];
            inflate(compression, &payload, &mut cluster).unwrap();
            assert_eq!(cluster, sample());
        }
    }

    #[test]
    fn a_payload_that_is_too_short_or_nonsense_is_refused() {
        for compression in KINDS {
            let payload = deflate(compression, &sample()).unwrap();
            let mut cluster = vec![0; 65536];
            assert!(inflate(compression, &payload[..payload.len() / 2], &mut cluster).is_err());
            assert!(inflate(compression, &[0xff; 512], &mut cluster).is_err());
            assert!(inflate(compression, &[], &mut cluster).is_err());
            assert!(inflate(compression, &payload, &mut vec![0; 131_072]).is_err());
        }
    }
}
