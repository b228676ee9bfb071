//! Equal without being read, or without being inflated: what is equal is found, what differs is
//! never taken for equal.

use super::{CLUSTER, backing_of, rebase_keeps_everything};
use crate::scratch::Scratch;

/// Two compressed images of sixteen clusters of text, of which some differ, and an overlay on the
/// first.
fn compressed(options: [&str; 2], overlay: &str, differing: &[usize]) -> Scratch {
    let scratch = Scratch::new();
    let text = |seed: usize| {
        let lines = (0..).map(move |line| format!("{} {seed}\n", line * 7919 % 1000));
        lines.flat_map(String::into_bytes).take(CLUSTER).collect::<Vec<u8>>()
    };
    let mut bytes: Vec<Vec<u8>> = (0..16).map(text).collect();
    scratch.write("old.raw", &bytes.concat());
    for &cluster in differing {
        // Of another length when compressed, which moves all payloads behind it.
        bytes[cluster][100..40_000].fill(b'x');
    }
    scratch.write("new.raw", &bytes.concat());
    for (name, options) in ["old", "new"].iter().zip(options) {
        scratch.qemu_img(&format!("convert -c -f raw -O qcow2 -o {options} {name}.raw {name}"));
    }
    scratch.qemu_img(&format!("create -q -f qcow2 -o {overlay} -b old -F qcow2 cow.qcow2"));
    scratch
}

#[test]
fn compressed_clusters_that_differ_are_copied_whatever_surrounds_them() {
    let options = [
        ["cluster_size=64k", "cluster_size=64k"],
        ["compression_type=zstd", "compression_type=zstd"],
        ["compression_type=zstd", "compression_type=zlib"],
        ["cluster_size=4k", "cluster_size=4k"],
        ["cluster_size=4k", "cluster_size=2M"],
        ["cluster_size=2M", "cluster_size=2M"],
    ];
    for bases in options {
        for overlay in
            ["cluster_size=4k", "cluster_size=64k", "cluster_size=1M", "extended_l2=on,cluster_size=128k"]
        {
            let scratch = compressed(bases, overlay, &[2, 3, 7, 15]);
            rebase_keeps_everything(&scratch, "-b new -F qcow2", &["old", "new"]);
            assert_eq!(backing_of(&scratch, "cow.qcow2").0.as_deref(), Some("new"), "{bases:?} {overlay}");
        }
    }
}

#[test]
fn only_the_clusters_that_differ_are_copied_from_compressed_images() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[5]);
    let said = scratch.rebasefs("rebase --output=json -b new -F qcow2 cow.qcow2");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["copied"], CLUSTER);
    scratch.same("cow.qcow2", "old");
}

/// Nobody could inflate them to see.
#[test]
fn equal_payloads_are_not_inflated() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[]);
    for name in ["old", "new"] {
        let map = scratch.qemu_img(&format!("map --output=json {name}"));
        assert!(map.contains("\"compressed\": true"), "{map}");
        let bytes = std::fs::read(scratch.path(name)).unwrap();
        // The payloads are the end of the file.
        scratch.poke(name, bytes.len() as u64 - 4096, &[0xff; 2048]);
    }
    scratch.rebasefs("rebase -b new -F qcow2 cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2").0.as_deref(), Some("new"));
    scratch.check_clean("cow.qcow2");
}

/// How a stretch of a raw file can be stored. What reads as zeros can be three things.
const STORED: [&str; 5] = ["hole", "zeros", "unwritten", "11", "22"];

/// A raw file in which stretches of `length` bytes are stored in these ways.
fn stored(scratch: &Scratch, name: &str, length: u64, ways: impl Iterator<Item = &'static str>) {
    let ways: Vec<_> = ways.collect();
    scratch.qemu_img(&format!("create -q -f raw {name} {}", ways.len() as u64 * length));
    for (number, way) in (0..).zip(ways) {
        let at = number * length;
        match way {
            "hole" => {}
            "unwritten" => drop(scratch.ok("fallocate", &format!("-o {at} -l {length} {name}"))),
            _ => {
                let byte = u8::from_str_radix(way, 16).unwrap_or(0);
                scratch.poke(name, at, &vec![byte; length as usize]);
            }
        }
    }
}

#[test]
fn however_holes_zeros_and_data_are_laid_out_only_content_counts() {
    let pairs = || STORED.iter().flat_map(|old| STORED.iter().map(move |new| (*old, *new)));
    // Longer than a cluster, and so short that several lie in one.
    for length in [65536, 131_072, 4096, 12288] {
        for processors in ["0", "0,1"] {
            let scratch = Scratch::new();
            stored(&scratch, "old", length, pairs().map(|(old, _)| old));
            stored(&scratch, "new", length, pairs().map(|(_, new)| new));
            scratch.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
            let program = crate::scratch::rebasefs();
            // The program has as many workers as it may use processors.
            let said = scratch.ok(
                "taskset",
                &format!("-c {processors} {program} rebase --output=json -b new -F raw cow.qcow2"),
            );
            scratch.same("cow.qcow2", "old");
            scratch.check_clean("cow.qcow2");
            if length.is_multiple_of(65536) {
                let said: serde_json::Value = serde_json::from_str(&said).unwrap();
                // Data over zeros (three ways, twice) and over other data; zeros over data.
                assert_eq!((&said["copied"], &said["zeroed"]), (&(8 * length).into(), &(6 * length).into()));
                // Holes need no look; space that nobody has written to, mostly.
                assert!(said["equal"].as_u64().unwrap() >= length, "{said}");
            }
        }
    }
}
