//! Equal without being read: what is equal is found, what differs is never taken for equal, nor is what
//! cannot be read.

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

/// The rebase fails, as qemu-img's does, and the image is bit for bit what it was.
fn is_refused_and_unchanged(scratch: &Scratch, new: &str, words: &str) {
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
    let theirs = scratch.run("qemu-img", &format!("rebase -f qcow2 -b {new} -F qcow2 qemu.qcow2"));
    assert_ne!(theirs.code, Some(0));
    for verb in ["rebase", "rebase --dry-run"] {
        let said = scratch.rebasefs_fails(1, &format!("{verb} -b {new} -F qcow2 cow.qcow2"));
        assert!(said.contains(words), "{said}");
    }
    assert!(std::fs::read(scratch.path("cow.qcow2")).unwrap() == image, "the image has changed");
}

/// A cluster that neither chain can read is not equal to anything.
#[test]
fn equal_payloads_are_equal_only_if_they_can_be_inflated() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[]);
    for name in ["old", "new"] {
        let map = scratch.qemu_img(&format!("map --output=json {name}"));
        assert!(map.contains("\"compressed\": true"), "{map}");
        let bytes = std::fs::read(scratch.path(name)).unwrap();
        // The payloads are the end of the file.
        scratch.poke(name, bytes.len() as u64 - 4096, &[0xff; 2048]);
    }
    is_refused_and_unchanged(&scratch, "new", "the compressed cluster");
}

/// Where the first L2 entry of an image lies, and what it is: one of a compressed cluster of 64 KiB.
fn first_entry(bytes: &[u8]) -> (usize, u64) {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
    let entry = word(l2 as usize);
    assert!(entry >> 62 & 1 == 1, "{entry:#x} is no compressed cluster");
    (l2 as usize, entry)
}

const OFFSET: u64 = (1 << 54) - 1;

/// The payload of the first cluster, once more, with an entry whose place ends `short` bytes before it
/// would if the last sector were recorded, too.
fn move_payload(scratch: &Scratch, name: &str, short: u64) {
    let mut bytes = std::fs::read(scratch.path(name)).unwrap();
    let (at, entry) = first_entry(&bytes);
    let offset = (entry & OFFSET) as usize;
    let size = ((entry >> 54 & 0xff) + 1) * 512 - (offset % 512) as u64;
    let payload = bytes[offset..(offset + size as usize).min(bytes.len())].to_vec();
    let wanted = size - short;
    // Its place ends where a sector does.
    let start = (bytes.len() as u64 + wanted).next_multiple_of(512) - wanted;
    bytes.resize(start as usize, 0);
    bytes.extend(payload);
    let sectors = (start + wanted) / 512 - start / 512;
    let entry = 1 << 62 | (sectors - 1) << 54 | start;
    bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    scratch.write(name, &bytes);
}

#[test]
fn a_payload_whose_place_is_recorded_too_short_is_not_equal_to_one_that_can_be_read() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[]);
    move_payload(&scratch, "new", 0);
    scratch.same("old", "new");
    move_payload(&scratch, "new", 511);
    assert_ne!(scratch.run("qemu-img", "compare old new").code, Some(0), "QEMU reads it");
    is_refused_and_unchanged(&scratch, "new", "compressed cluster");
}

/// What an image reads is not to depend on what was read before.
#[test]
fn a_place_that_is_too_short_stays_so_when_a_longer_one_was_read_from_there() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[]);
    let mut bytes = std::fs::read(scratch.path("old")).unwrap();
    let (at, entry) = first_entry(&bytes);
    // The second cluster begins where the first one does, and has its first sector alone.
    bytes[at + 8..at + 16].copy_from_slice(&(1 << 62 | entry & OFFSET).to_be_bytes());
    scratch.write("old", &bytes);
    scratch.qemu_io("qcow2", "old", &["read 0 64k"]);
    let theirs = scratch.run_args("qemu-io", &["-r", "-f", "qcow2", "-c", "read 64k 64k", "old"]);
    assert!((theirs.stdout + &theirs.stderr).contains("Input/output error"));
    let chain = rebasefs::Chain::open(scratch.path("old")).unwrap();
    let mut cluster = vec![0; CLUSTER];
    chain.read_at(rebasefs::GuestOffset(0), &mut cluster).unwrap();
    chain.read_at(rebasefs::GuestOffset(CLUSTER as u64), &mut cluster).unwrap_err();
}

/// A cluster that both take from one file reads as before, whatever comes of it: bytes or an error.
#[test]
fn a_damaged_cluster_that_both_chains_share_is_no_reason_to_refuse() {
    let scratch = compressed(["cluster_size=64k"; 2], "cluster_size=64k", &[]);
    for name in ["one", "two"] {
        scratch.qemu_img(&format!("create -q -f qcow2 -b old -F qcow2 {name}"));
    }
    scratch.qemu_img("rebase -u -f qcow2 -b one -F qcow2 cow.qcow2");
    let length = std::fs::metadata(scratch.path("old")).unwrap().len();
    scratch.poke("old", length - 4096, &[0xff; 2048]);
    scratch.rebasefs("rebase -b two -F qcow2 cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2").0.as_deref(), Some("two"));
    // But nobody can say that two disks are the same which cannot be read.
    let (ours, theirs) = ("compare -f qcow2 -F qcow2 one two", "compare one two");
    let codes = [scratch.run(crate::scratch::rebasefs(), ours), scratch.run("qemu-img", theirs)];
    assert_eq!(codes.map(|ended| ended.code), [Some(4); 2]);
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
