//! Names that are refused: each with its words, and the image stays bit for bit as it was.

use std::io::ErrorKind;

use super::old_and_new;
use crate::mounted::Mounted;
use crate::scratch::Scratch;

#[test]
fn what_is_no_name_is_refused() {
    let scratch = old_and_new();
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for (written, words) in [
        ("new.raw\r\n".to_owned(), "carriage return"),
        ("new\0.raw\n".to_owned(), "NUL"),
        ("new.raw\nbase.raw\n".to_owned(), "follows the newline"),
        ("a".repeat(5000), "at most 4096 bytes"),
    ] {
        let error = std::fs::write(mounted.path("ctl/backing"), written).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(mounted.status("error").contains(words), "{}", mounted.says("status"));
    }
    assert_eq!(std::fs::read(scratch.path("cow.qcow2")).unwrap(), image);
}

/// Writes a name to ctl/backing, as a shell does: the words must be those of the C library, and the image stays bit
/// for bit what it was. Returns the error in ctl/status.
pub fn refused(scratch: &Scratch, mounted: &Mounted, name: &str, words: &str) -> String {
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let (code, said) = mounted.shell(&format!("echo '{name}' > ctl/backing"));
    assert!(code != Some(0) && said.contains(words), "{name}: {code:?} {said}");
    assert_eq!(mounted.status("state"), "failed");
    assert!(std::fs::read(scratch.path("cow.qcow2")).unwrap() == image, "{name}: the image has changed");
    assert_eq!(mounted.says("backing"), "base.raw\n");
    mounted.status("error")
}

#[test]
fn a_missing_file_is_named_with_the_place_where_it_was_looked_for() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let error = refused(&scratch, &mounted, "missing.img", "No such file or directory");
    assert!(error.contains("missing.img"), "{error}");
    assert!(
        error.contains(format!("looked for in {}", scratch.path("").display()).trim_end_matches('/')),
        "{error}"
    );
}

#[test]
fn what_is_no_image_is_refused() {
    let scratch = old_and_new();
    scratch.ok("mkdir", "directory");
    scratch.ok("mkfifo", "fifo");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    refused(&scratch, &mounted, "directory", "Is a directory");
    // Must not wait for somebody at the other end.
    let error = refused(&scratch, &mounted, "fifo", "Invalid argument");
    assert!(error.contains("fifo: is neither a regular file nor a block device"), "{error}");
    refused(&scratch, &mounted, "/dev/null", "Invalid argument");
    refused(&scratch, &mounted, &"n".repeat(1024), "File name too long");
}

#[test]
fn a_chain_that_would_be_a_loop_is_refused() {
    let scratch = old_and_new();
    scratch.qemu_img("create -q -f qcow2 -b cow.qcow2 -F qcow2 above.qcow2");
    scratch.ok("ln", "-s cow.qcow2 link.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for name in ["cow.qcow2", "link.qcow2", "above.qcow2"] {
        let error = refused(&scratch, &mounted, name, "Too many levels of symbolic links");
        assert!(error.contains("the overlay"), "{error}");
    }
}

#[test]
fn a_file_inside_the_mount_is_refused() {
    let scratch = old_and_new();
    scratch.ok("ln", "-s cow.qcow2.mnt/disk.raw inside");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let below = mounted.path("disk.raw");
    scratch.qemu_img(&format!("create -q -u -f qcow2 -b {} -F raw over.qcow2 512k", below.display()));
    for name in ["cow.qcow2.mnt/disk.raw", "inside", "over.qcow2"] {
        let error = refused(&scratch, &mounted, name, "Too many levels of symbolic links");
        assert!(error.contains("inside this mount"), "{error}");
    }
}
