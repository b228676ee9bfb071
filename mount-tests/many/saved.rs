//! A difference that is kept in a file: it saves the comparison, and is refused when a file is another
//! one than it was.

use std::fs::{File, FileTimes};

use super::{CLUSTER, all_stand_on, bytes_of, bytes_read, seen, siblings};
use crate::scratch::{LoopDevice, Scratch};

const SAVE: &str = "rebase -q -b new -F raw --save-difference saved o0";

#[test]
fn it_gives_the_same_result_and_spares_the_comparison() {
    let old = "11 ".repeat(128);
    let scratch = siblings(&old, &format!("22 {} --", "11 ".repeat(126)), 4);
    let overlays = ["o0", "o1", "o2", "o3"];
    let before = seen(&scratch, &overlays);
    scratch.rebasefs(SAVE);
    let line = "rebase -b new -F raw --difference saved o1 o2 o3";
    let read = bytes_read(&scratch, line, &["old", "new"]);
    assert!(before == seen(&scratch, &overlays), "guest bytes changed");
    all_stand_on(&scratch, &overlays, "new");
    // What differs, and samples of the files.
    assert!(read < 3 << 20, "{read} bytes of 16 MiB were read");
    // Whoever has moved already needs no difference.
    scratch.rebasefs(line);
    assert!(before == seen(&scratch, &overlays), "guest bytes changed");
}

#[test]
fn it_is_kept_for_every_pair_of_chains_and_while_nothing_is_written() {
    let scratch = siblings("11 11", "11 22", 2);
    scratch.draw_raw("other", CLUSTER, "33 22");
    scratch.qemu_img("create -f qcow2 -b other -F raw x");
    scratch.qemu_img("create -f qcow2 -b old -F raw middle");
    scratch.draw("middle", CLUSTER, "44 --");
    scratch.qemu_img("create -f qcow2 -b middle -F qcow2 y");
    let overlays = ["o0", "o1", "x", "y"];
    let (before, files) = (seen(&scratch, &overlays), bytes_of(&scratch, &overlays));
    scratch.rebasefs("rebase --dry-run -b new --save-difference saved o0 x y");
    assert!(files == bytes_of(&scratch, &overlays), "something was written");
    scratch.rebasefs("rebase -b new --difference saved y o1 x o0");
    assert!(before == seen(&scratch, &overlays), "guest bytes changed");
    all_stand_on(&scratch, &overlays, "new");
    // A pair that it does not know.
    scratch.qemu_img("create -f qcow2 -b middle -F qcow2 z");
    let said = scratch.rebasefs_fails(1, "rebase -b other --difference saved z");
    assert!(said.contains("saved: does not fit"), "{said}");
}

/// Changes a file after a difference was saved; then it is refused with these words.
fn is_refused(change: impl FnOnce(&Scratch), words: &[&str]) {
    let scratch = siblings("11 11 11", "11 22 11", 3);
    scratch.rebasefs(SAVE);
    change(&scratch);
    let before = bytes_of(&scratch, &["o1", "o2"]);
    let said = scratch.rebasefs_fails(1, "rebase -b new -F raw --difference saved o1 o2");
    for word in words {
        assert!(said.contains(word), "{said}");
    }
    assert!(before == bytes_of(&scratch, &["o1", "o2"]), "something was written: {said}");
}

/// Writes to a file as somebody who sets the clock back.
fn poke_secretly(scratch: &Scratch, name: &str, at: u64, bytes: &[u8]) {
    let modified = std::fs::metadata(scratch.path(name)).unwrap().modified().unwrap();
    scratch.poke(name, at, bytes);
    let file = File::options().write(true).open(scratch.path(name)).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();
}

#[test]
fn a_backing_file_that_is_another_one_by_now() {
    for name in ["old", "new"] {
        let touched = |scratch: &Scratch| scratch.poke(name, 0, &[0x11]);
        is_refused(touched, &["saved", &format!("/{name} has been written to since")]);
        let longer = |scratch: &Scratch| {
            let file = File::options().write(true).open(scratch.path(name)).unwrap();
            file.set_len(4 * CLUSTER as u64).unwrap();
        };
        is_refused(longer, &["saved", &format!("/{name} had 196608 bytes and has 262144 now")]);
        let copied = |scratch: &Scratch| {
            scratch.ok("cp", &format!("-p {name} copy"));
            scratch.ok("mv", &format!("copy {name}"));
        };
        is_refused(copied, &["saved", &format!("/{name} is another file")]);
        let secretly = |scratch: &Scratch| poke_secretly(scratch, name, 5, &[0x99]);
        is_refused(secretly, &["saved", &format!("/{name} has other content")]);
        // Somebody may have written between the samples, and set the time back.
        let touched = |scratch: &Scratch| drop(scratch.ok("chmod", &format!("600 {name}")));
        is_refused(
            touched,
            &["saved", &format!("/{name} was given another name or mode"), "another change time"],
        );
    }
}

#[test]
fn a_layer_further_down_that_is_another_one_by_now() {
    let scratch = siblings("11 11", "11 22", 0);
    scratch.qemu_img("create -f qcow2 -b new -F raw upper");
    scratch.qemu_img("create -f qcow2 -b old -F raw o0");
    std::fs::copy(scratch.path("o0"), scratch.path("o1")).unwrap();
    scratch.rebasefs("rebase -b upper -F qcow2 --save-difference saved o0");
    scratch.poke("new", 0, &[0x99]);
    let said = scratch.rebasefs_fails(1, "rebase -b upper -F qcow2 --difference saved o1");
    assert!(said.contains("/new has been written to since"), "{said}");
    // Another chain with the same top.
    scratch.qemu_img("rebase -u -b old -F raw upper");
    let said = scratch.rebasefs_fails(1, "rebase -b upper -F qcow2 --difference saved o1");
    assert!(said.contains("/upper"), "{said}");
}

#[test]
fn a_file_that_is_no_difference_or_not_the_one_that_was_saved() {
    is_refused(|scratch| std::fs::remove_file(scratch.path("saved")).unwrap(), &["saved", "No such file"]);
    is_refused(|scratch| scratch.write("saved", b""), &["saved: is not one"]);
    is_refused(|scratch| scratch.write("saved", &b"[".repeat(1 << 20)), &["saved: is not one"]);
    is_refused(|scratch| scratch.write("saved", &[0xff; 100]), &["saved: "]);
    is_refused(|scratch| scratch.cut("saved", 7), &["saved: is not one"]);
    is_refused(
        |scratch| {
            let text = std::fs::read_to_string(scratch.path("saved")).unwrap();
            // As if the second cluster did not differ.
            scratch.write("saved", text.replace("[65536,131072]", "[65536,65537]").as_bytes());
        },
        &["saved: was changed after it was saved"],
    );
    is_refused(
        |scratch| {
            let text = std::fs::read_to_string(scratch.path("saved")).unwrap();
            scratch.write("saved", text.replace(r#""version":2"#, r#""version":1"#).as_bytes());
        },
        &["saved: is of version 1"],
    );
    is_refused(
        |scratch| {
            let file = File::create(scratch.path("saved")).unwrap();
            file.set_len(1 << 40).unwrap();
        },
        &["saved: is too large"],
    );
}

#[test]
fn an_older_difference_stays_where_a_new_one_cannot_be_found() {
    let scratch = siblings("11 11", "11 22", 2);
    scratch.rebasefs(SAVE);
    let before = bytes_of(&scratch, &["saved"]);
    scratch.rebasefs_fails(1, "rebase -b missing --save-difference saved o1");
    assert!(before == bytes_of(&scratch, &["saved"]));
    // Nothing is left beside it.
    assert!(!scratch.run("ls", "").stdout.contains(".new"));
}

#[test]
fn a_block_device_has_no_difference_to_keep() {
    let scratch = siblings("11 11", "11 22", 2);
    let device = LoopDevice::attach(&scratch.path("new"));
    let overlays = ["o0", "o1"];
    let (before, files) = (seen(&scratch, &overlays), bytes_of(&scratch, &overlays));
    let line = format!("rebase -b {} -F raw o0 o1", device.path());
    let said = scratch.rebasefs_fails(1, &format!("{line} --save-difference saved"));
    assert!(said.contains(&format!("{}: has no modification time", device.path())), "{said}");
    assert!(said.contains("saved: was not written"), "{said}");
    assert!(files == bytes_of(&scratch, &overlays) && !scratch.path("saved").exists());
    // Without keeping it there is nothing to be said against block devices.
    scratch.rebasefs(&line);
    assert!(before == seen(&scratch, &overlays), "guest bytes changed");
    all_stand_on(&scratch, &overlays, device.path());
}
