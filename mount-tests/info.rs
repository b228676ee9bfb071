//! `rebasefs info`: every field and every line of `qemu-img info`.

use serde_json::Value;

use crate::scratch::{LoopDevice, Scratch, rebasefs};

/// Text and JSON of both programs are the same.
fn same_info(s: &Scratch, line: &str) {
    let text = |program: &str| s.ok(program, &format!("info {line}"));
    assert_eq!(text(rebasefs()), text("qemu-img"), "{line}");
    let json = |program: &str| -> Value {
        serde_json::from_str(&s.ok(program, &format!("info --output=json {line}"))).unwrap()
    };
    assert_eq!(json(rebasefs()), json("qemu-img"), "{line}");
}

#[test]
fn every_shape_is_described_as_qemu_describes_it() {
    for options in [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "extended_l2=on,compression_type=zstd",
        "data_file=data.raw",
        "data_file=other.raw,data_file_raw=on",
        "preallocation=full",
    ] {
        let s = Scratch::new();
        s.qemu_img(&format!("create -f qcow2 -o {options} i.qcow2 1234K"));
        same_info(&s, "i.qcow2");
        same_info(&s, "-f raw i.qcow2");
    }
}

#[test]
fn snapshots_and_bitmaps_are_listed() {
    let s = Scratch::new();
    s.qemu_img("create -f qcow2 i.qcow2 10M");
    s.qemu_img("snapshot -c first i.qcow2");
    s.qemu_img("snapshot -c a-näme-that-is-longer-than-the-column i.qcow2");
    s.qemu_img("bitmap --add -g 64k i.qcow2 on");
    s.qemu_img("bitmap --add --disable -g 1M i.qcow2 off");
    same_info(&s, "i.qcow2");
}

#[test]
fn a_backing_file_is_shown_as_named_and_as_found() {
    let s = Scratch::new();
    std::fs::create_dir(s.path("sub")).unwrap();
    s.draw_raw("base.raw", 65536, "11 --");
    s.qemu_img("create -f qcow2 -b base.raw -F raw middle.qcow2");
    s.qemu_img("create -f qcow2 -b ../middle.qcow2 -F qcow2 sub/top.qcow2");
    same_info(&s, "sub/top.qcow2");
    same_info(&s, "--backing-chain sub/top.qcow2");
    same_info(&s, "middle.qcow2");
}

#[test]
fn a_backing_file_that_is_missing_matters_to_the_chain_only() {
    let s = Scratch::new();
    s.qemu_img("create -u -f qcow2 -b gone.qcow2 -F qcow2 i.qcow2 1M");
    same_info(&s, "i.qcow2");
    assert!(s.rebasefs_fails(1, "info --backing-chain i.qcow2").contains("gone.qcow2"));
}

#[test]
fn raw_files_have_no_secrets() {
    let s = Scratch::new();
    s.write("odd.raw", &[1; 1000]);
    same_info(&s, "-f raw odd.raw");
    s.draw_raw("holes.raw", 65536, "-- 11 -- 22");
    same_info(&s, "holes.raw");
    s.rebasefs_fails(1, "info");
    s.rebasefs_fails(1, "info missing.raw");
    assert!(s.rebasefs_fails(1, "info -f vmdk odd.raw").contains("vmdk"));
    assert!(s.rebasefs("info --help").contains("Example:"));
}

#[test]
fn names_that_are_no_paths_and_formats_that_are_padded_are_shown_as_qemu_shows_them() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "11");
    s.qemu_img("create -q -f qcow2 base.qcow2 1M");
    for name in [
        "nbd://localhost/x",
        "nothing:at-all",
        "file:base.raw",
        "./a:b",
        "sub/../base.raw",
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#,
        r#"json:{"file":{"driver":"nbd","host":"h"}}"#,
    ] {
        let made = s
            .run_args("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "i", "1M"]);
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        same_info(&s, "i");
    }
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw padded.qcow2");
    let image = std::fs::read(s.path("padded.qcow2")).unwrap();
    let at = image.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    // Eight bytes, of which five were padding.
    s.poke("padded.qcow2", at as u64 + 4, &8u32.to_be_bytes());
    same_info(&s, "--backing-chain padded.qcow2");
    s.same("padded.qcow2", "base.raw");
    assert_eq!(s.rebasefs("map padded.qcow2"), s.qemu_img("map padded.qcow2"));
}

#[test]
fn a_device_is_described_as_qemu_describes_it() {
    let s = Scratch::new();
    std::fs::File::create(s.path("disk")).unwrap().set_len(4 << 20).unwrap();
    let device = LoopDevice::attach(&s.path("disk"));
    s.qemu_img(&format!("create -q -f qcow2 {} 1M", device.path()));
    same_info(&s, device.path());
}
