//! What images and names hold never reaches a terminal as it is: no escape sequence, no line of its own.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use serde_json::Value;

use crate::mounted::Mounted;
use crate::scratch::{Scratch, rebasefs};

/// A title for the terminal's window, a colour, a second line, a turned direction, a byte that is no text.
const NAME: &str = r"e\x1b]0;x\x07\x1b[31m\nfake line\u202e\u009b\xff";
/// The same as it is shown, where its bytes are known, and in JSON's replacement for what is no text.
const SHOWN: &str = r"e\u{1b}]0;x\u{7}\u{1b}[31m\nfake line\u{202e}\u{9b}\xff";
const SHOWN_LOSSY: &str = "e\\u{1b}]0;x\\u{7}\\u{1b}[31m\\nfake line\\u{202e}\\u{9b}\u{fffd}";

/// Runs bash, where `$N` is the name and `$R` the program; returns the exit code and both outputs.
fn bash(s: &Scratch, line: &str) -> (Option<i32>, String, String) {
    let script = format!("N=$'{NAME}'; R={}; {line}", rebasefs());
    let output =
        Command::new("bash").args(["-c", &script]).env("LC_ALL", "C.UTF-8").current_dir(s.path("")).output();
    let output = output.unwrap();
    // Bytes that are no text would be replaced here, and not be seen.
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap_or_else(|e| panic!("{line}: {e}"));
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn is_tame(text: &str) -> bool {
    !text.contains(|c: char| c.is_control() && c != '\n' || matches!(c, '\u{2028}'..='\u{202e}'))
        && !text.lines().any(|line| line.starts_with("fake"))
}

/// An image of that name on a backing file of that name, with a snapshot and a bitmap of that name.
fn hostile() -> Scratch {
    let s = Scratch::new();
    let made = bash(
        &s,
        "set -e; head -c 64k /dev/zero | tr '\\0' 1 > \"b$N\"; truncate -s 64k new
         qemu-img create -q -f qcow2 -F raw -b \"b$N\" \"$N\"
         qemu-img snapshot -c \"${N%?}\" \"$N\"
         qemu-img bitmap --add \"$N\" \"${N%?}\"",
    );
    assert_eq!(made.0, Some(0), "{}", made.2);
    s
}

#[test]
fn text_output_escapes_what_images_and_names_hold() {
    let s = hostile();
    for (line, names) in [
        // The image twice, the backing file, the snapshot, the bitmap.
        ("$R info -- \"$N\"", 5),
        ("$R info --backing-chain -- \"$N\"", 7),
        ("$R map -- \"$N\"", 1),
        ("COLUMNS=400 $R map --picture -- \"$N\"", 2),
        ("$R check -- \"$N\"", 0),
        ("$R create -f raw \"n$N\" 64k", 1),
        ("$R create -f qcow2 -F raw -b \"b${N%?}\" -u n 64k", 1),
        ("$R -v rebase -b new -F raw -- \"$N\"", 0),
        ("cp -- \"$N\" \"2$N\"; $R rebase -b \"b$N\" -F raw -- \"$N\" \"2$N\"", 2),
        ("$R rebase --dry-run -b new -F raw -- \"$N\" \"2$N\"", 2),
    ] {
        let (code, out, err) = bash(&s, line);
        assert_eq!(code, Some(0), "{line}: {err}");
        assert!(is_tame(&out) && is_tame(&err), "{line}: {out:?} {err:?}");
        let whole = SHOWN.trim_end_matches("\\xff");
        assert_eq!(out.matches(whole).count(), names, "{line}: {out}{err}");
    }
}

#[test]
fn names_show_each_byte() {
    let s = hostile();
    let (_, out, _) = bash(&s, "$R map -- \"$N\"");
    assert!(out.lines().nth(1).unwrap().ends_with(&format!("b{SHOWN}")), "{out}");
    // JSON has no bytes that are no text.
    let (_, out, _) = bash(&s, "$R info --output=json -- \"$N\"");
    assert!(is_tame(&out), "{out:?}");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["filename"], "e\u{1b}]0;x\u{7}\u{1b}[31m\nfake line\u{202e}\u{9b}\u{fffd}");
    let (_, out, _) = bash(&s, "$R info -- \"$N\"");
    assert_eq!(out.lines().next().unwrap(), format!("image: {SHOWN_LOSSY}"));
}

#[test]
fn an_error_is_one_line_whatever_it_names() {
    let s = hostile();
    for line in [
        "$R info -- \"x$N\"",
        "$R rebase -b \"x$N\" -F raw -- \"$N\"",
        "$R rebase -u -b \"$N\" -F qcow2 -- \"$N\"",
        "$R create -f qcow2 -o \"${N%?}=1\" n 64k",
        "$R mount -- \"x$N\" .",
        "mv \"b$N\" \"c$N\"; $R map -- \"$N\"; code=$?; mv \"c$N\" \"b$N\"; exit $code",
        "$R rebase -b new -F raw \"x$N\" \"y$N\"",
    ] {
        let (code, out, err) = bash(&s, line);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{line}: {err:?}");
        assert!(is_tame(&err), "{line}: {err:?}");
        assert!(err.contains(SHOWN.trim_end_matches("\\xff")), "{line}: {err}");
        assert!(err.lines().all(|line| line.contains("rebasefs: ") || line.contains(": failed: ")), "{err}");
    }
    // What clap says has several lines, and repeats what was typed.
    let (code, _, err) = bash(&s, "$R info \"--${N%?}\" x");
    assert!(
        code == Some(1) && is_tame(&err) && err.contains("unexpected argument '--e\\u{1b}]0;"),
        "{err:?}"
    );
}

#[test]
fn control_files_have_one_line_a_value() {
    let s = hostile();
    let image = OsStr::from_bytes(b"e\x1b]0;x\x07\x1b[31m\nfake line\xe2\x80\xae\xc2\x9b\xff");
    std::fs::rename(s.path(image), s.path("cow.qcow2")).unwrap();
    let mounted = Mounted::new(&s, "cow.qcow2");
    for file in ["status", "chain", "info"] {
        let text = String::from_utf8(std::fs::read(mounted.path(&format!("ctl/{file}"))).unwrap()).unwrap();
        assert!(is_tame(&text), "{file}: {text:?}");
    }
    assert_eq!(mounted.status("backing"), format!("b{SHOWN}"));
    mounted.unmount();
}
