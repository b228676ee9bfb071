//! What commands write beside the images never takes the place of one.

use std::os::unix::fs::symlink;

use crate::mounted::Mounted;
use crate::scratch::Scratch;

const CLUSTER: usize = 65536;

/// ```text
/// old: 11 22 -- --
/// new: 11 33 -- --
/// cow: -- -- 44 --
/// ```
fn images() -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("old", CLUSTER, "11 22 -- --");
    scratch.draw_raw("new", CLUSTER, "11 33 -- --");
    scratch.qemu_img("create -q -f qcow2 -b old -F raw cow");
    scratch.qemu_img("create -q -f qcow2 -b old -F raw other");
    scratch.draw("cow", CLUSTER, "-- -- 44 --");
    std::fs::hard_link(scratch.path("new"), scratch.path("hard")).unwrap();
    symlink("old", scratch.path("soft")).unwrap();
    symlink("missing", scratch.path("dangling")).unwrap();
    std::fs::create_dir(scratch.path("directory")).unwrap();
    scratch.ok("mkfifo", "fifo");
    scratch
}

const IMAGES: [&str; 4] = ["old", "new", "cow", "other"];

fn bytes(scratch: &Scratch) -> [Vec<u8>; 4] {
    IMAGES.map(|name| std::fs::read(scratch.path(name)).unwrap())
}

/// The command is refused with these words, and all images are what they were.
fn refused(scratch: &Scratch, line: &str, words: &str) {
    let before = bytes(scratch);
    let said = scratch.rebasefs_fails(1, line);
    assert!(said.contains(words), "{line}: {said}");
    assert!(bytes(scratch) == before, "{line} has written to an image: {said}");
}

const IN_PLAY: &str = "is a file of the chain, and would be overwritten";

#[test]
fn no_file_of_a_chain_in_play_is_overwritten() {
    let scratch = images();
    for file in ["new", "hard", "old", "soft", "cow"] {
        for dry in ["", "--dry-run"] {
            let line = format!("rebase {dry} -b new -F raw --save-difference {file} cow");
            refused(&scratch, &line, IN_PLAY);
        }
        refused(&scratch, &format!("rebase --dry-run -b new -F raw --svg {file} cow"), IN_PLAY);
    }
    // An overlay of which it is not the turn yet.
    refused(&scratch, "rebase -b new -F raw --save-difference other cow other", IN_PLAY);
    for file in ["old", "soft", "cow"] {
        refused(&scratch, &format!("map --svg {file} cow"), IN_PLAY);
        refused(&scratch, &format!("map -U --svg {file} cow"), IN_PLAY);
    }
    std::fs::create_dir(scratch.path("mnt")).unwrap();
    for file in ["old", "soft", "cow"] {
        refused(&scratch, &format!("mount --log {file} cow mnt"), "opening the log: ");
        refused(&scratch, &format!("mount -U --log {file} cow mnt"), IN_PLAY);
    }
    assert!(!crate::mounted::is_mounted(&scratch.path("mnt")));
}

#[test]
fn what_is_no_regular_file_is_not_replaced() {
    let scratch = images();
    for (file, words) in [
        ("directory", "is a directory, not a file to be written"),
        ("fifo", "is no regular file, and would be replaced by one"),
        ("dangling", "is a symbolic link that leads nowhere"),
    ] {
        refused(&scratch, &format!("map --svg {file} cow"), words);
        refused(&scratch, &format!("rebase --dry-run -b new -F raw --svg {file} cow"), words);
        refused(&scratch, &format!("rebase -b new -F raw --save-difference {file} cow"), words);
        refused(&scratch, &format!("mount --log {file} cow directory"), words);
    }
    // A device of the test's own, for whoever gets it wrong.
    scratch.ok("mknod", "null c 1 3");
    scratch.rebasefs("map --svg null cow");
    scratch.rebasefs("rebase -q --dry-run -b new -F raw --save-difference null cow");
    assert!(scratch.ok("stat", "-c %F null").contains("character special file"));
}

#[test]
fn an_image_that_somebody_has_open_is_not_overwritten() {
    let scratch = images();
    let mounted = Mounted::new(&scratch, "other");
    refused(&scratch, "map --svg other new", "is open as an image in another process");
    refused(&scratch, "rebase -b new -F raw --save-difference other cow", "is open as an image");
    mounted.unmount();
}

#[test]
fn a_file_keeps_its_mode_and_is_there_as_a_whole() {
    let scratch = images();
    scratch.write("picture", b"what was there");
    scratch.ok("chmod", "640 picture");
    symlink("picture", scratch.path("link")).unwrap();
    scratch.rebasefs("map --svg link cow");
    assert!(std::fs::read_to_string(scratch.path("picture")).unwrap().ends_with("</svg>\n"));
    assert_eq!(scratch.ok("stat", "-c %a picture").trim(), "640");
    assert!(scratch.path("link").symlink_metadata().unwrap().is_symlink());
}

/// `create` with other words about where the new image stands.
#[test]
fn a_new_image_takes_the_place_of_none_below_it() {
    let scratch = images();
    scratch.qemu_img("create -q -f qcow2 -b cow -F qcow2 top");
    refused(&scratch, "create -u -f qcow2 -b cow -F qcow2 cow 1M", IN_PLAY);
    refused(&scratch, "create -u -f qcow2 -b top -F qcow2 cow 1M", IN_PLAY);
    refused(&scratch, "create -u -f qcow2 -b top -F qcow2 soft 1M", IN_PLAY);
    for data_file in ["old", "cow", "soft"] {
        let line = format!("create -f qcow2 -b cow -F qcow2 -o data_file={data_file} fresh");
        refused(&scratch, &line, IN_PLAY);
        assert!(!scratch.path("fresh").exists());
    }
    // Its data file is in use: the image that is there stays as well.
    let mounted = Mounted::new(&scratch, "other");
    refused(&scratch, "create -f qcow2 -o data_file=other cow 1M", "is in use by another process");
    mounted.unmount();
    scratch.rebasefs("create -q -u -f qcow2 -b gone -F qcow2 fresh 1M");
}

#[test]
fn manual_pages_do_not_follow_links_into_images() {
    let scratch = images();
    std::fs::create_dir(scratch.path("man")).unwrap();
    let mounted = Mounted::new(&scratch, "cow");
    symlink(scratch.path("cow"), scratch.path("man/rebasefs.1")).unwrap();
    refused(&scratch, "generate man man", "is open as an image");
    mounted.unmount();
}
