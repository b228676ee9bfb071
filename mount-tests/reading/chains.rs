//! Chains: formats and cluster sizes mixed, layers of different lengths, many layers.

use super::{open, reads_as, reads_like_qemu};
use crate::scratch::{LoopDevice, Scratch};

/// Makes `NAME.qcow2` with these clusters drawn into it.
fn layer(s: &Scratch, name: &str, options: &str, backing: &str, size: usize, cluster: usize, picture: &str) {
    s.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} {name}.qcow2 {size}"));
    s.draw(&format!("{name}.qcow2"), cluster, picture);
}

#[test]
fn two_to_six_layers_of_mixed_cluster_sizes_read_like_qemu() {
    let s = Scratch::new();
    const K: usize = 65536;
    s.draw_raw("base.raw", K, "b1 b2 b3 -- b5 b6 b7 b8 -- bA bB bC");
    let below = |n: usize| match n {
        0 => "-F raw -b base.raw".to_owned(),
        n => format!("-F qcow2 -b l{}.qcow2", n - 1),
    };
    let options = [
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=4k,compat=0.10",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=1k",
    ];
    let pictures = [
        "11 -- -- 14 -- zz -- -- 19",
        "-- 22 -- -- zz -- -- -- -- 2A",
        "-- -- 33 -- -- -- -- zz",
        "41 -- -- zz -- -- -- -- -- -- za 4C",
        "-- 52 zz -- 55",
    ];
    for n in 0..5 {
        layer(&s, &format!("l{n}"), options[n], &below(n), 12 * K, K, pictures[n]);
        reads_like_qemu(&s, "qcow2", &format!("l{n}.qcow2"), &format!("{} layers", n + 2));
    }
}

#[test]
fn beyond_the_end_of_a_short_layer_zeros_hide_what_lies_below() {
    let s = Scratch::new();
    const K: usize = 65536;
    s.draw_raw("base.raw", K, "b1 b2 b3 b4 b5 b6");
    layer(&s, "short", "cluster_size=64k", "-F raw -b base.raw", 2 * K + 1024, K, "-- 12");
    layer(&s, "long", "cluster_size=4k", "-F qcow2 -b short.qcow2", 8 * K, K, "-- -- -- -- 25");
    layer(&s, "top", "cluster_size=2M", "-F qcow2 -b long.qcow2", 5 * K + 512, K, "31");
    for image in ["short", "long", "top"] {
        reads_like_qemu(&s, "qcow2", &format!("{image}.qcow2"), image);
    }
    let mut beyond = [9; 4];
    let chain = open(&s, "long.qcow2").unwrap();
    chain.read_at(rebasefs::layer::GuestOffset(3 * K as u64), &mut beyond).unwrap();
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn a_raw_base_that_ends_within_a_sector_reads_like_qemu() {
    let s = Scratch::new();
    s.write("base.raw", &vec![0xb1; 70_001]);
    layer(&s, "a", "cluster_size=4k", "-F raw -b base.raw", 1 << 20, 4096, "-- 11");
    reads_like_qemu(&s, "qcow2", "a.qcow2", "base of 70001 bytes");
}

#[test]
fn a_block_device_as_backing_file_reads_like_qemu() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "b1 -- b2 b3");
    let device = LoopDevice::attach(&s.path("base.raw"));
    layer(&s, "a", "cluster_size=64k", &format!("-F raw -b {}", device.path()), 1 << 20, 65536, "-- 11");
    reads_like_qemu(&s, "qcow2", "a.qcow2", "raw on a block device");
}

#[test]
fn a_qcow2_image_on_a_block_device_reads_like_qemu() {
    let s = Scratch::new();
    layer(&s, "a", "cluster_size=4k", "", 1 << 20, 4096, "11 -- zz c12");
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    s.write("disk", &[bytes, vec![0x77; 1 << 20]].concat());
    let device = LoopDevice::attach(&s.path("disk"));
    layer(&s, "b", "cluster_size=64k", &format!("-F qcow2 -b {}", device.path()), 1 << 20, 65536, "-- 11");
    reads_like_qemu(&s, "qcow2", "b.qcow2", "qcow2 on a block device");
}

/// A chain of `depth` layers, `layer0000.qcow2` the lowest. Cluster n of 64 is written in the
/// layers that are n modulo 64. QEMU makes the first 64 layers; the others are copies of them that
/// name another backing file.
pub fn deep_chain(s: &Scratch, depth: usize) -> String {
    let name = |n: usize| format!("layer{n:04}.qcow2");
    for n in 0..depth {
        if n >= 128 {
            std::fs::copy(s.path(name(n - 64)), s.path(name(n))).unwrap();
            let at = find(&std::fs::read(s.path(name(n))).unwrap(), name(n - 65).as_bytes());
            s.poke(&name(n), at as u64, name(n - 1).as_bytes());
            continue;
        }
        let backing = if n == 0 { String::new() } else { format!("-u -F qcow2 -b {}", name(n - 1)) };
        s.qemu_img(&format!("create -q -f qcow2 -o cluster_size=4k {backing} {} 256k", name(n)));
        let write = format!("write -q -P {} {}k 4k", n + 1, n % 64 * 4);
        s.qemu_io("qcow2", &name(n), &[&write]);
    }
    name(depth - 1)
}

fn find(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).position(|window| window == part).expect("the name is in the header")
}

#[test]
fn five_hundred_layers_read_like_qemu() {
    let s = Scratch::new();
    let top = deep_chain(&s, 500);
    let chain = open(&s, &top).unwrap();
    assert_eq!(chain.layers().len(), 500);
    reads_as(&chain, &s.guest_bytes("qcow2", &top), "500 layers");
}
