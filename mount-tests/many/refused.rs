//! What is refused before anything is written.

use super::{bytes_of, siblings};

/// Refused with all these words, and no overlay changed.
fn is_refused(make: &[&str], line: &str, words: &[&str]) {
    let scratch = siblings("11 11", "11 22", 3);
    for command in make {
        let (program, arguments) = command.split_once(' ').unwrap();
        scratch.ok(program, arguments);
    }
    let overlays = ["o0", "o1", "o2"];
    let before = bytes_of(&scratch, &overlays);
    let said = scratch.rebasefs_fails(1, line);
    for word in words {
        assert!(said.contains(word), "{line}: {said}");
    }
    assert!(before == bytes_of(&scratch, &overlays), "{line}: something was written");
}

#[test]
fn an_overlay_that_is_given_twice() {
    is_refused(&[], "rebase -b new o0 o1 o2 o1", &["o1 is given twice"]);
    is_refused(&["ln o1 hard"], "rebase -b new o0 o1 hard", &["o1 and hard are the same file"]);
    is_refused(&["ln -s o1 soft"], "rebase -b new soft o0 ./o1", &["soft and ./o1 are the same file"]);
}

#[test]
fn an_overlay_that_stands_on_another_one_of_the_list() {
    let make = "qemu-img create -f qcow2 -b o1 -F qcow2 upper";
    is_refused(&[make], "rebase -b new o0 upper o1", &["upper stands on o1"]);
    let middle = "qemu-img create -f qcow2 -b upper -F qcow2 uppermost";
    is_refused(&[make, middle], "rebase -b new -F raw o1 uppermost", &["uppermost stands on o1"]);
    // On its external data file.
    let with_data = "qemu-img create -f qcow2 -o data_file=data -b old -F raw x";
    let on_data = "qemu-img create -f qcow2 -b data -F raw y";
    is_refused(&[with_data, on_data], "rebase -U -b new x o0 y", &["y stands on x"]);
    // In the new chain, as its top and further down.
    is_refused(&[], "rebase -b o2 -F qcow2 o0 o1 o2", &["o0 would stand on o2"]);
    is_refused(&[make], "rebase -b upper -F qcow2 o0 o1 o2", &["o0 would stand on o1"]);
}

#[test]
fn lists_and_options_that_make_no_sense() {
    is_refused(&["touch list"], "rebase -b new --from-file list", &["the list of images is empty"]);
    is_refused(&[], "rebase -b new --from-file missing o0", &["missing", "No such file"]);
    is_refused(&[], "rebase -b new", &["IMAGE"]);
    is_refused(&[], "rebase -b new -0 o0 o1", &["--from-file"]);
    is_refused(&[], "rebase -u -b new -F raw --save-difference d o0", &["--save-difference"]);
    is_refused(&[], "rebase -b new --jobs 0 o0 o1", &["--jobs"]);
    is_refused(&[], "rebase -b new --save-difference missing/d o0 o1 o2", &["missing/d", "No such file"]);
}
