//! Every kind of cluster at every size: standard, zero, compressed, subclusters, odd disk sizes.

use super::reads_like_qemu;
use crate::scratch::Scratch;

/// All there is, once with neighbours of its kind and once without.
const KINDS: &str = "11 12 -- zz -- za -- zu -- .. -- c21 c22 -- 31 zz za 32 c23 .. zu zz -- -- 41 41 za za";

/// The same in brief, for clusters so large that each costs.
const KINDS_IN_BRIEF: &str = "11 -- za zu .. c21 c22 zz -- 31 za";

/// Draws `KINDS` with clusters of that size, over a backing file and without one, in both versions.
fn every_kind_of_cluster(size: usize, options: &str, compats: &[&str]) {
    let s = Scratch::new();
    // At small sizes often enough to need more than one L2 table.
    let kinds = if size < 1 << 20 { KINDS } else { KINDS_IN_BRIEF };
    let picture = [kinds].repeat((64 / (size / 512)).clamp(1, 8)).join(" ");
    let count = picture.split_whitespace().count();
    s.draw_raw("base.raw", size, &["b1 -- b2"].repeat(count / 3 + 1).join(" "));
    for compat in compats {
        for backing in ["", "-F raw -b base.raw"] {
            let options = format!("compat={compat},cluster_size={size}{options}");
            s.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} a.qcow2 {}", count * size));
            s.draw("a.qcow2", size, &picture);
            reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{options} {backing}"));
        }
    }
}

const BOTH: &[&str] = &["0.10", "1.1"];

#[test]
fn clusters_of_512_bytes_read_like_qemu() {
    every_kind_of_cluster(512, "", BOTH);
}

#[test]
fn clusters_of_1k_read_like_qemu() {
    every_kind_of_cluster(1 << 10, "", BOTH);
}

#[test]
fn clusters_of_4k_read_like_qemu() {
    every_kind_of_cluster(4 << 10, "", BOTH);
}

#[test]
fn clusters_of_64k_read_like_qemu() {
    every_kind_of_cluster(64 << 10, "", BOTH);
}

#[test]
fn clusters_of_2m_read_like_qemu() {
    every_kind_of_cluster(2 << 20, "", BOTH);
}

#[test]
fn clusters_compressed_with_zstd_read_like_qemu() {
    for size in [512, 4 << 10, 64 << 10, 2 << 20] {
        every_kind_of_cluster(size, ",compression_type=zstd", &["1.1"]);
    }
}

#[test]
fn whole_clusters_with_extended_l2_entries_read_like_qemu() {
    for size in [16 << 10, 64 << 10, 2 << 20] {
        every_kind_of_cluster(size, ",extended_l2=on", &["1.1"]);
    }
}

#[test]
fn single_subclusters_read_like_qemu() {
    let s = Scratch::new();
    for size in [16 << 10, 32 << 10, 64 << 10, 128 << 10, 2 << 20] {
        // One cell a subcluster; the fourth cluster is left alone.
        let picture = [
            "11 -- 12 12 -- zz zz -- za za 13 .. zu -- zz 14 11 12 13 14 15 16 17 18 zz zz zz zz -- -- -- 19",
            "-- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- -- 21",
            &["zz"].repeat(32).join(" "),
            &["--"].repeat(32).join(" "),
            &["41 zz"].repeat(16).join(" "),
        ];
        s.draw_raw("base.raw", size / 32, &["b1"].repeat(5 * 32).join(" "));
        for backing in ["", "-F raw -b base.raw"] {
            let options = format!("extended_l2=on,cluster_size={size}");
            s.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} a.qcow2 {}", 5 * size));
            s.draw("a.qcow2", size / 32, &picture.join(" "));
            reads_like_qemu(&s, "qcow2", "a.qcow2", &format!("{options} {backing}"));
        }
    }
}

/// Bytes that compress, but not to next to nothing.
fn text(length: usize) -> Vec<u8> {
    (0..)
        .flat_map(|n: u64| format!("line {n}: {:x}\n", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).into_bytes())
        .take(length)
        .collect()
}

#[test]
fn compressed_payloads_of_many_sectors_read_like_qemu() {
    let s = Scratch::new();
    s.write("text.raw", &text(5_000_192));
    for kind in ["zlib", "zstd"] {
        for size in ["512", "1k", "4k", "64k", "2M"] {
            let options = format!("compression_type={kind},cluster_size={size}");
            s.qemu_img(&format!("convert -c -f raw -O qcow2 -o {options} text.raw a.qcow2"));
            reads_like_qemu(&s, "qcow2", "a.qcow2", &options);
        }
    }
}

#[test]
fn disks_that_end_within_a_cluster_read_like_qemu() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 512, &["b1 -- b2"].repeat(3000).join(" "));
    for cluster in ["512", "4k", "64k", "2M"] {
        for size in [0, 512, 1024, 4608, 65536 + 512, (1 << 20) - 512, (2 << 20) + 1536] {
            let options = format!("-o cluster_size={cluster} -F raw -b base.raw a.qcow2 {size}");
            s.qemu_img(&format!("create -q -f qcow2 {options}"));
            if size >= 512 {
                let last = format!("write -P 0x11 {} 512", size - 512);
                s.qemu_io("qcow2", "a.qcow2", &[&last, "write -P 0x12 0 512"]);
            }
            reads_like_qemu(&s, "qcow2", "a.qcow2", &options);
        }
    }
}

#[test]
fn a_disk_of_half_a_sector_too_many_is_rounded_like_qemu_does() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 a.qcow2 64k");
    s.draw("a.qcow2", 65536, "11");
    s.poke("a.qcow2", 24, &1000u64.to_be_bytes());
    reads_like_qemu(&s, "qcow2", "a.qcow2", "1000 bytes");
}
