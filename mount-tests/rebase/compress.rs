//! `rebase -c`: what is copied becomes compressed clusters, where that is possible and pays.

use super::{CLUSTER, backing_of, rebase_keeps_everything, three};
use crate::mounted::Mounted;
use crate::random_chain::Random;
use crate::scratch::Scratch;

/// Puts bytes of so many random bits into a cluster of a raw file: 8 do not shrink, 4 to about half.
fn scramble(scratch: &Scratch, name: &str, cluster: usize, bits: u32) {
    let bytes = Random::new(cluster as u64).bytes(CLUSTER, bits);
    scratch.poke(name, (cluster * CLUSTER) as u64, &bytes);
}

/// How many clusters of an image are compressed, and how many there are.
fn compressed(scratch: &Scratch, image: &str) -> (u64, u64) {
    let check = scratch.qemu_img(&format!("check --output=json {image}"));
    let check: serde_json::Value = serde_json::from_str(&check).unwrap();
    let number = |key: &str| check[key].as_u64().unwrap_or(0);
    (number("compressed-clusters"), number("allocated-clusters"))
}

fn size(scratch: &Scratch, image: &str) -> u64 {
    std::fs::metadata(scratch.path(image)).unwrap().len()
}

fn cluster_size(scratch: &Scratch, image: &str) -> u64 {
    let info = scratch.qemu_img(&format!("info --output=json {image}"));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["cluster-size"].as_u64().unwrap()
}

#[test]
fn copies_are_compressed_and_take_at_most_a_cluster_more_than_qemus() {
    let shapes = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=2M",
        "compression_type=zstd",
        "refcount_bits=2,cluster_size=4k",
        "refcount_bits=64,cluster_size=1k",
        "extended_l2=on",
        "extended_l2=on,compression_type=zstd,cluster_size=2M",
    ];
    for shape in shapes {
        let scratch = three(shape, "11 11 12 13 -- 14 15 16 --", "11 22 22 22 22 22 22 22 --", "");
        [(2, 4), (3, 5), (5, 8), (6, 4)].iter().for_each(|&(n, bits)| scramble(&scratch, "old", n, bits));
        std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
        rebase_keeps_everything(&scratch, "-c --verify -b new -F raw", &["old", "new"]);
        assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("new".into()), Some("raw".into())));
        assert!(compressed(&scratch, "cow.qcow2").0 > 0, "{shape}: nothing is compressed");
        scratch.qemu_img("rebase -c -b new -F raw qemu.qcow2");
        scratch.same("cow.qcow2", "qemu.qcow2");
        let (ours, theirs) = (size(&scratch, "cow.qcow2"), size(&scratch, "qemu.qcow2"));
        // What is not compressed may lie between, and the room before it is lost.
        assert!(
            ours <= theirs + cluster_size(&scratch, "cow.qcow2"),
            "{shape}: {ours} bytes, QEMU's {theirs}"
        );
    }
}

#[test]
fn what_does_not_shrink_is_stored_as_it_is_and_zeros_become_zero_clusters() {
    let scratch = three("compat=1.1", "11 12 -- 13", "22 22 22 22", "-- -- -- --");
    scramble(&scratch, "old", 1, 8);
    rebase_keeps_everything(&scratch, "-c -b new -F raw", &["old", "new"]);
    assert_eq!(super::held(&scratch, "cow.qcow2"), "ddzd");
    assert_eq!(compressed(&scratch, "cow.qcow2"), (2, 3));
}

#[test]
fn refcounts_of_one_bit_let_nothing_share_a_host_cluster_so_nothing_is_compressed() {
    let scratch = three("refcount_bits=1", "11 12 13", "22 22 22", "-- -- --");
    rebase_keeps_everything(&scratch, "-c -b new -F raw", &["old", "new"]);
    assert_eq!(compressed(&scratch, "cow.qcow2"), (0, 3));
}

#[test]
fn trap_17_clusters_that_are_there_in_part_are_completed_uncompressed_in_place() {
    for before in
        [&["write -P 0x71 4k 2k"][..], &["write -z 24k 4k"], &["write -P 0x71 0 2k", "write -z 60k 4k"]]
    {
        let scratch = three("extended_l2=on", "11 12 11", "22 22 22", "-- -- --");
        scratch.poke("old", 8192, &[0; 8192]);
        scratch.qemu_io("qcow2", "cow.qcow2", before);
        std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
        rebase_keeps_everything(&scratch, "-c -b new -F raw", &["old", "new"]);
        assert_eq!(compressed(&scratch, "cow.qcow2"), (2, 3), "{before:?}");
        // Compared by subclusters: what reads as zeros takes no room.
        let map = scratch.qemu_img("map --output=json cow.qcow2");
        assert!(
            map.contains(
                "\"start\": 8192, \"length\": 8192, \"depth\": 0, \"present\": true, \"zero\": true"
            ),
            "{map}"
        );
        // An assertion fails in QEMU 10.
        assert_eq!(scratch.run("qemu-img", "rebase -c -b new -F raw qemu.qcow2").code, None, "{before:?}");
    }
}

#[test]
fn snapshots_share_what_was_compressed_and_can_be_deleted() {
    for shape in ["cluster_size=4k", "cluster_size=64k", "refcount_bits=4", "extended_l2=on"] {
        let scratch = three(shape, "11 12 13 14 15 --", "22 22 22 22 22 33", "77 -- -- -- -- --");
        scratch.qemu_img("snapshot -c one cow.qcow2");
        scratch.draw("cow.qcow2", CLUSTER, "-- 88 -- -- -- --");
        scratch.qemu_img("snapshot -c two cow.qcow2");
        scratch.draw("cow.qcow2", CLUSTER, "-- -- 99 zz -- --");
        let view = |name: &str| {
            scratch.qemu_img(&format!("convert -U -l snapshot.name={name} -O raw cow.qcow2 {name}.raw"));
            std::fs::read(scratch.path(format!("{name}.raw"))).unwrap()
        };
        let before = (view("one"), view("two"));
        rebase_keeps_everything(&scratch, "-c -b new -F raw", &["old", "new"]);
        assert!(before == (view("one"), view("two")), "{shape}: a snapshot changed");
        // A guest may write over what is shared, and free it.
        scratch.draw("cow.qcow2", CLUSTER, "55 -- -- -- 66 ..");
        scratch.check_clean("cow.qcow2");
        assert!(before == (view("one"), view("two")), "{shape}: a snapshot changed afterwards");
        for name in ["two", "one"] {
            scratch.qemu_img(&format!("snapshot -d {name} cow.qcow2"));
            scratch.check_clean("cow.qcow2");
        }
    }
}

#[test]
fn flattening_rebasing_again_and_reclaiming_work_with_compressed_clusters() {
    let scratch = three("cluster_size=4k", "11 12 13 -- 15", "22 22 22 22 22", "-- 77 -- -- --");
    rebase_keeps_everything(&scratch, "-c -b new -F raw", &["old", "new"]);
    let small = size(&scratch, "cow.qcow2");
    rebase_keeps_everything(&scratch, "-c --reclaim -b old -F raw", &["old", "new"]);
    assert_eq!(super::held(&scratch, "cow.qcow2"), "-d---");
    let before = scratch.guest_bytes("qcow2", "cow.qcow2");
    let ended = scratch.run_args(crate::scratch::rebasefs(), &["rebase", "-c", "-b", "", "cow.qcow2"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(before == scratch.guest_bytes("qcow2", "cow.qcow2"));
    scratch.check_clean("cow.qcow2");
    // The room that was reclaimed is used again.
    assert_eq!(size(&scratch, "cow.qcow2"), small);
}

#[test]
fn an_external_data_file_cannot_hold_compressed_clusters_and_nothing_is_written() {
    let scratch = three("data_file=data", "11 11", "22 22", "-- --");
    let before = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    for arguments in ["-c", "-c --dry-run"] {
        let said = scratch.rebasefs_fails(1, &format!("rebase {arguments} -b new -F raw cow.qcow2"));
        assert!(said.contains("an external data file holds no compressed clusters"), "{said}");
    }
    assert!(before == std::fs::read(scratch.path("cow.qcow2")).unwrap());
}

#[test]
fn a_mounted_image_is_served_from_its_compressed_copies() {
    let scratch = three("cluster_size=4k", "11 12 13 14", "22 22 22 --", "-- 77 -- --");
    scramble(&scratch, "old", 0, 4);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    assert_eq!(mounted.shell("echo -c -b new > ctl/rebase"), (Some(0), String::new()));
    assert!(mounted.bytes() == before);
    // Not from what the kernel remembers.
    let direct = format!("if={} of=direct bs=4k iflag=direct", mounted.path("disk.raw").display());
    scratch.ok("dd", &direct);
    assert!(std::fs::read(scratch.path("direct")).unwrap() == before);
    mounted.unmount();
    assert!(scratch.guest_bytes("qcow2", "cow.qcow2") == before);
    assert!(compressed(&scratch, "cow.qcow2").0 > 0);
    scratch.check_clean("cow.qcow2");
}

#[test]
fn every_cache_mode_packs_compressed_clusters_beside_each_other() {
    for mode in ["writethrough", "none", "directsync"] {
        let scratch = three("cluster_size=4k", "11 12 13 14 15 16", "22 22 22 22 22 22", "-- 77 -- -- -- --");
        scramble(&scratch, "old", 3, 5);
        rebase_keeps_everything(&scratch, &format!("-c -t {mode} -b new -F raw"), &["old", "new"]);
    }
}
