//! What the header can switch on, and what befalls an image in its life: refcount widths,
//! preallocation, external data files, resizing, bitmaps, a file cut within its last cluster.

use rebasefs::layer::{Detail, ExtentKind, GuestOffset};

use super::{open, reads_like_qemu};
use crate::scratch::Scratch;

const MIXED: &str = "11 -- zz za .. 12 12 -- zu -- 13 -- -- -- zz 14";

#[test]
fn every_refcount_width_reads_like_qemu() {
    let s = Scratch::new();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        s.qemu_img(&format!("create -q -f qcow2 -o refcount_bits={bits} a.qcow2 1M"));
        s.draw("a.qcow2", 65536, MIXED);
        reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("refcount_bits={bits}"));
    }
}

#[test]
fn every_preallocation_reads_like_qemu() {
    let s = Scratch::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        for options in ["compat=0.10", "cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
            let options = format!("preallocation={mode},{options}");
            s.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 4M"));
            reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{options}, fresh"));
            s.draw("a.qcow2", 65536, "-- 11 -- zz 12");
            reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{options}, written"));
        }
    }
}

#[test]
fn preallocated_clusters_that_were_never_written_are_holes_to_who_looks_closely() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 -o preallocation=metadata a.qcow2 8M");
    let chain = open(&s, "a.qcow2").unwrap();
    let says = |detail| chain.extent_at(GuestOffset(0), 8 << 20, detail).unwrap().extent;
    assert!(matches!(says(Detail::Owner).kind, ExtentKind::Data(_)));
    assert!(matches!(says(Detail::Holes).kind, ExtentKind::Zero(Some(_))));
    assert_eq!(says(Detail::Holes).length, 8 << 20);
}

#[test]
fn external_data_files_read_like_qemu() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, &["b1"].repeat(16).join(" "));
    let shapes = [
        "data_file_raw=off",
        "data_file_raw=on",
        "data_file_raw=off,extended_l2=on",
        "data_file_raw=on,preallocation=full",
    ];
    for options in shapes {
        for size in [1 << 20, (1 << 20) + 1536] {
            let file = s.path("data.raw").display().to_string();
            let options = format!("data_file={file},{options}");
            s.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 {size}"));
            s.draw("a.qcow2", 65536, MIXED);
            reads_like_qemu(&s, "qcow2", "a.qcow2", &options);
            std::fs::remove_file(s.path("data.raw")).unwrap();
        }
    }
    let file = s.path("data.raw").display().to_string();
    s.qemu_img(&format!("create -q -f qcow2 -o data_file={file} -F raw -b base.raw a.qcow2 2M"));
    s.draw("a.qcow2", 65536, MIXED);
    reads_like_qemu(&s, "qcow2", "a.qcow2", "data file and backing file");
}

#[test]
fn resized_images_read_like_qemu() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, &["b1"].repeat(32).join(" "));
    for (options, cluster) in [("", 65536), (",cluster_size=512", 512), (",compat=0.10", 65536)] {
        for change in ["+1M", "+512", "--shrink -- -1M", "--shrink -- -512", "--shrink -- 512"] {
            let create = format!("create -q -f qcow2 -F raw -b base.raw -o backing_fmt=raw{options}");
            s.qemu_img(&format!("{create} a.qcow2 2M"));
            s.draw("a.qcow2", cluster, MIXED);
            s.qemu_io("qcow2", "a.qcow2", &["write -P 0x55 2000k 48k"]);
            s.qemu_img(&format!("resize -q -f qcow2 {}", resize(change)));
            reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{options} {change}"));
        }
    }
}

fn resize(change: &str) -> String {
    match change.strip_prefix("--shrink -- ") {
        Some(change) => format!("--shrink -- a.qcow2 {change}"),
        None => format!("a.qcow2 {change}"),
    }
}

#[test]
fn an_image_with_persistent_bitmaps_reads_like_qemu() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 a.qcow2 1M");
    s.qemu_img("bitmap --add -g 64k a.qcow2 one");
    s.qemu_img("bitmap --add -g 4k a.qcow2 two");
    s.draw("a.qcow2", 65536, MIXED);
    reads_like_qemu(&s, "qcow2", "a.qcow2", "bitmaps");
}

#[test]
fn a_file_that_ends_within_its_last_cluster_reads_like_qemu() {
    let s = Scratch::new();
    for cut in [1, 512, 1000, 65535] {
        s.qemu_img("create -q -f qcow2 a.qcow2 1M");
        s.draw("a.qcow2", 65536, "11 12 13");
        s.cut("a.qcow2", cut);
        reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{cut} bytes cut"));
    }
}

#[test]
fn dirty_and_corrupt_images_are_read_all_the_same() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 -o lazy_refcounts=on a.qcow2 1M");
    s.draw("a.qcow2", 65536, MIXED);
    for bits in [1u64, 2, 3] {
        s.poke("a.qcow2", 72, &bits.to_be_bytes());
        reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("incompatible bits {bits}"));
    }
}

#[test]
fn raw_files_of_any_size_read_like_qemu_and_their_holes_are_zeros() {
    let s = Scratch::new();
    for size in [0, 1, 511, 512, 513, 70_000] {
        s.write("a.raw", &vec![0x11; size]);
        reads_like_qemu(&s, "raw", "a.raw", &format!("{size} bytes"));
    }
    s.draw_raw("a.raw", 65536, "11 -- -- 12 -- --");
    reads_like_qemu(&s, "raw", "a.raw", "holes");
    let chain = open(&s, "a.raw").unwrap();
    let hole = chain.extent_at(GuestOffset(65536), 5 * 65536, Detail::Holes).unwrap().extent;
    assert!(matches!(hole.kind, ExtentKind::Zero(Some(_))));
    assert_eq!(hole.length, 2 * 65536);
}
