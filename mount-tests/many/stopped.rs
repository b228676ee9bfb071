//! Ctrl-C or worse while many overlays are at work: each has moved or stands where it stood, and the
//! same command moves the rest.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use super::{all_stand_on, bytes_of, seen, siblings};
use crate::interrupted::{ended, send, slow_line};
use crate::mounted::wait_until;
use crate::rebase::backing_of;
use crate::traced::At;

#[test]
fn what_was_under_way_stops_cleanly_and_the_same_command_moves_the_rest() {
    let old = "11 ".repeat(16);
    let s = siblings(&old, &"22 ".repeat(16), 12);
    let names: Vec<String> = (0..12).map(|number| format!("o{number}")).collect();
    let before = seen(&s, &names);
    let line = format!("rebase --jobs 2 -b new -F raw {}", names.join(" "));
    let rebase = slow_line(&s, &line, "fdatasync", 50);
    wait_until("some have moved", || {
        let moved = |name: &&str| backing_of(&s, name).0.as_deref() == Some("new");
        ["o0", "o1", "o2", "o3"].iter().filter(|name| moved(name)).count() >= 2
    });
    send("INT", &rebase);
    let (code, out, said) = ended(rebase);
    assert_eq!(code, Some(130), "{said}");
    let moved = out.lines().filter(|line| line.contains(": rebased: ")).count();
    assert!((2..12).contains(&moved), "{out}{said}");
    // A line each, on one stream or the other.
    let stopped = said
        .lines()
        .filter(|line| line.contains(": failed: ") && line.contains("the rebase was stopped"))
        .count();
    assert_eq!(moved + stopped, 12, "{out}{said}");
    assert!(said.contains(&format!("rebasefs: SIGINT: {stopped} of 12 images failed")), "{said}");
    let on_new = names.iter().filter(|name| backing_of(&s, name).0.as_deref() == Some("new")).count();
    assert_eq!(on_new, moved);
    names.iter().for_each(|name| s.check_clean(name));
    assert!(before == seen(&s, &names), "guest bytes changed");
    s.rebasefs(&line);
    all_stand_on(&s, &names, "new");
    assert!(before == seen(&s, &names), "guest bytes changed");
}

#[test]
fn nothing_has_moved_while_the_difference_is_being_found() {
    let s = siblings(&"11 ".repeat(256), &"22 ".repeat(256), 3);
    let names = ["o0", "o1", "o2"];
    let before = bytes_of(&s, &names);
    let rebase = slow_line(&s, "rebase -b new -F raw o0 o1 o2", "pread64", 20);
    wait_until("backing files are being read", || {
        let io = std::fs::read_to_string(format!("/proc/{}/io", rebase.id())).unwrap_or_default();
        let read = io.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok());
        read.is_some_and(|bytes| bytes > 2 << 20)
    });
    send("TERM", &rebase);
    let (code, out, said) = ended(rebase);
    assert_eq!((code, out.as_str()), (Some(143), ""), "{said}");
    assert!(said.contains("3 of 3 images failed"), "{said}");
    assert!(before == bytes_of(&s, &names), "something was written");
}

#[test]
fn killed_in_the_middle_every_overlay_is_whole() {
    let s = siblings(&"11 ".repeat(16), &"22 ".repeat(16), 12);
    let names: Vec<String> = (0..12).map(|number| format!("o{number}")).collect();
    let before = seen(&s, &names);
    let line = format!("rebase --jobs 2 -b new -F raw {}", names.join(" "));
    // Each of the two threads has some 24 of these to do.
    let at = At { system_call: "fdatasync", number: 10, signal: "KILL" };
    let status = at.command(&s.path(""), &line).stdout(Stdio::null()).status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    let has_moved = |name: &&String| backing_of(&s, name).0.as_deref() == Some("new");
    let moved = names.iter().filter(has_moved).count();
    assert!((1..12).contains(&moved), "{moved} have moved");
    assert!(before == seen(&s, &names), "guest bytes changed");
    s.rebasefs(&line);
    assert_eq!(names.iter().filter(has_moved).count(), 12);
    assert!(before == seen(&s, &names), "guest bytes changed");
    // Clusters may have leaked, nothing else.
    for name in &names {
        let ended = s.run("qemu-img", &format!("check {name}"));
        assert!(matches!(ended.code, Some(0 | 3)), "{}", ended.stdout);
    }
}
