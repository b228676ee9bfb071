//! `rebasefs check`: the numbers and exit codes of `qemu-img check`, on sound and damaged images.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::scratch::{Scratch, rebasefs};

/// What both programs say of an image: exit code and JSON.
fn both(s: &Scratch, image: &str) -> [(Option<i32>, Value); 2] {
    ["qemu-img", rebasefs()].map(|program| {
        let ended = s.run(program, &format!("check -f qcow2 --output=json {image}"));
        let json = serde_json::from_str(&ended.stdout);
        (ended.code, json.unwrap_or_else(|e| panic!("{program}: {e}\n{}{}", ended.stdout, ended.stderr)))
    })
}

fn same_verdict(s: &Scratch, image: &str, about: &str) -> Value {
    let [theirs, ours] = both(s, image);
    assert_eq!(ours, theirs, "{about}");
    ours.1
}

/// An image with standard, zero and compressed clusters, written again after a snapshot.
fn image(s: &Scratch, options: &str, cluster: usize) {
    s.qemu_img(&format!("create -f qcow2 -o {options} i.qcow2 {}", 40 * cluster));
    s.draw("i.qcow2", cluster, "11 -- 22 zz 33 44 -- -- 55");
    if !options.contains("data_file") && !options.contains("preallocation") {
        let at = 20 * cluster;
        s.qemu_io("qcow2", "i.qcow2", &[&format!("write -c -P 0x66 {at} {cluster}")]);
    }
    if !options.contains("data_file") && !options.contains("refcount_bits=1,") {
        s.qemu_img("snapshot -c before i.qcow2");
        s.draw("i.qcow2", cluster, "-- 77 zz 88");
    }
}

#[test]
fn every_shape_is_counted_as_qemu_counts_it() {
    let mut shapes: Vec<(String, usize)> = Vec::new();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        shapes.push((format!("refcount_bits={bits},cluster_size=512"), 512));
        shapes.push((format!("refcount_bits={bits},cluster_size=64k"), 65536));
    }
    for (options, cluster) in [
        ("cluster_size=2M", 2 << 20),
        ("compat=0.10", 65536),
        ("extended_l2=on", 65536),
        ("extended_l2=on,cluster_size=16k", 16384),
        ("compression_type=zstd", 65536),
        ("lazy_refcounts=on", 65536),
        ("preallocation=metadata", 65536),
        ("preallocation=falloc,extended_l2=on", 65536),
        ("preallocation=full,cluster_size=4k", 4096),
        ("data_file=data.raw", 65536),
        ("data_file=raw.raw,data_file_raw=on", 65536),
    ] {
        shapes.push((options.to_owned(), cluster));
    }
    for (options, cluster) in shapes {
        let s = Scratch::new();
        image(&s, &options, cluster);
        same_verdict(&s, "i.qcow2", &options);
        let line = "check -f qcow2 i.qcow2";
        assert_eq!(s.rebasefs(line), s.qemu_img(line), "{options}");
    }
}

#[test]
fn bitmaps_and_resized_images_are_counted() {
    let s = Scratch::new();
    image(&s, "cluster_size=4k", 4096);
    s.qemu_img("bitmap --add -g 4k i.qcow2 one");
    s.draw("i.qcow2", 4096, "11 22 33");
    s.qemu_img("bitmap --add --disable i.qcow2 two");
    same_verdict(&s, "i.qcow2", "bitmaps");
    s.qemu_img("bitmap --remove i.qcow2 one");
    s.qemu_img("bitmap --remove i.qcow2 two");
    s.qemu_img("snapshot -d before i.qcow2");
    s.qemu_img("resize --shrink i.qcow2 8k");
    same_verdict(&s, "i.qcow2", "shrunk");
    s.qemu_img("resize i.qcow2 100M");
    same_verdict(&s, "i.qcow2", "grown");
}

/// Changes 8 bytes of a 64 KiB-cluster image: header at cluster 0, refcount table 1, refcount
/// block 2, L1 table 3, the first L2 table 4, its data from 5 on.
fn damaged(at: u64, word: u64) -> Value {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 i.qcow2 4M");
    s.draw("i.qcow2", 65536, "11 22 33 44");
    let file = std::fs::File::options().write(true).open(s.path("i.qcow2")).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&word.to_be_bytes(), at).unwrap();
    same_verdict(&s, "i.qcow2", &format!("{word:#x} at {at:#x}"))
}

#[test]
fn damage_is_found_where_qemu_finds_it() {
    const BLOCK: u64 = 0x20000;
    const L1: u64 = 0x30000;
    const L2: u64 = 0x40000;
    let found = |at, word| {
        let said = damaged(at, word);
        (said["corruptions"].as_u64().unwrap_or(0), said["leaks"].as_u64().unwrap_or(0))
    };
    assert_eq!(found(BLOCK + 24, 0x0001_0001_0001_0001), (0, 4), "refcounts of unused clusters");
    assert_eq!(found(BLOCK + 8, 0), (8, 0), "refcounts of used clusters, and their copied flags");
    assert_eq!(found(BLOCK, 0x0003_0001_0001_0001), (0, 1), "a refcount too high");
    assert_eq!(found(L2, 0), (0, 1), "an entry gone");
    assert_eq!(found(L2, 5 << 16), (1, 0), "the copied flag gone");
    assert_eq!(found(L2, 1 << 63 | 6 << 16), (1, 1), "a cluster used twice");
    assert_eq!(found(L2, 1 << 63 | 0x5_0200), (2, 0), "not aligned");
    assert_eq!(found(L2, 1 << 63 | 5 << 16 | 8), (1, 0), "a reserved bit");
    assert_eq!(found(L2, 1 << 63 | 1 << 40), (2, 1), "past the end of the file");
    assert_eq!(found(L1, 1 << 63 | 4 << 16 | 1 << 60), (1, 0), "a reserved bit of an L1 entry");
    assert_eq!(found(L1, 0), (0, 5), "an L2 table gone");
    assert_eq!(found(0x10000, 0x2_0001), (1, 1), "a reserved bit of the refcount table");
}

#[test]
fn exit_codes_and_messages_are_those_of_qemu_img() {
    let s = Scratch::new();
    s.draw_raw("raw", 512, "11 22");
    let message = s.rebasefs_fails(63, "check -f raw raw");
    assert!(message.contains("This image format does not support checks"), "{message}");
    assert!(s.rebasefs_fails(1, "check missing").contains("No such file"));
    s.rebasefs_fails(1, "check --no-such-option raw");
    s.rebasefs_fails(1, "check");
    assert!(s.rebasefs_fails(1, "check --image-opts driver=raw").contains("--image-opts"));
    assert!(s.rebasefs("check --help").contains("Example:"));
}

#[test]
fn a_leak_ends_with_3_and_a_corruption_with_2() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 i.qcow2 4M");
    s.draw("i.qcow2", 65536, "11 22");
    let file = std::fs::File::options().write(true).open(s.path("i.qcow2")).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&[0, 1], 0x20000 + 2 * 9).unwrap();
    let message = s.rebasefs_fails(3, "check i.qcow2");
    assert!(message.contains("Leaked cluster 9 refcount=1 reference=0"), "{message}");
    file.write_all_at(&[0, 0], 0x20000 + 2 * 5).unwrap();
    let message = s.rebasefs_fails(2, "check -q i.qcow2");
    assert!(message.contains("ERROR cluster 5 refcount=0 reference=1"), "{message}");
}

/// 65536 snapshots that share one L1 table of 32 MiB, whose entries all lead to one L2 table:
/// looked at entry by entry, that would never end.
#[test]
fn tables_that_share_tables_cost_no_more_than_they_are_long() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 -o cluster_size=512 i.qcow2 64M");
    s.draw("i.qcow2", 512, "11");
    let mut image = std::fs::read(s.path("i.qcow2")).unwrap();
    let word = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = word(&image, 40) as usize;
    let entry = image[l1..l1 + 8].to_vec();
    for at in (l1..l1 + 2048 * 8).step_by(8) {
        image[at..at + 8].copy_from_slice(&entry);
    }
    let table = image.len().next_multiple_of(512);
    let count = 65536u32;
    image[60..64].copy_from_slice(&count.to_be_bytes());
    image[64..72].copy_from_slice(&(table as u64).to_be_bytes());
    image.resize(table, 0);
    for _ in 0..count {
        let mut snapshot = [0; 56];
        snapshot[..8].copy_from_slice(&(l1 as u64).to_be_bytes());
        snapshot[8..12].copy_from_slice(&2048u32.to_be_bytes());
        snapshot[36..40].copy_from_slice(&16u32.to_be_bytes());
        snapshot[48..56].copy_from_slice(&(64u64 << 20).to_be_bytes());
        image.extend(snapshot);
    }
    s.write("i.qcow2", &image);
    let message = s.rebasefs_fails(2, "check i.qcow2");
    assert!(message.contains("used more often than a refcount can say"), "{message}");
}

/// 256 clusters that nothing points to.
#[test]
fn of_many_findings_the_rest_is_counted() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 i.qcow2 64M");
    s.qemu_io("qcow2", "i.qcow2", &["write -q 0 16M"]);
    // The L1 entry that leads to all of them is gone.
    let header = std::fs::read(s.path("i.qcow2")).unwrap();
    let l1 = u64::from_be_bytes(header[40..48].try_into().unwrap());
    s.poke("i.qcow2", l1, &[0; 8]);
    let ended = s.run(rebasefs(), "check i.qcow2");
    assert_eq!(ended.code, Some(3));
    let (listed, rest) = ended.stderr.trim_end().rsplit_once('\n').unwrap();
    assert_eq!((listed.lines().count(), rest), (100, "157 more findings are counted, and not listed"));
    assert!(ended.stdout.contains("257 leaked clusters"), "{}", ended.stdout);
}
