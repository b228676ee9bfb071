//! The same through the mount and the programs: `disk.raw` against `qemu-img convert`, what depends
//! on the directory in which a program runs, and how many files and how much memory it takes.

use super::chains::deep_chain;
use crate::mounted::Mounted;
use crate::random_chain::{Random, grow};
use crate::scratch::{Scratch, rebasefs};

/// `disk.raw` of the mounted image is what qemu-img converts the image to.
fn mounts_like_qemu(s: &Scratch, image: &str, cell: &str) {
    let expected = s.guest_bytes("qcow2", image);
    let mounted = Mounted::new(s, image);
    let found = mounted.bytes();
    assert_eq!(found.len(), expected.len(), "{cell}");
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{cell}: first difference");
    // Hole by hole, as cp and tar look for them.
    s.ok("cp", &format!("--sparse=always {} copy.raw", mounted.path("disk.raw").display()));
    assert!(std::fs::read(s.path("copy.raw")).unwrap() == expected, "{cell}: copied with holes");
}

#[test]
fn disk_raw_of_every_shape_is_what_qemu_converts_it_to() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, "b1 -- b2 b3 -- b4 b5 b6 -- b7 b8");
    let data = s.path("data.raw").display().to_string();
    let shapes = [
        ("compat=0.10", 1 << 20),
        ("cluster_size=512", (1 << 20) + 512),
        ("cluster_size=2M", 3 << 20),
        ("compression_type=zstd", (1 << 20) - 1536),
        ("extended_l2=on", 900 << 10),
        ("refcount_bits=1,cluster_size=4k", 1 << 20),
        ("preallocation=metadata", 1 << 20),
        (&format!("data_file={data}"), 1 << 20),
    ];
    for (options, size) in shapes {
        let is_allocated = options.contains("preallocation");
        let backing = if is_allocated { "" } else { "-F raw -b base.raw" };
        s.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} a.qcow2 {size}"));
        if !is_allocated && !options.contains("data_file") && !options.contains("2M") {
            s.draw("a.qcow2", 65536, "-- -- -- -- -- -- c21 -- -- c22");
        }
        s.draw("a.qcow2", 65536, "11 -- zz za -- .. -- zu");
        mounts_like_qemu(&s, "a.qcow2", options);
    }
}

#[test]
fn an_empty_disk_mounts() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 a.qcow2 0");
    mounts_like_qemu(&s, "a.qcow2", "0 bytes");
}

#[test]
fn random_chains_mount_like_qemu() {
    for seed in 1000..1012 {
        let s = Scratch::new();
        let mut random = Random::new(seed);
        let depth = 2 + random.below(4) as usize;
        let layers = grow(&s, &mut random, "layer", None, depth, 1 << 20);
        mounts_like_qemu(&s, &layers[0].name, &format!("seed {seed}: {layers:#?}"));
    }
}

#[test]
fn five_hundred_layers_need_no_more_open_files_than_the_hard_limit_and_little_memory() {
    let s = Scratch::new();
    let top = deep_chain(&s, 500);
    let expected = s.guest_bytes("qcow2", &top);
    std::fs::create_dir(s.path("mnt")).unwrap();
    let mountpoint = s.path("mnt");
    let mount = format!("ulimit -Sn 100; exec {} mount {top} {}", rebasefs(), mountpoint.display());
    let ended = s.run_args("bash", &["-c", &mount]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let mounted = Mounted::found(mountpoint);
    assert!(mounted.bytes() == expected);
    let peak = peak_memory(mounted.server());
    assert!(peak < 64 << 20, "{} MiB", peak >> 20);
}

/// The most memory that a process has had resident, in bytes.
fn peak_memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Runs lines of bash that must succeed.
fn bash(s: &Scratch, lines: &str) {
    let ended = s.run_args("bash", &["-ec", lines]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{lines}\n{}", ended.stdout);
}

/// `dir/a.qcow2`, made in this directory (`.` or `dir`), with the external data file `d.raw` as
/// QEMU resolves that: in the current directory. `expected.raw` is what the guest sees.
fn with_data_file(s: &Scratch, made_in: &str) {
    let image = if made_in == "dir" { "a.qcow2" } else { "dir/a.qcow2" };
    let lines = format!(
        "mkdir dir; top=$PWD; cd {made_in}
        qemu-img create -q -f qcow2 -o data_file=d.raw {image} 256k
        qemu-io -f qcow2 -c 'write -q -P 17 64k 64k' {image}
        qemu-img convert -f qcow2 -O raw {image} $top/expected.raw"
    );
    bash(s, &lines);
}

#[test]
fn trap_20_a_data_file_is_looked_for_beside_the_image() {
    let s = Scratch::new();
    with_data_file(&s, "dir");
    s.rebasefs("compare -f qcow2 -F raw dir/a.qcow2 expected.raw");
}

#[test]
fn trap_20_a_data_file_that_is_only_in_the_current_directory_is_taken_as_qemu_does_and_the_user_is_told() {
    let s = Scratch::new();
    with_data_file(&s, ".");
    let ended = s.run(rebasefs(), "compare -f qcow2 -F raw dir/a.qcow2 expected.raw");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("taking d.raw in the current directory"), "{}", ended.stderr);
}

#[test]
fn a_name_that_can_mean_two_files_is_refused_unless_they_are_one() {
    let s = Scratch::new();
    with_data_file(&s, ".");
    s.write("dir/d.raw", &vec![0x22; 256 << 10]);
    let said = s.rebasefs_fails(2, "compare -f qcow2 -F raw dir/a.qcow2 expected.raw");
    assert!(said.contains("dir/d.raw") && said.contains("can also mean d.raw"), "{said}");
    assert!(said.contains("store an absolute path"), "{said}");
    bash(&s, "ln -f d.raw dir/d.raw");
    s.rebasefs("compare -f qcow2 -F raw dir/a.qcow2 expected.raw");
}

#[test]
fn a_backing_name_with_a_prefix_is_looked_for_beside_the_image_too() {
    let s = Scratch::new();
    bash(&s, "mkdir dir; cd dir; qemu-img create -q -u -f qcow2 -F raw -b file:b.raw a.qcow2 128k");
    s.draw_raw("dir/b.raw", 65536, "b1 b2");
    s.rebasefs("compare -f qcow2 -F raw dir/a.qcow2 dir/b.raw");
    s.draw_raw("b.raw", 65536, "77 77");
    let said = s.rebasefs_fails(2, "compare -f qcow2 -F raw dir/a.qcow2 dir/b.raw");
    assert!(said.contains("can also mean b.raw"), "{said}");
}
