//! `rebasefs create`: images that QEMU takes for its own.

use rebasefs::file::{Access, CacheMode, HostFile, LocalFile, Lock};
use serde_json::Value;

use crate::scratch::{LoopMount, Scratch, rebasefs};

/// Makes the image with both programs: the same line printed, the same description, and what
/// rebasefs made is sound, also after QEMU has written to it.
fn same_image(line: &str) {
    let made = ["qemu-img", rebasefs()].map(|program| {
        let s = Scratch::new();
        s.draw_raw("base.raw", 65536, "11 -- 22");
        let printed = s.ok(program, &format!("create -f qcow2 {line}"));
        let json = s.qemu_img("info --output=json i.qcow2");
        let mut info: Value = serde_json::from_str(&json).unwrap();
        // What it takes on disk, and how long the file is: the layout is the program's own.
        info.as_object_mut().unwrap().retain(|field, _| field != "actual-size" && field != "children");
        (s, printed, info)
    });
    let [(_, printed, info), (s, our_printed, our_info)] = made;
    assert_eq!((our_printed, our_info), (printed, info), "{line}");
    s.check_clean("i.qcow2");
    s.draw("i.qcow2", 65536, "33 zz -- 44");
    s.check_clean("i.qcow2");
    let written = s.guest_bytes("qcow2", "i.qcow2");
    let base = if line.contains("-b ") { 0x22 } else { 0 };
    let first_of = |cluster: usize| written[cluster * 65536];
    assert_eq!([0, 1, 2, 3].map(first_of), [0x33, 0, base, 0x44], "{line}");
}

#[test]
fn every_option_means_what_it_means_to_qemu() {
    for options in [
        "compat=0.10",
        "compat=v3,lazy_refcounts=on",
        "extended_l2=on",
        "extended_l2,cluster_size=16k,preallocation=metadata",
        "compression_type=zstd",
        "cluster_size=2M,preallocation=metadata",
        "cluster_size=512,preallocation=falloc",
        "preallocation=full",
        "data_file=data.raw",
        "data_file=data,,2.raw,data_file_raw=on",
        "data_file=data.raw,extended_l2=on,preallocation=falloc",
        "nocow=off",
    ] {
        same_image(&format!("-o {options} i.qcow2 1234567"));
    }
}

#[test]
fn every_refcount_width_counts_the_tables_themselves() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        same_image(&format!("-o refcount_bits={bits},cluster_size=512,preallocation=metadata i.qcow2 3M"));
        same_image(&format!("-o refcount_bits={bits},cluster_size=64k i.qcow2 1.5M"));
    }
}

#[test]
fn large_disks_cost_little() {
    let s = Scratch::new();
    s.rebasefs("create -q -f qcow2 -o cluster_size=512 fine.qcow2 100G");
    s.rebasefs("create -q -f qcow2 large.qcow2 1P");
    s.check_clean("fine.qcow2");
    s.check_clean("large.qcow2");
    let error = s.rebasefs_fails(1, "create -f qcow2 -o cluster_size=512 i.qcow2 1T");
    assert!(error.contains("larger clusters"), "{error}");
    assert!(!s.path("i.qcow2").exists());
}

#[test]
fn a_backing_file_gives_size_and_format() {
    same_image("-b base.raw -F raw i.qcow2 1M");
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "11 -- 22");
    s.rebasefs("create -f qcow2 -o backing_file=base.raw,backing_fmt=raw,compat=0.10 i.qcow2");
    assert!(s.qemu_img("info i.qcow2").contains("virtual size: 192 KiB"));
    s.same("base.raw", "i.qcow2");
}

#[test]
fn the_format_of_a_backing_file_is_recognised_and_recorded() {
    let s = Scratch::new();
    std::fs::create_dir(s.path("sub")).unwrap();
    s.rebasefs("create -f qcow2 base.qcow2 3M");
    s.rebasefs("create -f qcow2 -b ../base.qcow2 sub/i.qcow2");
    let said = s.qemu_img("info sub/i.qcow2");
    assert!(said.contains("virtual size: 3 MiB"), "{said}");
    assert!(said.contains("backing file format: qcow2"), "{said}");
}

#[test]
fn raw_images_are_whole_sectors() {
    let s = Scratch::new();
    for options in ["", "-o preallocation=falloc", "-o preallocation=full"] {
        let line = |file: &str| format!("create -f raw {options} {file} 1000");
        let ours = s.rebasefs(&line("ours.raw")).replace("ours", "");
        assert_eq!(ours, s.qemu_img(&line("theirs.raw")).replace("theirs", ""));
        assert_eq!(std::fs::read(s.path("ours.raw")).unwrap(), [0; 1024]);
    }
}

#[test]
fn what_cannot_be_made_is_refused_by_name_and_leaves_no_file() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 512, "11");
    let long = format!("-u -b {} -F raw i.qcow2 1M", "x".repeat(1024));
    for (line, reason) in [
        ("-o encryption=on i.qcow2 1M", "encryption"),
        ("-o frobnicate=1 i.qcow2 1M", "frobnicate"),
        ("-o cluster_size=1000 i.qcow2 1M", "cluster_size"),
        ("-o refcount_bits=3 i.qcow2 1M", "refcount_bits"),
        ("-o compat=0.10,extended_l2=on i.qcow2 1M", "extended_l2"),
        ("-o extended_l2=on,cluster_size=4k i.qcow2 1M", "16 KiB"),
        ("-o preallocation=metadata -b base.raw i.qcow2", "extended_l2"),
        ("-o data_file_raw=on i.qcow2 1M", "data_file"),
        ("-o data_file=i.qcow2 i.qcow2 1M", "itself"),
        ("-o size=1M i.qcow2 1M", "twice"),
        ("-b missing.raw i.qcow2 1M", "missing.raw"),
        ("-u -b missing.raw i.qcow2 1M", "-F"),
        ("-F raw i.qcow2 1M", "no backing file"),
        ("--object secret,id=s i.qcow2 1M", "--object"),
        ("i.qcow2", "size"),
        ("i.qcow2 12x", "12x"),
        ("i.qcow2 -1", "-1"),
        (&long, "1024"),
    ] {
        let message = s.rebasefs_fails(1, &format!("create -f qcow2 {line}"));
        assert!(message.contains(reason), "{line}: {message}");
        assert!(!s.path("i.qcow2").exists(), "{line}");
    }
    assert!(s.rebasefs_fails(1, "create -f vmdk i 1M").contains("vmdk"));
    assert!(s.rebasefs_fails(1, "create -f raw -b base.raw i 1M").contains("raw image"));
    assert!(s.rebasefs("create -f qcow2 -o help").contains("cluster_size"));
}

#[test]
fn an_image_that_is_in_use_or_its_own_backing_file_is_left_alone() {
    let s = Scratch::new();
    s.rebasefs("create -f qcow2 base.qcow2 1M");
    s.rebasefs("create -f qcow2 -b base.qcow2 top.qcow2");
    let before = std::fs::read(s.path("base.qcow2")).unwrap();
    s.rebasefs_fails(1, "create -f qcow2 -b base.qcow2 base.qcow2");
    s.rebasefs_fails(1, "create -f qcow2 -b top.qcow2 base.qcow2");
    let file = LocalFile::open(&s.path("base.qcow2"), Access::ReadWrite, CacheMode::default()).unwrap();
    file.lock(Lock::Write).unwrap();
    assert!(s.rebasefs_fails(1, "create -f qcow2 base.qcow2 1M").contains("in use"));
    assert_eq!(std::fs::read(s.path("base.qcow2")).unwrap(), before);
}

#[test]
fn a_file_whose_blocks_are_not_copied_is_made_as_qemu_makes_it() {
    let s = Scratch::new();
    std::fs::File::create(s.path("disk")).unwrap().set_len(200 << 20).unwrap();
    s.ok("mkfs.btrfs", "-q disk");
    let mount = LoopMount::new(&s, &s.path("disk"), "rw");
    let here = Scratch::within(mount.path());
    for (number, options) in ["-f qcow2 -o nocow=on", "-f raw -o nocow=on", "-f qcow2"].iter().enumerate() {
        let flags = |name: &str| here.ok("lsattr", name).split(' ').next().unwrap().to_owned();
        here.qemu_img(&format!("create -q {options} theirs{number} 1M"));
        here.rebasefs(&format!("create -q {options} ours{number} 1M"));
        assert_eq!(flags(&format!("ours{number}")), flags(&format!("theirs{number}")), "{options}");
        assert_eq!(flags(&format!("ours{number}")).contains('C'), options.contains("nocow"));
    }
    // Where the file system has no such flag it is no error either.
    s.rebasefs("create -f raw -o nocow=on plain.raw 1M");
}

/// A line that is refused, and whether qemu-img prints `Formatting …` before it says so.
#[test]
fn the_line_comes_before_an_error_where_it_does_with_qemu_img() {
    let s = Scratch::new();
    for line in [
        "-f qcow2 -o cluster_size=3 e.qcow2 1M",
        "-f qcow2 -o refcount_bits=abc e.qcow2 1M",
        "-f qcow2 -o refcount_bits=3 e.qcow2 1M",
        "-f qcow2 -o lazy_refcounts=maybe e.qcow2 1M",
        "-f qcow2 -o extended_l2=on,cluster_size=4k e.qcow2 1M",
        "-f qcow2 -o preallocation=bad e.qcow2 1M",
        "-f qcow2 none/e.qcow2 1M",
        "-f raw none/e.raw 1M",
        "-f qcow2 -b none.raw -F raw e.qcow2 1M",
        "-f qcow2 e.qcow2",
    ] {
        let (ours, theirs) =
            (s.run(rebasefs(), &format!("create {line}")), s.run("qemu-img", &format!("create {line}")));
        assert_eq!((ours.code, ours.stdout), (theirs.code, theirs.stdout), "{line}");
        assert!(!s.path("e.qcow2").exists() || !ours.stderr.is_empty(), "{line}");
        let _ = std::fs::remove_file(s.path("e.qcow2"));
    }
}

#[test]
fn a_backing_file_may_have_a_name_that_is_no_text_and_be_in_use() {
    use std::os::unix::ffi::OsStrExt;
    let s = Scratch::new();
    let name = std::ffi::OsStr::from_bytes(b"b\xff.raw");
    std::fs::File::create(s.path("").join(name)).unwrap().set_len(1 << 20).unwrap();
    s.qemu_img("create -q -f qcow2 base.qcow2 2M");
    let mut names = vec![(name, "raw"), ("base.qcow2".as_ref(), "qcow2")];
    for (backing, format) in names.drain(..) {
        let _held = crate::locks::Qemu::opens_for_writing(&s, format, backing);
        for (program, image) in [("qemu-img", "theirs.qcow2"), (rebasefs(), "ours.qcow2")] {
            let status = std::process::Command::new(program)
                .args(["create", "-q", "-f", "qcow2", "-F", format, image, "-b"])
                .arg(backing)
                .current_dir(s.path(""))
                .status();
            assert!(status.unwrap().success(), "{program}");
        }
        assert!(
            std::fs::read(s.path("ours.qcow2")).unwrap() == std::fs::read(s.path("theirs.qcow2")).unwrap()
        );
    }
    s.rebasefs("create -q -U -f qcow2 -b base.qcow2 -F qcow2 forced.qcow2");
}
