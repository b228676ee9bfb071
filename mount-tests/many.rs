//! Many overlays in one command: each of them as if it had been rebased by itself, and the backing
//! files compared once.

mod refused;
mod saved;
mod stopped;

use crate::random_chain::{Random, grow, qcow2};
use crate::scratch::{Ended, Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// `old` and `new`, raw, and so many overlays `o0`, `o1` … on the first that hold nothing.
fn siblings(old: &str, new: &str, count: usize) -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("old", CLUSTER, old);
    scratch.draw_raw("new", CLUSTER, new);
    scratch.qemu_img("create -f qcow2 -b old -F raw o0");
    for number in 1..count {
        std::fs::copy(scratch.path("o0"), scratch.path(format!("o{number}"))).unwrap();
    }
    scratch
}

fn bytes_of(scratch: &Scratch, files: &[impl AsRef<str>]) -> Vec<Vec<u8>> {
    files.iter().map(|name| std::fs::read(scratch.path(name.as_ref())).unwrap()).collect()
}

/// Of each image what its guest sees.
fn seen(scratch: &Scratch, images: &[impl AsRef<str>]) -> Vec<Vec<u8>> {
    images.iter().map(|image| scratch.guest_bytes("qcow2", image.as_ref())).collect()
}

/// All images name this file, and are clean.
fn all_stand_on(scratch: &Scratch, images: &[impl AsRef<str>], backing: &str) {
    for image in images {
        assert_eq!(crate::rebase::backing_of(scratch, image.as_ref()).0.as_deref(), Some(backing));
        scratch.check_clean(image.as_ref());
    }
}

/// How many bytes were read from files of these names, all threads together.
fn bytes_read(scratch: &Scratch, line: &str, files: &[&str]) -> u64 {
    let traced = format!("-f -y -qq -e trace=read,pread64 -o trace {} {line}", rebasefs());
    scratch.ok("strace", &traced);
    let trace = std::fs::read_to_string(scratch.path("trace")).unwrap();
    let is_of = |line: &str| files.iter().any(|file| line.contains(&format!("/{file}>,")));
    // A call that another thread interrupted has its result in the line that resumes it.
    let mut waiting = std::collections::HashSet::new();
    let mut sum = 0;
    for line in trace.lines() {
        let thread = line.split(' ').next().unwrap();
        if line.contains("resumed>") && !waiting.remove(thread) || !line.contains("resumed>") && !is_of(line)
        {
            continue;
        }
        match line.rsplit_once(" = ").and_then(|(_, result)| result.parse::<u64>().ok()) {
            Some(bytes) => sum += bytes,
            None => assert!(waiting.insert(thread), "{line}"),
        }
    }
    sum
}

#[test]
fn overlays_of_every_shape_keep_their_bytes_and_their_snapshots() {
    let scratch = siblings("11 11 -- 11 22 11 11", "11 33 44 11 -- 11 11 55 55", 0);
    let shapes = [
        ("compat=0.10", "448k"),
        ("cluster_size=512", "448k"),
        ("cluster_size=4k", "200k"),
        ("cluster_size=2M", "448k"),
        ("extended_l2=on", "448k"),
        // Behind the end of both there are zeros; between the ends only one has data.
        ("compat=1.1", "3M"),
        ("compat=1.1", "512k"),
        ("compat=1.1", "129k"),
    ];
    let names: Vec<String> = (0..shapes.len()).map(|number| format!("shape{number}")).collect();
    for ((options, size), name) in shapes.iter().zip(&names) {
        scratch.qemu_img(&format!("create -f qcow2 -o {options} -b old -F raw {name} {size}"));
        scratch.qemu_io("qcow2", name, &["write -P 0x71 70000 9000"]);
        scratch.qemu_img(&format!("snapshot -c one {name}"));
        scratch.qemu_io("qcow2", name, &["write -P 0x72 100000 30000"]);
    }
    let snapshots = || {
        for name in &names {
            scratch.qemu_img(&format!("convert -l snapshot.name=one -O raw {name} {name}.one"));
        }
        bytes_of(&scratch, &names.iter().map(|name| format!("{name}.one")).collect::<Vec<_>>())
    };
    let (before, bases) = ((seen(&scratch, &names), snapshots()), bytes_of(&scratch, &["old", "new"]));
    let said = scratch.rebasefs(&format!("rebase -b new -F raw {}", names.join(" ")));
    assert!(before == (seen(&scratch, &names), snapshots()), "guest bytes changed");
    assert!(bases == bytes_of(&scratch, &["old", "new"]), "a backing file was changed");
    all_stand_on(&scratch, &names, "new");
    // A line each.
    for name in &names {
        assert_eq!(said.lines().filter(|line| line.starts_with(&format!("{name}: rebased: "))).count(), 1);
    }
    assert_eq!(said.lines().count(), names.len());
}

#[test]
fn random_siblings_keep_their_bytes() {
    for seed in 0..12 {
        let scratch = Scratch::new();
        let mut random = Random::new(seed);
        let size = random.pick(&[100_352, 1 << 20, 2 << 20]);
        let base = grow(&scratch, &mut random, "base", None, 1, size);
        let depth = random.below(3) as usize;
        let old = grow(&scratch, &mut random, "old", base.first(), depth, size);
        let new = grow(&scratch, &mut random, "new", base.first(), 1, size);
        let names: Vec<String> = (0..4)
            .map(|number| {
                let below = old.first().or(base.first());
                qcow2(&scratch, &mut random, &format!("cow{number}"), size, below).name
            })
            .collect();
        let before = seen(&scratch, &names);
        let (target, format) = (&new[0].name, new[0].format);
        let compress = if seed % 2 == 0 { "" } else { "-c" };
        scratch.rebasefs(&format!("rebase {compress} -b {target} -F {format} {}", names.join(" ")));
        assert!(before == seen(&scratch, &names), "guest bytes changed: seed {seed}");
        all_stand_on(&scratch, &names, target);
    }
}

#[test]
fn one_that_fails_stops_no_other_and_is_left_as_it_was() {
    let scratch = siblings("11 11", "11 22", 5);
    // Marked as corrupt; no image at all; not there.
    scratch.poke("o1", 79, &[2]);
    scratch.write("o3", b"not an image");
    let good = ["o0", "o2", "o4"];
    let (before, failing) = (seen(&scratch, &good), bytes_of(&scratch, &["o1", "o3"]));
    let Ended { code, stdout, stderr } =
        scratch.run(rebasefs(), "rebase -b new -F raw o0 o1 o2 missing o3 o4");
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    assert!(before == seen(&scratch, &good), "guest bytes changed");
    all_stand_on(&scratch, &good, "new");
    assert!(failing == bytes_of(&scratch, &["o1", "o3"]), "what failed was written to");
    assert_eq!(stdout.lines().count(), 3, "{stdout}");
    for (name, why) in [("o1", "marked as corrupt"), ("o3", "only qcow2"), ("missing", "No such file")] {
        let line = stderr.lines().find(|line| line.starts_with(&format!("{name}: failed: ")));
        assert!(line.is_some_and(|line| line.contains(why)), "{stderr}");
    }
    assert!(stderr.ends_with("rebasefs: 3 of 6 images failed\n"), "{stderr}");
}

#[test]
fn old_and_new_backing_file_are_read_once_for_all() {
    // 8 MiB of data each, one cluster differs.
    let old = "11 ".repeat(128);
    let scratch = siblings(&old, &format!("22 {}", "11 ".repeat(127)), 12);
    let one = bytes_read(&scratch, "rebase -b new -F raw o0", &["old", "new"]);
    assert!(one >= 16 << 20, "strace saw {one} bytes only");
    let eleven = "o1 o2 o3 o4 o5 o6 o7 o8 o9 o10 o11";
    let many = bytes_read(&scratch, &format!("rebase -b new -F raw {eleven}"), &["old", "new"]);
    // The cluster that differs, of both; and to recognise formats.
    let each = 2 * CLUSTER as u64 + 8192;
    assert!(many <= one + 11 * each, "one: {one}, eleven more: {many}");
}

#[test]
fn overlays_on_other_backing_files_are_groups_of_their_own() {
    // a: 11 11 22 → 11 33 22    b: 44 11 22 → 44 11 --    c: one overlay only
    let scratch = Scratch::new();
    for (directory, old, new) in
        [("a", "11 11 22", "11 33 22"), ("b", "44 11 22", "44 11 --"), ("c", "55", "66")]
    {
        std::fs::create_dir(scratch.path(directory)).unwrap();
        scratch.draw_raw(&format!("{directory}/old"), CLUSTER, old);
        scratch.draw_raw(&format!("{directory}/new"), CLUSTER, new);
    }
    let names = ["a/x", "b/x", "c/x", "a/y", "b/y"];
    for name in names {
        let old = format!("{}/old", &name[..1]);
        scratch.qemu_img(&format!("create -q -f qcow2 -b {} -F raw {name}", scratch.path(old).display()));
    }
    let before = seen(&scratch, &names);
    let said = scratch.rebasefs(&format!("rebase --output json -b new {}", names.join(" ")));
    assert!(before == seen(&scratch, &names), "guest bytes changed");
    all_stand_on(&scratch, &names, "new");
    let mut copied: Vec<(String, u64)> = said
        .lines()
        .map(|line| {
            let object: serde_json::Value = serde_json::from_str(line).unwrap();
            (object["filename"].as_str().unwrap().to_owned(), object["copied"].as_u64().unwrap() / 65536)
        })
        .collect();
    copied.sort();
    let expected = [("a/x", 1), ("a/y", 1), ("b/x", 1), ("b/y", 1), ("c/x", 1)];
    assert_eq!(copied, expected.map(|(name, clusters)| (name.to_owned(), clusters)));
}

#[test]
fn a_thousand_open_files_are_not_needed() {
    let scratch = siblings("11 11 11", "11 22 11", 200);
    let all: Vec<String> = (0..200).map(|number| format!("o{number}")).collect();
    let before = scratch.guest_bytes("qcow2", "o0");
    let line = format!("--nofile=48:48 {} rebase --jobs 16 -b new -F raw {}", rebasefs(), all.join(" "));
    scratch.ok("prlimit", &line);
    for name in ["o0", "o1", "o99", "o199"] {
        assert!(before == scratch.guest_bytes("qcow2", name), "guest bytes of {name} changed");
        all_stand_on(&scratch, &[name], "new");
    }
}

#[test]
fn what_one_overlay_can_be_asked_for_many_can_be_asked_for() {
    let scratch = siblings("11 11 33 11", "11 22 44 55", 3);
    let names = ["o0", "o1", "o2"];
    names.iter().for_each(|name| scratch.draw(name, CLUSTER, "11 -- 44 --"));
    let (before, files) = (seen(&scratch, &names), bytes_of(&scratch, &names));
    // Nothing is written.
    let said = scratch.rebasefs("rebase --dry-run --output json -b new o0 o1 o2");
    assert_eq!(said.matches(r#"{"start":65536,"length":65536,"zero":false}"#).count(), 3, "{said}");
    assert!(files == bytes_of(&scratch, &names));
    let said = scratch.rebasefs("rebase --verify --reclaim -b new o0 o1 o2");
    assert_eq!(said.matches("128 KiB reclaimed").count(), 3, "{said}");
    assert!(before == seen(&scratch, &names), "guest bytes changed");
    all_stand_on(&scratch, &names, "new");
    std::fs::rename(scratch.path("new"), scratch.path("moved")).unwrap();
    scratch.rebasefs("rebase -u -b moved -F raw o0 o1 o2");
    all_stand_on(&scratch, &names, "moved");
    assert!(before == seen(&scratch, &names), "guest bytes changed");
    // Flattened: no backing file any more.
    let ended = scratch.run_args(rebasefs(), &["rebase", "-q", "-b", "", "o0", "o1", "o2"]);
    assert_eq!((ended.code, &*ended.stdout, &*ended.stderr), (Some(0), "", ""));
    std::fs::remove_file(scratch.path("moved")).unwrap();
    assert!(before == seen(&scratch, &names), "guest bytes changed");
}

#[test]
fn overlays_are_listed_in_a_file_or_on_the_standard_input() {
    let scratch = siblings("11 11", "11 22", 3);
    std::fs::rename(scratch.path("o1"), scratch.path("with space")).unwrap();
    std::fs::rename(scratch.path("o2"), scratch.path("with\nnewline")).unwrap();
    scratch.write("list", b"o0\n\nwith space\n");
    scratch.rebasefs("rebase -b new --from-file list");
    all_stand_on(&scratch, &["o0"], "new");
    for (list, options) in [(&b"with\nnewline\0with space\0"[..], "-0"), (b"with\nnewline\0", "--null")] {
        let mut child = std::process::Command::new(rebasefs())
            .args(["rebase", "-b", "old", "--from-file", "-", options])
            .current_dir(scratch.path(""))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), list).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).matches(": rebased: ").count(),
            list.split(|byte| *byte == 0).count() - 1
        );
    }
}
