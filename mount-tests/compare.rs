//! `rebasefs compare`: messages and exit codes of `qemu-img compare`.

use crate::scratch::{Scratch, rebasefs};

/// Both programs say the same, and it is this.
fn both(s: &Scratch, line: &str, code: i32, message: &str) {
    for program in ["qemu-img", rebasefs()] {
        let ended = s.run(program, &format!("compare {line}"));
        let found = (ended.code, ended.stdout.as_str());
        assert_eq!(found, (Some(code), message), "{program} compare {line}: {}", ended.stderr);
    }
}

const SAME: &str = "Images are identical.\n";

/// a: 11 22 -- 33 --    b: the same bytes, otherwise stored
#[test]
fn the_same_bytes_in_different_formats_are_identical() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "11 99 -- 99");
    s.qemu_img("create -f qcow2 -b base.raw -F raw a.qcow2 320k");
    s.draw("a.qcow2", 65536, "-- 22 zz 33");
    s.draw_raw("b.raw", 65536, "11 22 -- 33 --");
    both(&s, "-f qcow2 -F raw a.qcow2 b.raw", 0, SAME);
    both(&s, "-s a.qcow2 a.qcow2", 0, SAME);
    s.qemu_img("convert -c -O qcow2 -o extended_l2=on a.qcow2 c.qcow2");
    both(&s, "a.qcow2 c.qcow2", 0, SAME);
    both(&s, "-q a.qcow2 c.qcow2", 0, "");
}

#[test]
fn the_first_sector_that_differs_is_named() {
    let s = Scratch::new();
    s.draw_raw("a.raw", 65536, "11 22 -- 33");
    s.draw_raw("b.raw", 65536, "11 22 -- 33");
    s.qemu_io("raw", "b.raw", &["write -P 0x01 200000 3"]);
    both(&s, "-f raw -F raw a.raw b.raw", 1, "Content mismatch at offset 199680!\n");
    both(&s, "-q -f raw -F raw a.raw b.raw", 1, "");
}

#[test]
fn a_longer_image_is_the_same_if_zeros_follow() {
    let s = Scratch::new();
    s.draw_raw("a.raw", 65536, "11");
    s.draw_raw("b.raw", 65536, "11 00");
    s.draw_raw("c.raw", 65536, "11 00 22");
    let warning = "Warning: Image size mismatch!\n";
    both(&s, "-f raw -F raw a.raw b.raw", 0, &format!("{warning}{SAME}"));
    both(&s, "-f raw -F raw c.raw a.raw", 1, &format!("{warning}Content mismatch at offset 131072!\n"));
    both(&s, "-s -f raw -F raw a.raw b.raw", 1, "Strict mode: Image size mismatch!\n");
}

#[test]
fn strictness_tells_zero_clusters_from_none() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 a.qcow2 1M");
    s.qemu_img("create -f qcow2 b.qcow2 1M");
    s.draw("a.qcow2", 65536, "11");
    s.draw("b.qcow2", 65536, "11 zz");
    both(&s, "a.qcow2 b.qcow2", 0, SAME);
    both(&s, "-s a.qcow2 b.qcow2", 1, "Strict mode: Offset 65536 block status mismatch!\n");
}

#[test]
fn failures_never_look_like_a_difference() {
    let s = Scratch::new();
    s.draw_raw("a.raw", 512, "11");
    assert!(s.rebasefs_fails(2, "compare a.raw missing").contains("No such file"));
    assert!(s.rebasefs_fails(2, "compare -f vmdk a.raw a.raw").contains("vmdk"));
    assert!(s.rebasefs_fails(2, "compare --image-opts a.raw a.raw").contains("--image-opts"));
    s.rebasefs_fails(2, "compare a.raw");
    s.rebasefs_fails(2, "compare --nonsense a.raw a.raw");
}

#[test]
fn a_damaged_table_and_a_cluster_that_cannot_be_read_have_exit_codes_of_their_own() {
    let s = Scratch::new();
    s.draw_raw("zero.raw", 65536, "00");
    s.qemu_img("create -f qcow2 a.qcow2 64k");
    s.qemu_io("qcow2", "a.qcow2", &["write -c -P 0x77 0 64k"]);
    let mut image = std::fs::read(s.path("a.qcow2")).unwrap();
    image[0x50000..].fill(0xff);
    s.write("data.qcow2", &image);
    s.rebasefs_fails(4, "compare -F raw data.qcow2 zero.raw");
    image[0x40000..0x40008].fill(0xff);
    s.write("tables.qcow2", &image);
    s.rebasefs_fails(3, "compare -F raw tables.qcow2 zero.raw");
}
