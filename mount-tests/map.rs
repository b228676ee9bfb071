//! `rebasefs map`: the entries of `qemu-img map`, over chains of all shapes.

use serde_json::Value;

use crate::scratch::{Scratch, rebasefs};

/// The entries, neighbours that go on in the same way made one: where a run is divided is a
/// program's own affair.
fn entries(s: &Scratch, program: &str, line: &str) -> Vec<Value> {
    let text = s.ok(program, &format!("map --output=json {line}"));
    let entries: Vec<Value> = serde_json::from_str(&text).expect(&text);
    let number = |e: &Value, name: &str| e[name].as_u64();
    let mut merged: Vec<Value> = Vec::new();
    for next in entries {
        if let Some(last) = merged.last_mut() {
            let length = number(last, "length").unwrap();
            let mut expected = last.clone();
            expected["start"] = (number(last, "start").unwrap() + length).into();
            expected["length"] = next["length"].clone();
            if let Some(offset) = number(last, "offset") {
                expected["offset"] = (offset + length).into();
            }
            if expected == next {
                last["length"] = (length + number(&next, "length").unwrap()).into();
                continue;
            }
        }
        merged.push(next);
    }
    merged
}

fn same_map(s: &Scratch, line: &str, about: &str) {
    assert_eq!(entries(s, rebasefs(), line), entries(s, "qemu-img", line), "{about}");
}

/// overlay: 11 zz -- -- 22 -- -- -- on a shorter base with holes.
#[test]
fn every_shape_is_mapped_as_qemu_maps_it() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "data_file=data.raw",
    ] {
        let s = Scratch::new();
        s.draw_raw("base.raw", 65536, "33 -- 44 55 -- 66");
        s.qemu_img(&format!("create -f qcow2 -b base.raw -F raw -o {options} i.qcow2 512k"));
        s.draw("i.qcow2", 65536, "11 zz -- -- 22");
        // A compressed write fills a cluster.
        if !options.contains("data_file") && !options.contains("2M") {
            s.qemu_io("qcow2", "i.qcow2", &["write -c -P 0x77 128k 64k"]);
        }
        same_map(&s, "-f qcow2 i.qcow2", options);
        same_map(&s, "-f qcow2 --start-offset 1000 --max-length 100000 i.qcow2", options);
    }
}

#[test]
fn preallocated_clusters_and_subclusters_show_where_they_lie() {
    for options in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,cluster_size=4k",
        "preallocation=metadata,extended_l2=on",
    ] {
        let s = Scratch::new();
        s.qemu_img(&format!("create -f qcow2 -o {options} i.qcow2 1M"));
        s.draw("i.qcow2", 8192, "-- 11 -- zz -- 22");
        same_map(&s, "i.qcow2", options);
    }
}

#[test]
fn raw_files_end_where_they_end() {
    let s = Scratch::new();
    s.draw_raw("holes.raw", 65536, "-- 11 -- 22 --");
    same_map(&s, "-f raw holes.raw", "holes");
    s.write("odd.raw", &[1; 5000]);
    same_map(&s, "-f raw odd.raw", "5000 bytes");
    s.write("empty.raw", b"");
    same_map(&s, "-f raw empty.raw", "empty");
    same_map(&s, "-f raw --start-offset 10M holes.raw", "beyond the end");
}

/// top and middle are longer than what is below them.
#[test]
fn a_deep_chain_says_which_layer_it_is() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 base.qcow2 128k");
    s.draw("base.qcow2", 65536, "11 22");
    s.qemu_img("create -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2 256k");
    s.draw("middle.qcow2", 65536, "-- 33 44");
    s.qemu_img("create -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2 512k");
    s.draw("top.qcow2", 65536, "-- -- 55 -- -- -- 66");
    same_map(&s, "top.qcow2", "chain");
    assert_eq!(s.rebasefs("map top.qcow2"), s.qemu_img("map top.qcow2"));
}

#[test]
fn the_table_for_people_cannot_show_compressed_clusters() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 i.qcow2 1M");
    s.qemu_io("qcow2", "i.qcow2", &["write -c -P 0x77 0 64k"]);
    assert!(s.rebasefs_fails(1, "map i.qcow2").contains("--output=json"));
    assert!(s.rebasefs_fails(1, "map --start-offset x i.qcow2").contains("start offset 'x'"));
    s.rebasefs_fails(1, "map");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 -o cluster_size=512 i.qcow2 4M");
    let writes: Vec<String> = (0..2000).map(|n| format!("write -P 1 {} 512", n * 1024)).collect();
    s.qemu_io("qcow2", "i.qcow2", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    let script = format!("set -o pipefail; {} map --output=json i.qcow2 | head -n 1", rebasefs());
    let ended = s.run_args("bash", &["-c", &script]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.starts_with("[{"), "{}", ended.stdout);
}
