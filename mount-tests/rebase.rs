//! The engine against qemu-img: what was copied, what was not, what the image is afterwards.
//!
//! Pictures: a cell is a cluster, `--` is nothing. The old backing file is `old`, the new one
//! `new`, the overlay `cow.qcow2`.

mod compress;
mod device;
mod equal;
mod names;
mod random;
mod reflink;
mod traps;

use crate::scratch::{Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// Old and new raw backing file and an overlay on the old one, 64 KiB clusters.
fn three(options: &str, old: &str, new: &str, overlay: &str) -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("old", CLUSTER, old);
    scratch.draw_raw("new", CLUSTER, new);
    scratch.qemu_img(&format!("create -f qcow2 -o {options} -b old -F raw cow.qcow2"));
    scratch.draw("cow.qcow2", CLUSTER, overlay);
    scratch
}

/// Rebases and lets the oracles judge: guest bytes kept, image clean, both backing files kept.
fn rebase_keeps_everything(scratch: &Scratch, arguments: &str, backing: &[&str]) {
    let before = scratch.guest_bytes("qcow2", "cow.qcow2");
    let contents =
        || backing.iter().map(|name| std::fs::read(scratch.path(name)).unwrap()).collect::<Vec<_>>();
    let untouched = contents();
    scratch.rebasefs(&format!("rebase {arguments} cow.qcow2"));
    assert!(before == scratch.guest_bytes("qcow2", "cow.qcow2"), "guest bytes changed");
    assert!(untouched == contents(), "a backing file was changed");
    scratch.check_clean("cow.qcow2");
}

/// The clusters that the overlay itself holds: `d` data, `z` zero, `-` nothing.
fn held(scratch: &Scratch, image: &str) -> String {
    let map = scratch.qemu_img(&format!("map --output=json {image}"));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut picture = String::new();
    for extent in map.as_array().unwrap() {
        let is_own = extent["depth"] == 0 && extent["present"] == true;
        let cell = match (is_own, extent["data"] == true) {
            (false, _) => "-",
            (true, true) => "d",
            (true, false) => "z",
        };
        let count = extent["length"].as_u64().unwrap() as usize / CLUSTER;
        picture.push_str(&cell.repeat(count));
    }
    picture
}

pub fn backing_of(scratch: &Scratch, image: &str) -> (Option<String>, Option<String>) {
    let info: serde_json::Value =
        serde_json::from_str(&scratch.qemu_img(&format!("info -U --output=json {image}"))).unwrap();
    let text = |key: &str| info[key].as_str().map(str::to_owned);
    (text("backing-filename"), text("backing-filename-format"))
}

#[test]
fn only_what_differs_is_copied_and_zeros_become_zero_clusters() {
    let scratch =
        three("compat=1.1", "11 11 11 -- 11 -- 11 11", "11 22 22 33 -- -- 11 11", "-- -- 77 -- -- 77 zz --");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "-ddzddz-");
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("new".into()), Some("raw".into())));
}

#[test]
fn trap_19_the_format_is_recognised_and_recorded_if_nobody_gives_it() {
    let scratch = three("compat=1.1", "11 11", "11 11", "-- 77");
    scratch.qemu_img("convert -O qcow2 new new.qcow2");
    rebase_keeps_everything(&scratch, "-b new.qcow2", &["old", "new.qcow2"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "-d");
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("new.qcow2".into()), Some("qcow2".into())));
}

#[test]
fn flatten_holds_data_only_where_there_was_data() {
    let scratch = three("compat=1.1", "11 -- 11 --", "11", "-- -- 77 zz");
    let before = scratch.guest_bytes("qcow2", "cow.qcow2");
    let ended = scratch.run_args(rebasefs(), &["rebase", "-b", "", "cow.qcow2"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(before == scratch.guest_bytes("qcow2", "cow.qcow2"));
    scratch.check_clean("cow.qcow2");
    assert_eq!(held(&scratch, "cow.qcow2"), "d-dz");
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (None, None));
}

#[test]
fn trap_16_a_version_2_image_without_backing_file_keeps_its_zeros() {
    let scratch = Scratch::new();
    scratch.draw_raw("new", CLUSTER, "11 11 11 --");
    scratch.qemu_img("create -f qcow2 -o compat=0.10 cow.qcow2 256k");
    scratch.draw("cow.qcow2", CLUSTER, "-- 77 -- --");
    std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
    rebase_keeps_everything(&scratch, "-b new -F raw", &["new"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "ddd-");
    // With QEMU 10 the new backing file shows through.
    scratch.qemu_img("rebase -b new -F raw qemu.qcow2");
    assert!(scratch.guest_bytes("qcow2", "qemu.qcow2") != scratch.guest_bytes("qcow2", "cow.qcow2"));
}

#[test]
fn trap_2_internal_snapshots_keep_their_content() {
    let scratch = three("compat=1.1", "11 11 11 11 11 --", "22 11 22 11 22 33", "77 -- -- -- -- --");
    scratch.qemu_img("snapshot -c one cow.qcow2");
    scratch.draw("cow.qcow2", CLUSTER, "-- 88 88 -- -- --");
    scratch.qemu_img("snapshot -c two cow.qcow2");
    scratch.draw("cow.qcow2", CLUSTER, "99 -- -- zz 99 --");
    let view_in = |image: &str, name: &str| {
        scratch.qemu_img(&format!("convert -U -l snapshot.name={name} -O raw {image} {name}.raw"));
        std::fs::read(scratch.path(format!("{name}.raw"))).unwrap()
    };
    let view = |name: &str| view_in("cow.qcow2", name);
    let before = (view("one"), view("two"));
    // QEMU 10 looks at the active disk alone.
    std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
    scratch.qemu_img("rebase -b new -F raw qemu.qcow2");
    assert!(before.0 != view_in("qemu.qcow2", "one"));
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert!(before == (view("one"), view("two")), "a snapshot changed");
    // All of them still share what they share: reverting and deleting works, too.
    scratch.qemu_img("snapshot -a one cow.qcow2");
    assert!(before.0 == scratch.guest_bytes("qcow2", "cow.qcow2"));
    scratch.check_clean("cow.qcow2");
    scratch.qemu_img("snapshot -d two cow.qcow2");
    scratch.check_clean("cow.qcow2");
    scratch.qemu_img("snapshot -d one cow.qcow2");
    scratch.check_clean("cow.qcow2");
}

#[test]
fn snapshots_of_images_with_subclusters_keep_their_content() {
    let scratch = three("extended_l2=on", "11 11 11 11", "22 11 22 33", "-- -- -- --");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x71 0 4k", "write -P 0x72 128k 2k"]);
    scratch.qemu_img("snapshot -c one cow.qcow2");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x73 8k 4k", "write -z 140k 4k", "write -z 200k 4k"]);
    let view = || {
        scratch.qemu_img("convert -U -l snapshot.name=one -O raw cow.qcow2 one.raw");
        std::fs::read(scratch.path("one.raw")).unwrap()
    };
    let before = view();
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert!(before == view(), "the snapshot changed");
}

#[test]
fn trap_3_an_old_backing_file_with_smaller_clusters_than_the_overlay() {
    let scratch = Scratch::new();
    scratch.qemu_img("create -f qcow2 -o cluster_size=4k old 8M");
    scratch.qemu_io("qcow2", "old", &["write -P 0x11 12k 4k", "write -P 0x12 3M 1M"]);
    scratch.draw_raw("new", CLUSTER, "22 -- 22");
    scratch.qemu_img("create -f qcow2 -o cluster_size=2M -b old -F qcow2 cow.qcow2");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
}

#[test]
fn trap_4_trap_18_onto_an_ancestor_with_larger_clusters_above_and_a_short_layer_left_out() {
    for sizes in [["4M", "4M", "6M"], ["4M", "1M", "6M"], ["1M", "4M", "3M"]] {
        let scratch = Scratch::new();
        scratch.qemu_img(&format!("create -f qcow2 base {}", sizes[0]));
        scratch.qemu_io("qcow2", "base", &["write -P 0x11 0 512k"]);
        scratch.qemu_img(&format!("create -f qcow2 -o cluster_size=4k -b base -F qcow2 mid {}", sizes[1]));
        scratch.qemu_io("qcow2", "mid", &["write -P 0x22 100k 40k", "write -z 300k 8k"]);
        scratch
            .qemu_img(&format!("create -f qcow2 -o cluster_size=1M -b mid -F qcow2 cow.qcow2 {}", sizes[2]));
        scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x33 2M 10k"]);
        rebase_keeps_everything(&scratch, "-b base -F qcow2", &["base", "mid"]);
    }
}

#[test]
fn trap_7_persistent_bitmaps_stay_valid_and_are_not_dirtied() {
    let scratch = three("compat=1.1", "11 11 11 11", "22 11 22 11", "-- 77 -- --");
    scratch.qemu_img("bitmap --add cow.qcow2 b0");
    scratch.draw("cow.qcow2", CLUSTER, "-- -- -- 88");
    let bitmaps = || {
        let info: serde_json::Value =
            serde_json::from_str(&scratch.qemu_img("info --output=json cow.qcow2")).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    };
    let before = bitmaps();
    assert_eq!(before[0]["name"], "b0");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert_eq!(bitmaps(), before);
}

#[test]
fn trap_9_a_loop_is_refused_in_both_modes_and_nothing_changes() {
    let scratch = three("compat=1.1", "11", "22", "--");
    scratch.qemu_img("create -f qcow2 -b cow.qcow2 -F qcow2 above.qcow2");
    let before = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    for arguments in
        ["-b cow.qcow2", "-u -b cow.qcow2 -F qcow2", "-b above.qcow2", "-u -b above.qcow2 -F qcow2"]
    {
        let said = scratch.rebasefs_fails(1, &format!("rebase {arguments} cow.qcow2"));
        assert!(said.contains("overlay"), "{said}");
    }
    assert!(before == std::fs::read(scratch.path("cow.qcow2")).unwrap());
    // QEMU 10 records it, and the next one who opens the image hangs.
    scratch.qemu_img("rebase -u -b cow.qcow2 -F qcow2 cow.qcow2");
}

#[test]
fn unsafe_mode_changes_the_reference_only() {
    let scratch = three("compat=1.1", "11 11", "22 22", "-- 77");
    std::fs::rename(scratch.path("old"), scratch.path("moved")).unwrap();
    scratch.rebasefs("rebase -u -b moved -F raw cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("moved".into()), Some("raw".into())));
    assert_eq!(held(&scratch, "cow.qcow2"), "-d");
    scratch.check_clean("cow.qcow2");
    scratch.rebasefs("rebase -u -b not-yet-there -F raw cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2").0, Some("not-yet-there".into()));
}

#[test]
fn backing_files_shorter_than_the_overlay_read_as_zeros_behind_their_end() {
    let scratch = Scratch::new();
    scratch.draw_raw("old", CLUSTER, "11 11 11 11");
    scratch.draw_raw("new", CLUSTER, "11");
    scratch.qemu_img("create -f qcow2 -b old -F raw cow.qcow2 393728");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "-ddd--");
    rebase_keeps_everything(&scratch, "-b old -F raw", &["old", "new"]);
}

#[test]
fn an_overlay_whose_end_lies_within_a_cluster_does_not_take_what_is_behind_it() {
    let scratch = Scratch::new();
    scratch.draw_raw("old", CLUSTER, "11 11 11");
    scratch.draw_raw("new", CLUSTER, "22 22 22");
    scratch.qemu_img("create -f qcow2 -b old -F raw cow.qcow2 100k");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
}

#[test]
fn names_are_stored_as_given_up_to_the_limit() {
    let scratch = three("compat=1.1", "11", "22", "--");
    let long = format!("{}new", "./".repeat(510));
    assert_eq!(long.len(), 1023);
    rebase_keeps_everything(&scratch, &format!("-b {long} -F raw"), &["old", "new"]);
    assert_eq!(backing_of(&scratch, "cow.qcow2").0, Some(long.clone()));
    let before = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let said = scratch.rebasefs_fails(1, &format!("rebase -b ./{long} -F raw cow.qcow2"));
    assert!(said.contains("1025 bytes, 1023 are possible"), "{said}");
    assert!(before == std::fs::read(scratch.path("cow.qcow2")).unwrap());
}

#[test]
fn header_extensions_survive_every_swap() {
    // Bitmaps and feature names reach into the second sector, so that adding and removing the
    // backing format moves what lies there.
    for options in ["cluster_size=1k", "cluster_size=64k", "cluster_size=64k,data_file=data"] {
        let scratch = Scratch::new();
        scratch.draw_raw("new", CLUSTER, "11 22");
        scratch.qemu_img(&format!("create -f qcow2 -o {options} cow.qcow2 128k"));
        scratch.qemu_img("bitmap --add cow.qcow2 b0");
        let specific = || {
            let info: serde_json::Value =
                serde_json::from_str(&scratch.qemu_img("info --output=json cow.qcow2")).unwrap();
            info["format-specific"].clone()
        };
        let before = specific();
        for _ in 0..2 {
            rebase_keeps_everything(&scratch, "-b new -F raw", &["new"]);
            assert_eq!(specific(), before);
            let ended = scratch.run_args(rebasefs(), &["rebase", "-b", "", "cow.qcow2"]);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            assert_eq!(specific(), before);
            scratch.check_clean("cow.qcow2");
        }
    }
}

#[test]
fn shapes_that_a_rebase_must_handle_end_like_qemus() {
    let shapes = [
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2,cluster_size=1k",
        "refcount_bits=64,cluster_size=512",
        "compression_type=zstd",
        "extended_l2=on,preallocation=metadata",
    ];
    for shape in shapes {
        let scratch =
            three(shape, "11 -- 11 11 11 11 11 11", "11 22 -- 22 11 22 11 --", "-- -- -- 77 zz zz -- --");
        scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x71 450000 20000"]);
        // QEMU compresses neither into clusters of 2 MiB at this size nor into preallocated ones.
        if !shape.contains("2M") && !shape.contains("preallocation") {
            scratch.qemu_io("qcow2", "cow.qcow2", &["write -c -P 0x72 64k 64k"]);
        }
        std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
        rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
        scratch.qemu_img("rebase -b new -F raw qemu.qcow2");
        scratch.same("cow.qcow2", "qemu.qcow2");
        let size = |name| std::fs::metadata(scratch.path(name)).unwrap().len();
        assert!(size("cow.qcow2") <= size("qemu.qcow2"), "{shape}: larger than QEMU's");
    }
}

#[test]
fn an_image_marked_as_corrupt_is_not_written() {
    let scratch = three("compat=1.1", "11", "22", "--");
    let mut image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    image[79] |= 2;
    scratch.write("cow.qcow2", &image);
    let said = scratch.rebasefs_fails(1, "rebase -b new -F raw cow.qcow2");
    assert!(said.contains("marked as corrupt") && said.contains("rebasefs check -r all"), "{said}");
    assert!(image == std::fs::read(scratch.path("cow.qcow2")).unwrap());
}

#[test]
fn a_raw_external_data_file_refuses_a_backing_file() {
    let scratch = Scratch::new();
    scratch.draw_raw("new", CLUSTER, "11");
    scratch.qemu_img("create -f qcow2 -o data_file=data,data_file_raw=on cow.qcow2 64k");
    let said = scratch.rebasefs_fails(1, "rebase -b new -F raw cow.qcow2");
    assert!(said.contains("rules out a backing file"), "{said}");
}

#[test]
fn a_raw_image_cannot_be_rebased() {
    let scratch = three("compat=1.1", "11", "22", "--");
    let said = scratch.rebasefs_fails(1, "rebase -b new -F raw old");
    assert!(said.contains("only qcow2 can be rebased"), "{said}");
}

#[test]
fn every_cache_mode_ends_in_the_same_image() {
    for mode in ["writeback", "writethrough", "none", "directsync", "unsafe"] {
        for shape in ["cluster_size=512", "cluster_size=64k", "extended_l2=on"] {
            let scratch = three(shape, "11 11 -- 11", "11 22 22 --", "-- -- -- --");
            scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x71 66000 2000"]);
            rebase_keeps_everything(&scratch, &format!("-t {mode} -T {mode} -b new -F raw"), &["old", "new"]);
        }
    }
    let scratch = three("compat=1.1", "11", "22", "--");
    let said = scratch.rebasefs_fails(1, "rebase -t sometimes -b new cow.qcow2");
    assert!(said.contains("there is no cache mode 'sometimes'"), "{said}");
}

#[test]
fn progress_is_shown_as_qemu_img_shows_it_and_quiet_is_quiet() {
    let scratch = three("compat=1.1", "11 11", "22 11", "-- --");
    let said = scratch.rebasefs("rebase -p -b new -F raw cow.qcow2");
    assert!(said.contains("    (100.00/100%)\r\n"), "{said}");
    assert_eq!(scratch.rebasefs("rebase -q -p -b old -F raw cow.qcow2"), "");
    // A script that calls qemu-img today reads nothing; a person at a terminal is told, see `progress.rs`.
    assert_eq!(scratch.rebasefs("rebase -b new -F raw cow.qcow2"), "");
    let ended = scratch.run(rebasefs(), "rebase -p -b old -F raw cow.qcow2");
    assert!(ended.stdout.ends_with("    (100.00/100%)\r\n") && ended.stderr.is_empty(), "{}", ended.stdout);
    let said = scratch.rebasefs("-v rebase -b new -F raw cow.qcow2");
    assert!(said.starts_with("Image rebased: "), "{said}");
    assert!(scratch.rebasefs("rebase --dry-run -b old -F raw cow.qcow2").contains("Nothing written: "));
}

#[test]
fn quiet_keeps_back_warnings_and_no_error() {
    let scratch = three("compat=1.1", "11 11", "22 11", "-- --");
    let run = |line: &str| scratch.run(rebasefs(), line);
    let told = run("rebase -t unsafe -b new -F raw cow.qcow2");
    assert!(told.stderr.contains("WARN") && told.stderr.contains("cache mode unsafe"), "{}", told.stderr);
    let quiet = run("rebase -q -t unsafe -b old -F raw cow.qcow2");
    assert_eq!((quiet.code, &*quiet.stdout, &*quiet.stderr), (Some(0), "", ""));
    let both = run("-v rebase -q -t unsafe -b new -F raw cow.qcow2");
    assert!(both.stdout.is_empty() && both.stderr.contains("cache mode unsafe"), "{}", both.stderr);
    let said = scratch.rebasefs_fails(1, "rebase -q -b missing -F raw cow.qcow2");
    assert!(said.starts_with("rebasefs: ") && said.contains("missing"), "{said}");
}

#[test]
fn what_is_not_supported_is_refused_by_name_before_anything_is_written() {
    let scratch = three("compat=1.1", "11", "22", "--");
    let before = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    for (arguments, word) in [
        ("--image-opts -b new -F raw", "--image-opts is not supported"),
        ("--object secret,id=s -b new -F raw", "--object secret,id=s is not supported"),
        ("-b new -F vmdk", "format 'vmdk' is not supported"),
        ("", "no backing file given"),
        ("-u", "no backing file given"),
    ] {
        let said = scratch.rebasefs_fails(1, &format!("rebase {arguments} cow.qcow2"));
        assert!(said.contains(word), "{said}");
    }
    assert!(before == std::fs::read(scratch.path("cow.qcow2")).unwrap());
}

#[test]
fn trap_14_a_dry_run_says_what_a_rebase_does_and_writes_nothing() {
    for (shape, compress) in
        [("compat=1.1", ""), ("compat=0.10", ""), ("extended_l2=on", ""), ("extended_l2=on", "-c")]
    {
        let scratch = three(shape, "11 11 -- 11 11 --", "11 22 22 22 -- --", "-- -- -- 77 -- --");
        if !compress.is_empty() {
            scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x71 70k 2k", "write -z 264k 4k"]);
        }
        let before = std::fs::read(scratch.path("cow.qcow2")).unwrap();
        let read = |arguments: &str| -> serde_json::Value {
            serde_json::from_str(
                &scratch.rebasefs(&format!("rebase {arguments} {compress} --output=json -b new cow.qcow2")),
            )
            .unwrap()
        };
        let dry = read("--dry-run");
        assert!(before == std::fs::read(scratch.path("cow.qcow2")).unwrap());
        let real = read("--verify");
        for figure in ["missing", "equal", "compared", "copied", "zeroed"] {
            assert_eq!(dry[figure], real[figure], "{shape}: {figure}");
        }
        let ranges = dry["ranges"].as_array().unwrap();
        let sum: u64 = ranges.iter().map(|range| range["length"].as_u64().unwrap()).sum();
        assert_eq!(sum, real["copied"].as_u64().unwrap() + real["zeroed"].as_u64().unwrap());
        assert_eq!(ranges[0]["start"], CLUSTER);
    }
    let scratch = three("compat=1.1", "11 11", "11 22", "-- --");
    let said = scratch.rebasefs("rebase --dry-run -b new cow.qcow2");
    assert!(said.starts_with("copy 0x10000 0x10000\nNothing written: of 128 KiB"), "{said}");
}

#[test]
fn trap_14_reclaim_drops_what_equals_the_new_backing_file_and_frees_its_space() {
    for shape in ["compat=1.1", "compat=0.10", "cluster_size=4k", "extended_l2=on", "compression_type=zstd"] {
        //                     kept: -- dd -- dd -- --
        let scratch = three(shape, "11 11 11 11 11 --", "11 22 33 22 -- --", "-- 11 33 44 zz zz");
        scratch.qemu_io("qcow2", "cow.qcow2", &["write -c -P 0x11 0 64k"]);
        let blocks =
            || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(scratch.path("cow.qcow2")).unwrap());
        let before = blocks();
        rebase_keeps_everything(&scratch, "--reclaim -b new -F raw", &["old", "new"]);
        assert_eq!(held(&scratch, "cow.qcow2"), "-d-d--", "{shape}");
        assert!(blocks() < before, "{shape}: {} blocks, {before} before", blocks());
        // A guest can go on with it.
        scratch.draw("cow.qcow2", CLUSTER, "55 -- 55 -- 55 --");
        scratch.check_clean("cow.qcow2");
    }
}

#[test]
fn reclaim_keeps_what_a_snapshot_holds() {
    let scratch = three("compat=1.1", "11 11 11", "22 22 22", "22 22 77");
    scratch.qemu_img("snapshot -c one cow.qcow2");
    scratch.draw("cow.qcow2", CLUSTER, "-- 22 --");
    let view = || {
        scratch.qemu_img("convert -U -l snapshot.name=one -O raw cow.qcow2 one.raw");
        std::fs::read(scratch.path("one.raw")).unwrap()
    };
    let before = view();
    rebase_keeps_everything(&scratch, "--reclaim -b new -F raw", &["old", "new"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "d-d");
    assert!(before == view(), "the snapshot changed");
}

#[test]
fn reclaim_gives_subclusters_back_one_by_one() {
    let scratch = three("extended_l2=on", "11 11", "11 11", "-- --");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -P 0x11 4k 8k", "write -P 0x77 20k 4k"]);
    rebase_keeps_everything(&scratch, "--reclaim -b new -F raw", &["old", "new"]);
    let map = scratch.qemu_img("map --output=json cow.qcow2");
    assert!(map.contains("\"start\": 20480, \"length\": 4096, \"depth\": 0"), "{map}");
    assert!(!map.contains("\"start\": 4096"), "{map}");
}

#[test]
fn the_figures_add_up_where_holes_begin_and_end_within_clusters() {
    let scratch = Scratch::new();
    scratch.draw_raw("old", 4096, "11 -- -- 11 -- 11 --");
    scratch.draw_raw("new", 4096, "11 -- 22 11 -- -- -- -- -- -- -- -- -- -- -- -- -- -- 22");
    scratch.qemu_img("create -f qcow2 -b old -F raw cow.qcow2 300032");
    let said = scratch.rebasefs("rebase --dry-run --output=json -b new cow.qcow2");
    let figures: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(figures["missing"], 300_032);
    assert_eq!(figures["compared"], 2 * CLUSTER);
    assert_eq!(figures["equal"], 300_032 - 2 * CLUSTER);
}

#[test]
fn flatten_is_a_rebase_onto_nothing() {
    let s = scratch_of_three();
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    std::fs::copy(s.path("cow.qcow2"), s.path("other.qcow2")).unwrap();
    let said = s.rebasefs("flatten --dry-run --output=json cow.qcow2");
    assert!(said.contains("\"copied\""), "{said}");
    for refused in ["-b new.raw", "-F raw", "-u"] {
        let said = s.rebasefs_fails(1, &format!("flatten {refused} cow.qcow2"));
        assert!(said.contains("flatten leaves no backing file"), "{said}");
    }
    s.rebasefs("flatten cow.qcow2 other.qcow2");
    for image in ["cow.qcow2", "other.qcow2"] {
        assert!(!s.qemu_img(&format!("info {image}")).contains("backing file"));
        assert!(s.guest_bytes("qcow2", image) == before);
        s.check_clean(image);
    }
    let help = s.rebasefs("flatten --help");
    assert!(!help.contains("--backing ") && help.contains("--dry-run"), "{help}");
}

fn scratch_of_three() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "11 22 -- 33");
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    s.draw("cow.qcow2", 65536, "-- 44 -- --");
    s
}
