//! Another process writes to the image, or turns a name, between the moment when it was opened and the moment
//! when it is written to: nothing that was known before is believed.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use rebasefs::chain::Opener;
use rebasefs::file::Access;
use rebasefs::layer::{Format, Reference};
use rebasefs::{Chain, Progress, Rebase};

use crate::control::old_and_new;
use crate::mounted::{Mounted, wait_until};
use crate::scratch::Scratch;
use crate::traced::{At, let_go_on};

const CLUSTER: usize = 65536;

/// ```text
/// x.img:    11 11 11 11
/// y.img:    22 11 11 11
/// z.img:    33 11 11 11
/// ov.qcow2: 22 -- -- --   on x.img
/// ```
fn three_bases() -> Scratch {
    let s = Scratch::new();
    for (name, first) in [("x.img", "11"), ("y.img", "22"), ("z.img", "33")] {
        s.draw_raw(name, CLUSTER, &format!("{first} 11 11 11"));
    }
    s.qemu_img("create -q -f qcow2 -b x.img -F raw ov.qcow2");
    s.draw("ov.qcow2", CLUSTER, "22 -- -- --");
    s
}

/// What a guest must see of it: also by QEMU, which opens it anew.
fn shows_22_11(s: &Scratch) {
    s.check_clean("ov.qcow2");
    let bytes = s.guest_bytes("qcow2", "ov.qcow2");
    assert_eq!(bytes.len(), 4 * CLUSTER);
    assert!(bytes[..CLUSTER].iter().all(|&byte| byte == 0x22), "{:#x}", bytes[0]);
    assert!(bytes[CLUSTER..].iter().all(|&byte| byte == 0x11));
}

fn backing_of(s: &Scratch, image: &str) -> String {
    let info = s.qemu_img(&format!("info -U --output=json {image}"));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["backing-filename"].as_str().unwrap_or_default().to_owned()
}

/// Another process rebases it and frees what it held for nothing: cluster 0 is y.img's now.
const REBASED_BY_ANOTHER: &str = "rebase -q --reclaim -b y.img -F raw ov.qcow2";

#[test]
fn a_mount_does_not_rebase_what_another_process_has_rebased() {
    let s = three_bases();
    let mounted = Mounted::with(&s, "ov.qcow2", "-U");
    s.rebasefs(REBASED_BY_ANOTHER);
    let image = std::fs::read(s.path("ov.qcow2")).unwrap();
    for line in ["-b z.img", "--reclaim -b z.img", "--dry-run -b z.img", "-b ''"] {
        let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        let said = mounted.status("error");
        assert!(said.contains("names 'y.img' (raw) as its backing file now, and named 'x.img'"), "{said}");
        assert!(said.ends_with(" (open it anew, and mount it again if it is mounted)"), "{said}");
    }
    assert_eq!(mounted.rebase("z.img").unwrap_err().kind(), ErrorKind::ResourceBusy);
    assert!(std::fs::read(s.path("ov.qcow2")).unwrap() == image);
    shows_22_11(&s);
    mounted.unmount();
    // Opened anew, it is what it is.
    let mounted = Mounted::new(&s, "ov.qcow2");
    mounted.rebase("z.img").unwrap();
    shows_22_11(&s);
}

/// The second waits between opening the image and its lock for as long as the first takes.
#[test]
fn of_two_rebases_with_force_share_the_second_finds_out_that_there_was_a_first() {
    let s = three_bases();
    let opener = Opener::new().force_share();
    let open = || opener.chain(&s.path("ov.qcow2"), None, Access::ReadWrite).unwrap();
    let onto_z = |chain: Chain| {
        let rebase =
            Rebase::of_chain(chain).opener(opener.clone()).onto(Reference::new("z.img", Format::Raw));
        rebase.run(&Progress::default()).map(drop)
    };
    let second = open();
    s.rebasefs(&format!("{REBASED_BY_ANOTHER} -U"));
    let error = onto_z(second).unwrap_err();
    assert!(error.kind() == rebasefs::ErrorKind::Busy && error.to_string().contains("'y.img'"), "{error}");
    assert_eq!(backing_of(&s, "ov.qcow2"), "y.img");
    shows_22_11(&s);
    onto_z(open()).unwrap();
    assert_eq!(backing_of(&s, "ov.qcow2"), "z.img");
    shows_22_11(&s);
    // A name alone asks for nothing that could have changed.
    let second = open();
    s.rebasefs("rebase -q -b x.img -F raw ov.qcow2");
    let rebase = Rebase::of_chain(second).opener(opener.clone());
    drop(rebase.record_only(Reference::new("y.img", Format::Raw)).run().unwrap());
    assert_eq!(backing_of(&s, "ov.qcow2"), "y.img");
    shows_22_11(&s);
}

/// What others may do to an image that is mounted with `-U`.
const DEEDS: [&[&str]; 3] = [
    &["qemu-img", "resize", "-q", "-f", "qcow2", "cow.qcow2", "1M"],
    &["qemu-img", "snapshot", "-c", "one", "cow.qcow2"],
    &[
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "write -q -P 0xaa 0 128k",
        "-c",
        "write -q -P 0xbb 448k 64k",
        "cow.qcow2",
    ],
];

#[test]
fn a_rebase_takes_the_image_as_others_have_left_it() {
    for deed in DEEDS {
        let s = old_and_new();
        let mounted = Mounted::with(&s, "cow.qcow2", "-U");
        // The kernel keeps what it has read.
        let _ = mounted.bytes();
        assert_eq!(s.run_args(deed[0], &deed[1..]).code, Some(0), "{deed:?}");
        let before = s.guest_bytes("qcow2", "cow.qcow2");
        mounted.rebase("new.raw").unwrap();
        assert_eq!(backing_of(&s, "cow.qcow2"), "new.raw");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == before, "{deed:?}");
        assert!(mounted.bytes() == before, "{deed:?}: the mount shows other bytes");
        mounted.unmount();
        s.check_clean("cow.qcow2");
    }
}

/// ```text
/// low.img ◁ middle.qcow2 ◁ ov.qcow2; another process moves middle.qcow2 and frees a cluster of it
/// ```
#[test]
fn tables_of_a_backing_file_are_read_again_where_no_lock_keeps_them() {
    let s = three_bases();
    s.qemu_img("create -q -f qcow2 -b x.img -F raw middle.qcow2");
    s.draw("middle.qcow2", CLUSTER, "22 -- -- 44");
    s.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 ov.qcow2");
    let before = s.guest_bytes("qcow2", "ov.qcow2");
    let mounted = Mounted::with(&s, "ov.qcow2", "-U");
    assert!(mounted.bytes() == before);
    // What is freed is written over with what the other has to copy.
    s.qemu_io("qcow2", "middle.qcow2", &["discard -q 0 64k", "write -q -P 0x55 64k 64k"]);
    let before = s.guest_bytes("qcow2", "ov.qcow2");
    mounted.rebase("z.img").unwrap();
    assert!(s.guest_bytes("qcow2", "ov.qcow2") == before);
    assert!(mounted.bytes() == before);
    s.rebasefs("rebase -q -b y.img -F raw middle.qcow2");
    mounted.rebase("middle.qcow2").unwrap();
    assert!(s.guest_bytes("qcow2", "ov.qcow2") == before);
    // What it stands on is another chain now.
    s.rebasefs("rebase -q -b x.img -F raw middle.qcow2");
    let error = mounted.rebase("z.img").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceBusy);
    assert!(mounted.status("error").contains("middle.qcow2: another process"), "{}", mounted.says("status"));
    mounted.unmount();
    s.check_clean("ov.qcow2");
    assert!(s.guest_bytes("qcow2", "ov.qcow2") == before);
}

fn turn(s: &Scratch, link: &str, to: &str) {
    symlink(to, s.path("turned")).unwrap();
    std::fs::rename(s.path("turned"), s.path(link)).unwrap();
}

/// ```text
/// current → r1: x.img 11 11, y.img 11 22, ov.qcow2 on x.img
///           r2: x.img 11 11, y.img 33 33
/// ```
fn releases() -> Scratch {
    let s = Scratch::new();
    for (release, new) in [("r1", "11 22"), ("r2", "33 33")] {
        s.ok("mkdir", release);
        s.draw_raw(&format!("{release}/x.img"), CLUSTER, "11 11");
        s.draw_raw(&format!("{release}/y.img"), CLUSTER, new);
    }
    s.qemu_img("create -q -f qcow2 -b x.img -F raw r1/ov.qcow2");
    turn(&s, "current", "r1");
    s
}

fn mount_current(s: &Scratch) -> Mounted {
    s.ok("mkdir", "mnt");
    s.rebasefs(&format!("mount current/ov.qcow2 {}", s.path("mnt").display()));
    Mounted::found(s.path("mnt"))
}

#[test]
fn names_are_looked_for_where_the_image_is_and_recorded_only_if_its_path_leads_there() {
    let s = releases();
    let before = s.guest_bytes("qcow2", "r1/ov.qcow2");
    let mounted = mount_current(&s);
    turn(&s, "current", "r2");
    // What lies beside the image is not what its path leads to: nothing is compared with either.
    for (file, line) in [("rebase", "--dry-run -b y.img"), ("difference", "y.img")] {
        let error = std::fs::write(mounted.path("ctl").join(file), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        assert!(mounted.status("error").contains("y.img (replaced by"), "{}", mounted.says("status"));
    }
    // What is written would not be what the path of the image leads to.
    for line in ["-b y.img", "-b ''", "-u -F raw -b y.img", "-u -b ''"] {
        let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        let said = mounted.status("error");
        let hint = "(nobody may move the files of a chain meanwhile; when nobody does, start it again)";
        assert!(said.contains("ov.qcow2: its path") && said.ends_with(hint), "{said}");
        assert_eq!(backing_of(&s, "r1/ov.qcow2"), "x.img");
    }
    turn(&s, "current", "r1");
    mounted.rebase("y.img").unwrap();
    assert_eq!(backing_of(&s, "r1/ov.qcow2"), "y.img");
    assert!(mounted.bytes() == before && s.guest_bytes("qcow2", "r1/ov.qcow2") == before);
    mounted.unmount();
    s.check_clean("r1/ov.qcow2");
}

/// The image is in both directories: its path is right, but what is beside it by that path is not.
#[test]
fn a_name_that_leads_elsewhere_by_the_path_of_the_image_is_not_recorded() {
    let s = releases();
    s.ok("ln", "r1/ov.qcow2 r2/ov.qcow2");
    let image = std::fs::read(s.path("r1/ov.qcow2")).unwrap();
    let mounted = mount_current(&s);
    turn(&s, "current", "r2");
    for line in ["-b y.img", "-u -F raw -b y.img"] {
        let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        assert!(mounted.status("error").contains("y.img"), "{}", mounted.says("status"));
        assert_eq!(backing_of(&s, "r1/ov.qcow2"), "x.img");
    }
    assert!(s.guest_bytes("qcow2", "r1/ov.qcow2") == vec![0x11; 2 * CLUSTER]);
    // An absolute name leads where it leads.
    mounted.rebase(s.path("r1/y.img").to_str().unwrap()).unwrap();
    assert!(s.guest_bytes("qcow2", "r2/ov.qcow2") == vec![0x11; 2 * CLUSTER]);
    assert!(std::fs::read(s.path("r1/ov.qcow2")).unwrap() != image);
    mounted.unmount();
    s.check_clean("r1/ov.qcow2");
}

/// Puts a copy of the image in its place.
fn replace(s: &Scratch, image: &str) {
    s.ok("cp", &format!("{image} c2"));
    s.ok("mv", &format!("c2 {image}"));
}

#[test]
fn an_image_in_whose_place_another_file_is_keeps_its_backing_file() {
    let s = old_and_new();
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let mounted = Mounted::new(&s, "cow.qcow2");
    replace(&s, "cow.qcow2");
    let there = std::fs::read(s.path("cow.qcow2")).unwrap();
    for line in ["-b new.raw", "-b ''", "-u -F raw -b new.raw"] {
        let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        assert!(mounted.status("error").contains("another file"), "{}", mounted.says("status"));
        assert_eq!(mounted.says("backing"), "base.raw\n");
    }
    std::fs::remove_file(s.path("cow.qcow2")).unwrap();
    assert_eq!(mounted.rebase("new.raw").unwrap_err().kind(), ErrorKind::ResourceBusy);
    assert!(mounted.bytes() == before);
    mounted.unmount();
    s.write("cow.qcow2", &there);
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
}

#[test]
fn an_image_in_whose_data_file_s_place_another_file_is_keeps_its_backing_file() {
    let s = old_and_new();
    s.qemu_img("create -q -f qcow2 -o data_file=data.raw -b base.raw -F raw cow.qcow2");
    let mounted = Mounted::new(&s, "cow.qcow2");
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    s.ok("cp", "--sparse=always data.raw moved.raw");
    s.ok("mv", "moved.raw data.raw");
    for line in ["-b new.raw", "-b ''", "-u -F raw -b new.raw"] {
        let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{line}");
        assert!(mounted.status("error").contains("data.raw: its path leads"), "{}", mounted.says("status"));
    }
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image);
}

/// Runs a rebase, to which this happens when it has begun to write; it must fail, and say this.
fn fails_if_meanwhile(s: &Scratch, line: &str, deed: impl FnOnce(), words: &str) {
    let size = |path: &Path| path.metadata().unwrap().len();
    let image = s.path("held.qcow2");
    std::fs::hard_link(s.path("cow.qcow2"), &image).unwrap();
    let before = size(&image);
    let at = At { system_call: "pwrite64", number: 1, signal: "STOP" };
    let mut rebase: Command = at.command(&s.path(""), line);
    let mut rebase = rebase.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("something is written", || size(&image) != before);
    deed();
    let code = let_go_on(rebase.id(), &mut rebase).code();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut rebase.stderr.take().unwrap(), &mut said).unwrap();
    assert!(code == Some(1) && said.contains(words), "{line}: {code:?} {said}");
    assert_eq!(backing_of(s, "held.qcow2"), "base.raw");
    s.check_clean("held.qcow2");
}

#[test]
fn a_rebase_during_which_names_are_turned_swaps_nothing() {
    let s = old_and_new();
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let rebase = "rebase -b new.raw -F raw cow.qcow2";
    fails_if_meanwhile(&s, rebase, || replace(&s, "cow.qcow2"), "its path leads to another file");
    assert!(s.guest_bytes("qcow2", "held.qcow2") == before);

    let s = old_and_new();
    s.ok("cp", "new.raw other.raw");
    turn(&s, "link.raw", "new.raw");
    let rebase = "rebase -b link.raw -F raw cow.qcow2";
    fails_if_meanwhile(&s, rebase, || turn(&s, "link.raw", "other.raw"), "replaced by another file");
    assert!(s.guest_bytes("qcow2", "held.qcow2") == before);
}
