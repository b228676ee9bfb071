//! What goes wrong with `qemu-img rebase` and must not with ours, and what QEMU does beside it
//! where that is cheap to show. The numbers are those of the list that the project keeps of them;
//! the traps that are not here have their tests where their subject is.

use std::os::unix::fs::symlink;

use super::{CLUSTER, backing_of, held, rebase_keeps_everything, three};
use crate::mounted::Mounted;
use crate::scratch::{Ended, Scratch, rebasefs};

fn read(scratch: &Scratch, name: &str) -> Vec<u8> {
    std::fs::read(scratch.path(name)).unwrap()
}

fn size(scratch: &Scratch, name: &str) -> u64 {
    std::fs::metadata(scratch.path(name)).unwrap().len()
}

/// Runs rebasefs, which succeeds; what it says on standard error.
fn warned(scratch: &Scratch, line: &str) -> String {
    let Ended { code, stderr, .. } = scratch.run(rebasefs(), line);
    assert_eq!(code, Some(0), "{line}: {stderr}");
    stderr
}

#[test]
fn trap_5_zeros_over_data_cost_no_data() {
    let zeros = vec!["--"; 128].join(" ");
    let scratch = three("compat=1.1", &zeros, &vec!["22"; 128].join(" "), "");
    std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
    let before = size(&scratch, "cow.qcow2");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    let grown = size(&scratch, "cow.qcow2") - before;
    assert!(grown <= 2 * CLUSTER as u64, "{grown} bytes for 8 MiB of zeros");
    assert_eq!(held(&scratch, "cow.qcow2"), "z".repeat(128));
    scratch.qemu_img("rebase -b new -F raw qemu.qcow2");
    assert!(size(&scratch, "qemu.qcow2") - before >= 8 << 20);
}

/// QEMU 10 takes about a minute a TiB of holes. Counted are system calls, not seconds.
#[test]
fn trap_6_a_disk_of_sixteen_tebibytes_of_holes_costs_as_much_as_its_data() {
    let scratch = Scratch::new();
    scratch.qemu_img("create -q -f qcow2 old 16T");
    scratch.qemu_img("create -q -f qcow2 new 16T");
    scratch.qemu_io("qcow2", "old", &["write -q -P 0x11 1G 128k", "write -q -P 0x12 9T 64k"]);
    scratch.qemu_io("qcow2", "new", &["write -q -P 0x11 1G 128k", "write -q -P 0x22 15T 64k"]);
    scratch.qemu_img("create -q -f qcow2 -b old -F qcow2 cow.qcow2");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x33 3T 64k"]);
    let program = rebasefs();
    let line = format!(
        "-f -qq -o calls -e trace=pread64,lseek {program} rebase --output=json -b new -F qcow2 cow.qcow2"
    );
    let figures: serde_json::Value = serde_json::from_str(&scratch.ok("strace", &line)).unwrap();
    assert_eq!(figures["missing"], (16u64 << 40) - CLUSTER as u64);
    assert_eq!(figures["compared"], 4 * CLUSTER);
    assert_eq!((&figures["copied"], &figures["zeroed"]), (&CLUSTER.into(), &CLUSTER.into()));
    let calls = String::from_utf8(read(&scratch, "calls")).unwrap().lines().count();
    assert!(calls < 500, "{calls} reads and seeks for 320 KiB of data");
    let read = |at: &str, byte: &str| {
        scratch.qemu_io("qcow2", "cow.qcow2", &[&format!("read -q -P {byte} {at} 64k")]);
    };
    [("1G", "0x11"), ("3T", "0x33"), ("9T", "0x12"), ("15T", "0")]
        .iter()
        .for_each(|(at, byte)| read(at, byte));
    scratch.check_clean("cow.qcow2");
}

/// Reads are slowed down, so that there is something to show; each takes a while at least.
#[test]
fn trap_8_progress_grows_steadily_over_what_is_to_be_looked_at_and_ends_at_100() {
    // Of 64 MiB, the overlay holds the first 56: QEMU 10 shows nothing of that but a jump at its end.
    let scratch = Scratch::new();
    for (name, byte) in [("old", "0x11"), ("new", "0x22")] {
        scratch.qemu_img(&format!("create -q -f raw {name} 64M"));
        scratch.qemu_io("raw", name, &[&format!("write -q -P {byte} 0 64M")]);
    }
    scratch.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    scratch.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x33 0 56M"]);
    let program = rebasefs();
    let inject = "-e trace=pread64 -e inject=pread64:delay_enter=20000";
    let line = format!("-f -qq -o /dev/null {inject} {program} rebase -p -b new -F raw cow.qcow2");
    let said = scratch.ok("strace", &line);
    let shown: Vec<f64> =
        said.split("/100%)").filter_map(|part| part.rsplit('(').next()?.parse().ok()).collect();
    assert!(shown.is_sorted(), "{shown:?}");
    assert_eq!(shown.last(), Some(&100.0), "{said}");
    let between = shown.iter().filter(|percent| **percent > 0.0 && **percent < 100.0).count();
    assert!(between >= 3, "{shown:?}");
    scratch.check_clean("cow.qcow2");
}

#[test]
fn trap_10_a_qcow2_file_called_raw_is_warned_of_in_unsafe_mode_and_harmless_in_safe_mode() {
    let scratch = three("compat=1.1", "11 11", "22 22", "-- --");
    scratch.qemu_img("convert -O qcow2 old base.qcow2");
    rebase_keeps_everything(&scratch, "-b base.qcow2 -F raw", &["old", "base.qcow2"]);
    scratch.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    let said = warned(&scratch, "-v rebase -u -b base.qcow2 -F raw cow.qcow2");
    assert!(said.contains("base.qcow2: looks like a disk image, but is taken for raw as asked"), "{said}");
    assert!(said.contains("is that the same disk?"), "{said}");
    // QEMU does the same without a word, and this is what the guest gets.
    assert!(scratch.guest_bytes("qcow2", "cow.qcow2").starts_with(b"QFI\xfb"));
}

/// Somebody has downloaded the wrong thing, or half of it; or a guest wrote a header into its raw disk.
#[test]
fn a_format_is_not_guessed_where_name_and_content_disagree() {
    let scratch = three("compat=1.1", "11 11", "22 11", "-- --");
    scratch.ok("cp", "new named.qcow2");
    scratch.ok("cp", "new flat.VMDK");
    scratch.write("empty.qcow2", b"");
    scratch.qemu_img("convert -f raw -O qcow2 new named.raw");
    scratch.qemu_img("convert -f raw -O qcow2 new named.vdi");
    scratch.ok("mkdir", "mnt");
    let before = read(&scratch, "cow.qcow2");
    for (name, words) in [
        ("named.qcow2", "by its name it is qcow2, but by its content raw"),
        ("flat.VMDK", "by its name it is vmdk, but by its content raw"),
        ("empty.qcow2", "by its name it is qcow2, but by its content raw"),
        ("named.raw", "by its name it is raw, but by its content qcow2"),
        ("named.vdi", "by its name it is vdi, but by its content qcow2"),
    ] {
        for line in [
            format!("rebase -b {name} cow.qcow2"),
            format!("rebase -u -b {name} cow.qcow2"),
            format!("rebase --dry-run -b {name} cow.qcow2"),
            format!("rebase -b ./{name} cow.qcow2 cow.qcow2.other"),
            format!("create -f qcow2 -b {name} made.qcow2"),
            format!("mount {name} mnt"),
        ] {
            let said = scratch.rebasefs_fails(1, &line);
            assert!(said.contains(&format!("{name}: {words}")), "{line}: {said}");
        }
        // Those who only look show what QEMU shows.
        for line in
            [format!("info -U {name}"), format!("map --output=json {name}"), format!("compare {name} new")]
        {
            let (ours, theirs) = (scratch.run(rebasefs(), &line), scratch.run("qemu-img", &line));
            assert_eq!((ours.code, ours.stdout), (theirs.code, theirs.stdout), "{line}");
        }
    }
    assert!(before == read(&scratch, "cow.qcow2") && !scratch.path("made.qcow2").exists());
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let error = mounted.rebase("named.qcow2").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::Unsupported, "{error}");
    std::fs::write(mounted.path("ctl/rebase"), "-F raw -b named.qcow2\n").unwrap();
    mounted.unmount();
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("named.qcow2".into()), Some("raw".into())));
    rebase_keeps_everything(&scratch, "-F qcow2 -b named.raw", &["named.qcow2", "named.raw"]);
    scratch.rebasefs("create -q -f qcow2 -b named.qcow2 -F raw made.qcow2");
    scratch.rebasefs("create -q -f qcow2 -b named.vdi -F qcow2 made.qcow2");
}

#[test]
fn trap_11_the_name_alone_is_recorded_whatever_it_leads_to_as_qemu_does() {
    let scratch = three("compat=1.1", "11", "22", "--");
    scratch.write("no-image.qcow2", b"none");
    scratch.ok("mkdir", "directory");
    let fresh = read(&scratch, "cow.qcow2");
    for (name, format) in [
        ("missing.img", "raw"),
        ("no/such/place.img", "qcow2"),
        ("/no/such/base.img", "raw"),
        ("./a:b", "raw"),
        ("nbd://host/export", "raw"),
        ("no-image.qcow2", "qcow2"),
        ("directory", "raw"),
        ("disk.vmdk", "vmdk"),
        ("/vm/disk.vhd", "vpc"),
        ("new", "raw"),
    ] {
        let line = format!("rebase -u -b {name} -F {format} cow.qcow2");
        let recorded = |program: &str| {
            scratch.write("cow.qcow2", &fresh);
            let Ended { code, stdout, stderr } = scratch.run(program, &line);
            // Nobody is told: the standard error is no terminal.
            assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "", ""), "{program} {line}");
            stored_backing(&read(&scratch, "cow.qcow2"))
        };
        let expected = (name.as_bytes().to_vec(), Some(format.as_bytes().to_vec()));
        assert_eq!((recorded(rebasefs()), recorded("qemu-img")), (expected.clone(), expected), "{line}");
        scratch.write("cow.qcow2", &fresh);
        let said = warned(&scratch, &format!("-v {line}"));
        assert_eq!(said.contains("nothing could be verified"), name != "new", "{line}: {said}");
    }
    // Without a format both refuse; and what is read must be there.
    scratch.write("cow.qcow2", &fresh);
    for name in ["missing.img", "/no/such/missing.img"] {
        let line = format!("rebase -u -b {name} cow.qcow2");
        assert!(scratch.rebasefs_fails(1, &line).contains("give it with `-F FORMAT`"));
        assert_eq!(scratch.run("qemu-img", &line).code, Some(1));
    }
    let said = scratch.rebasefs_fails(1, "rebase -b new -F vmdk cow.qcow2");
    assert!(said.contains("format 'vmdk' is not supported"), "{said}");
    for program in [rebasefs(), "qemu-img"] {
        assert_eq!(scratch.run(program, "rebase -u -b new -F floppy cow.qcow2").code, Some(1));
    }
    let said = scratch.rebasefs_fails(1, "rebase -b missing.img -F raw cow.qcow2");
    assert!(said.contains("No such file or directory"), "{said}");
    assert!(fresh == read(&scratch, "cow.qcow2"));
}

/// The name of the backing file and its format, as the header of an image stores them.
fn stored_backing(image: &[u8]) -> (Vec<u8>, Option<Vec<u8>>) {
    let number = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    // No name lies beyond the first 4 GiB.
    let (name, mut at) = (number(12), number(100));
    while number(at) != 0 && number(at) != 0xe279_2aca {
        at += 8 + number(at + 4).next_multiple_of(8);
    }
    let format = (number(at) != 0).then(|| image[at + 8..at + 8 + number(at + 4)].to_vec());
    (image[name..name + number(16)].to_vec(), format)
}

#[test]
fn a_name_that_is_recorded_makes_no_loop() {
    let scratch = three("compat=1.1", "11", "22", "--");
    scratch.qemu_img("create -q -f qcow2 -b cow.qcow2 -F qcow2 middle.qcow2");
    scratch.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 above.qcow2");
    let before = read(&scratch, "cow.qcow2");
    for more in ["", "-U "] {
        let line = format!("rebase {more}-u -b above.qcow2 -F qcow2 cow.qcow2");
        assert!(scratch.rebasefs_fails(1, &line).contains("is the overlay itself"));
    }
    // The name alone is asked for: of many, also of those that stand on each other.
    scratch.rebasefs("rebase -u -b gone -F raw cow.qcow2 middle.qcow2");
    for image in ["cow.qcow2", "middle.qcow2"] {
        assert_eq!(backing_of(&scratch, image), (Some("gone".into()), Some("raw".into())));
    }
    assert!(before != read(&scratch, "cow.qcow2"));
}

#[test]
fn trap_12_a_rebase_looks_beside_the_link_and_takes_a_colon_for_a_protocol() {
    let scratch = Scratch::new();
    for directory in ["real", "link"] {
        std::fs::create_dir(scratch.path(directory)).unwrap();
    }
    scratch.draw_raw("real/old", CLUSTER, "11 11");
    scratch.draw_raw("link/new", CLUSTER, "22 11");
    scratch.draw_raw("link/b:1.raw", CLUSTER, "11 33");
    scratch.qemu_img("create -q -f qcow2 -b old -F raw real/cow.qcow2");
    symlink("../real/cow.qcow2", scratch.path("link/cow.qcow2")).unwrap();
    symlink("../real/old", scratch.path("link/old")).unwrap();
    let before = scratch.guest_bytes("qcow2", "real/cow.qcow2");
    scratch.rebasefs_fails(1, "rebase -b new -F raw real/cow.qcow2");
    scratch.rebasefs("rebase -b new -F raw link/cow.qcow2");
    assert!(before == scratch.guest_bytes("qcow2", "link/cow.qcow2"));
    let said = scratch.rebasefs_fails(1, "rebase -b b:1.raw -F raw link/cow.qcow2");
    assert!(said.contains("protocol 'b' is not supported") && said.contains("`./NAME`"), "{said}");
    scratch.rebasefs("rebase -b ./b:1.raw -F raw link/cow.qcow2");
    assert!(before == scratch.guest_bytes("qcow2", "link/cow.qcow2"));
}

/// ```text
/// secret ◁ the header that a guest wrote into its raw disk `old` ◁ cow.qcow2 (names no format)
/// ```
#[test]
fn trap_13_a_header_written_by_a_guest_opens_no_file_of_the_host() {
    let scratch = three("compat=1.1", "11", "22 22 22 22", "--");
    scratch.draw_raw("secret", CLUSTER, "55 55 55 55");
    scratch.qemu_img("create -q -f qcow2 -b secret -F raw old 256k");
    scratch.qemu_img("create -q -u -f qcow2 -b old -F raw cow.qcow2 256k");
    // No format: the extension's type becomes one that nobody knows.
    let image = read(&scratch, "cow.qcow2");
    let at = image.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    scratch.poke("cow.qcow2", at as u64, b"none");
    let before = read(&scratch, "cow.qcow2");
    // QEMU copies the secret into the disk, where the guest can read it.
    std::fs::copy(scratch.path("cow.qcow2"), scratch.path("qemu.qcow2")).unwrap();
    scratch.qemu_img("rebase -b new -F raw qemu.qcow2");
    assert!(scratch.guest_bytes("qcow2", "qemu.qcow2").starts_with(&[0x55; 512]));
    let said = scratch.rebasefs_fails(1, "rebase -b new -F raw cow.qcow2");
    assert!(said.contains("'secret'") && said.contains("a guest could have written there"), "{said}");
    assert!(before == read(&scratch, "cow.qcow2"));
}

#[test]
fn trap_15_every_unit_is_compared_formats_count_and_errors_name_the_file_at_fault() {
    // Differences behind the first one, in one piece.
    let scratch = three("cluster_size=64k", "11 11 11 11 11 11", "22 11 33 11 11 44", "-- -- -- -- -- --");
    rebase_keeps_everything(&scratch, "-b new -F raw", &["old", "new"]);
    assert_eq!(held(&scratch, "cow.qcow2"), "d-d--d");
    // The new backing file is what cannot be opened; or a file below it.
    scratch.qemu_img("create -q -u -f qcow2 -b gone -F raw orphan.qcow2 1M");
    for (name, at_fault) in [("missing", "missing: "), ("orphan.qcow2", "gone: ")] {
        let said = scratch.rebasefs_fails(1, &format!("rebase -b {name} cow.qcow2"));
        assert!(said.contains(&format!("'{name}'")) && said.contains(at_fault), "{said}");
        assert!(!said.contains("old"), "{said}");
    }
    // Formats are taken as they are given.
    let said = scratch.rebasefs_fails(1, "rebase -f raw -b old -F raw cow.qcow2");
    assert!(said.contains("only qcow2 can be rebased"), "{said}");
    let said = scratch.rebasefs_fails(1, "rebase -b old -F qcow2 cow.qcow2");
    assert!(said.contains("old: ") && said.contains("qcow2"), "{said}");
}

#[test]
fn trap_15_a_write_that_fails_fails_the_rebase() {
    let scratch = three("compat=1.1", "11 11 11 11", "22 22 22 22", "-- -- -- --");
    let before = scratch.guest_bytes("qcow2", "cow.qcow2");
    let blocks = size(&scratch, "cow.qcow2") / 1024 + 100;
    let line = format!("ulimit -f {blocks}; exec {} rebase -b new -F raw cow.qcow2", rebasefs());
    let Ended { code, stderr, .. } = scratch.run_args("bash", &["-c", &line]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("cow.qcow2: cannot write at offset"), "{stderr}");
    assert_eq!(backing_of(&scratch, "cow.qcow2").0, Some("old".into()));
    assert!(before == scratch.guest_bytes("qcow2", "cow.qcow2"));
}

#[test]
fn trap_19_a_format_that_cannot_be_recorded_is_refused_before_anything_is_copied() {
    let scratch = three("compat=1.1", "11 11", "22 22", "-- --");
    scratch.qemu_img("convert -O vmdk new new.vmdk");
    let before = read(&scratch, "cow.qcow2");
    let said = scratch.rebasefs_fails(1, "rebase -b new.vmdk cow.qcow2");
    assert!(said.contains("new.vmdk: looks like format vmdk"), "{said}");
    assert!(before == read(&scratch, "cow.qcow2"));
    // QEMU copies first, and then finds that the format is missing.
    let ended = scratch.run("qemu-img", "rebase -b new cow.qcow2");
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(size(&scratch, "cow.qcow2") > before.len() as u64);
}

#[test]
fn trap_20_without_a_name_no_backing_file_is_removed() {
    let scratch = three("compat=1.1", "11", "22", "--");
    for arguments in ["-u", ""] {
        let said = scratch.rebasefs_fails(1, &format!("rebase {arguments} cow.qcow2"));
        assert!(said.contains("no backing file given"), "{said}");
    }
    assert_eq!(backing_of(&scratch, "cow.qcow2").0, Some("old".into()));
    scratch.qemu_img("rebase -u cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2").0, None);
}

#[test]
fn an_unsafe_rebase_warns_of_a_disk_of_another_size() {
    let scratch = three("compat=1.1", "11 11 11", "22 22 22", "-- -- --");
    scratch.draw_raw("short", CLUSTER, "11 11");
    assert_eq!(warned(&scratch, "-v rebase -u -b new -F raw cow.qcow2"), "");
    let said = warned(&scratch, "-v rebase -u -b short -F raw cow.qcow2");
    assert!(said.contains("short: has 131072 bytes, but the old backing file"), "{said}");
    assert!(said.contains("new has 196608: is that the same disk?"), "{said}");
    // The old one is gone: it can be compared with the image only.
    scratch.rebasefs("rebase -u -b new -F raw cow.qcow2");
    std::fs::remove_file(scratch.path("new")).unwrap();
    let said = warned(&scratch, "-v rebase -u -b short -F raw cow.qcow2");
    assert!(said.contains("short: has 131072 bytes, fewer than the image with 196608"), "{said}");
}

#[test]
fn qemus_long_option_names_and_its_newer_short_one_are_understood() {
    let scratch = three("compat=1.1", "11 11", "22 11", "-- --");
    let long = "--format qcow2 --cache writeback --quiet --force-share --progress --backing new \
                --backing-format raw --backing-cache none --compress";
    rebase_keeps_everything(&scratch, long, &["old", "new"]);
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("new".into()), Some("raw".into())));
    rebase_keeps_everything(&scratch, "-b old -B raw", &["old", "new"]);
    scratch.rebasefs("rebase --backing-unsafe --backing new --backing-format=raw cow.qcow2");
    assert_eq!(backing_of(&scratch, "cow.qcow2"), (Some("new".into()), Some("raw".into())));
    scratch.rebasefs("create -f qcow2 -b old -B raw other.qcow2");
    assert_eq!(backing_of(&scratch, "other.qcow2"), (Some("old".into()), Some("raw".into())));
}
