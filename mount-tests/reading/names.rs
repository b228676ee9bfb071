//! Names by which images refer to files: where they lead, with QEMU's answer beside ours.

use super::{open, open_fails, reads_like_qemu};
use crate::scratch::Scratch;

/// `a.qcow2` names `base.raw` by this name; it opens and reads like QEMU.
fn leads_to(s: &Scratch, base: &str, name: &str) {
    s.draw_raw(base, 65536, "b1 -- b2");
    let arguments = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, "a.qcow2", "256k"];
    assert_eq!(s.run_args("qemu-img", &arguments).stderr, "");
    s.draw("a.qcow2", 65536, "-- 11");
    reads_like_qemu(s, "qcow2", "a.qcow2", name);
    std::fs::remove_file(s.path(base)).unwrap();
}

#[test]
fn backing_names_of_every_shape_lead_where_qemu_lets_them_lead() {
    let s = Scratch::new();
    std::fs::create_dir(s.path("dir")).unwrap();
    for name in ["base.raw", "with space.raw", "grün 漢字.raw", "dir/base.raw", "./dir/../base.raw"] {
        leads_to(&s, name, name);
    }
    leads_to(&s, "b:1.raw", "./b:1.raw");
    leads_to(&s, "dir/b:1.raw", "dir/b:1.raw");
    leads_to(&s, "base.raw", &s.path("base.raw").display().to_string());
    leads_to(&s, "base.raw", "file:base.raw");
    leads_to(&s, "base.raw", &format!("file:{}", s.path("base.raw").display()));
    leads_to(&s, "base.raw", r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#);
    leads_to(&s, "base.raw", r#"json:{"driver":"raw","file.filename":"base.raw"}"#);
}

#[test]
fn trap_12_a_name_with_a_colon_is_a_protocol_and_the_message_says_what_to_do() {
    let s = Scratch::new();
    s.draw_raw("b:1.raw", 65536, "b1");
    s.qemu_img("create -q -u -f qcow2 -F raw -b b:1.raw a.qcow2 64k");
    let said = open_fails(&s, "a.qcow2");
    assert!(said.contains("protocol 'b' is not supported") && said.contains("`./NAME`"), "{said}");
    assert!(said.contains("layer 1 of the chain"), "{said}");
}

#[test]
fn trap_12_a_name_is_looked_for_beside_the_link_through_which_the_overlay_was_reached() {
    let s = Scratch::new();
    for directory in ["real", "link"] {
        std::fs::create_dir(s.path(directory)).unwrap();
    }
    s.draw_raw("real/base.raw", 65536, "b1");
    s.draw_raw("link/base.raw", 65536, "b2");
    s.qemu_img("create -q -f qcow2 -F raw -b base.raw real/a.qcow2 64k");
    std::os::unix::fs::symlink("../real/a.qcow2", s.path("link/a.qcow2")).unwrap();
    reads_like_qemu(&s, "qcow2", "real/a.qcow2", "by its own name");
    reads_like_qemu(&s, "qcow2", "link/a.qcow2", "by the link");
}

#[test]
fn a_chain_through_other_directories_is_resolved_from_each_image() {
    let s = Scratch::new();
    std::fs::create_dir_all(s.path("one/two")).unwrap();
    s.draw_raw("one/base.raw", 65536, "b1 b2 b3 b4");
    s.qemu_img("create -q -u -f qcow2 -F raw -b ../base.raw one/two/middle.qcow2 256k");
    s.qemu_img("create -q -u -f qcow2 -F qcow2 -b one/two/middle.qcow2 a.qcow2 256k");
    s.draw("a.qcow2", 65536, "-- 11");
    reads_like_qemu(&s, "qcow2", "a.qcow2", "three directories");
    assert_eq!(open(&s, "a.qcow2").unwrap().layers().len(), 3);
}
