//! How far a rebase has come: on a terminal, in a pipe, for programs; and the line that closes it.

use serde_json::Value;

use crate::scratch::{Ended, Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// old: 4 MiB 11, 2 MiB --; new: 3 MiB 22, 1 MiB 11, 2 MiB --; overlay: 1 MiB 22, 1 MiB 33, 4 MiB --.
fn scratch() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("old", CLUSTER, &("11 ".repeat(64) + &"-- ".repeat(32)));
    s.draw_raw("new", CLUSTER, &("22 ".repeat(48) + &"11 ".repeat(16) + &"-- ".repeat(32)));
    s.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x22 0 1M", "write -q -P 0x33 1M 1M"]);
    s
}

/// Runs it in bash with reads that take so many milliseconds each; `$R` is the program.
fn slowly(s: &Scratch, milliseconds: u32, script: &str) -> Ended {
    let inject = format!("-e trace=pread64 -e inject=pread64:delay_enter={milliseconds}ms");
    let program = format!("R='strace -f -qq -o /dev/null {inject} {}'; set -e; ", rebasefs());
    let ended = s.run_args("bash", &["-c", &(program + script)]);
    assert_eq!(ended.code, Some(0), "{script}: {}{}", ended.stdout, ended.stderr);
    ended
}

/// Objects of `--progress=json`, which only ever go up.
fn steady(objects: &[Value]) {
    for key in ["percent", "bytes-done", "bytes-kept"] {
        let numbers: Vec<f64> = objects.iter().map(|object| object[key].as_f64().unwrap()).collect();
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
    let last = objects.last().unwrap();
    assert_eq!((last["phase"].as_str(), last["percent"].as_f64()), (Some("done"), Some(100.0)));
    let between = objects.iter().filter(|object| !matches!(object["percent"].as_f64(), Some(0.0 | 100.0)));
    assert!(between.count() >= 3, "{objects:?}");
}

#[test]
fn objects_for_programs_go_up_steadily_and_end_at_the_total() {
    let s = scratch();
    s.qemu_img("snapshot -c one cow.qcow2");
    let script = "$R rebase --progress=json --output=json --verify --reclaim -b new cow.qcow2 2>told >came
                  jq -c . told";
    let told = slowly(&s, 40, script).stdout;
    let objects: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    steady(&objects);
    // Known when the plan is made, and the same until the end: 2 MiB are compared, verified in two
    // views, and looked at with what is held when space is reclaimed.
    let total = (2 << 20) * 4 + (2 << 20);
    let planned = objects.iter().filter(|object| object["phase"] != "plan");
    planned.for_each(|object| assert_eq!(object["bytes-total"], total, "{object}"));
    assert_eq!(objects.last().unwrap()["bytes-done"], total);
    let phases: Vec<_> = objects.iter().map(|object| object["phase"].as_str().unwrap()).collect();
    assert!(phases.contains(&"verify") && phases.contains(&"copy"), "{phases:?}");
    s.check_clean("cow.qcow2");
}

#[test]
fn many_overlays_share_one_count_that_never_runs_backwards() {
    let s = scratch();
    // Two moves: overlays on `old`, and on `other`.
    s.draw_raw("other", CLUSTER, &"44 ".repeat(96));
    for name in ["a", "b", "c"] {
        s.qemu_img(&format!("create -q -f qcow2 -b old -F raw {name}"));
        s.qemu_img(&format!("create -q -f qcow2 -b other -F raw {name}2"));
    }
    let script = "$R rebase --jobs 2 --progress=json -b new a b c a2 b2 c2 2>told >came; jq -c . told";
    let told = slowly(&s, 20, script).stdout;
    let objects: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    steady(&objects);
    let last = objects.last().unwrap();
    assert_eq!((&last["images-done"], &last["images-total"]), (&6.into(), &6.into()));
}

/// What a terminal of so many columns was sent, by line and by carriage return.
fn on_a_terminal(s: &Scratch, locale: &str, columns: u32, line: &str) -> Vec<String> {
    let line = format!("stty rows 24 cols {columns}; {line}");
    let script = format!(
        "export R TERM=xterm LC_ALL={locale}; script -qec '{}' /dev/null",
        line.replace("$R", "'\"$R\"'")
    );
    let sent = slowly(s, 40, &script).stdout;
    sent.split(['\r', '\n']).map(str::to_owned).collect()
}

#[test]
fn a_terminal_shows_a_bar_that_fits_and_is_gone_when_it_is_done() {
    for columns in [40, 80, 200] {
        let s = scratch();
        let sent = on_a_terminal(&s, "C.UTF-8", columns, "$R rebase --verify -b new cow.qcow2");
        let plain = |line: &String| line.replace("\u{1b}[2K", "").replace("\u{1b}[1A", "");
        let bars: Vec<String> = sent.iter().map(plain).filter(|line| line.contains('━')).collect();
        assert!(bars.len() >= 3, "{sent:?}");
        for bar in &bars {
            assert!(bar.contains(" %") && bar.chars().count() <= columns as usize, "{columns}: {bar:?}");
        }
        assert_eq!(bars.iter().any(|bar| bar.contains(" left")), columns > 40, "{bars:?}");
        assert!(bars.iter().any(|bar| bar.starts_with("verify ")), "{bars:?}");
        let last = sent.iter().rev().find(|line| !line.is_empty()).map(plain).unwrap();
        assert!(last.starts_with("Image rebased: of 4 MiB"), "{sent:?}");
    }
    let s = scratch();
    let sent = on_a_terminal(&s, "C.UTF-8", 80, "$R rebase -q -b new cow.qcow2");
    assert!(sent.iter().all(String::is_empty), "{sent:?}");
}

/// When the lines come is held by tests of the program itself, with a clock of their own.
#[test]
fn without_a_terminal_there_is_a_line_now_and_then() {
    let s = scratch();
    let said = slowly(&s, 350, "$R rebase --verify -b new cow.qcow2 2>&1 >came").stdout;
    let lines: Vec<&str> = said.lines().collect();
    assert!(!lines.is_empty());
    for line in lines {
        assert!(line.starts_with("rebasefs: ") && line.contains(" %, "), "{said}");
    }
}

/// Of 6 MiB the overlay holds 2 MiB, the first of which `new` has as well; 2 MiB of zeros in both.
#[test]
fn the_closing_line_tells_what_happened() {
    let s = scratch();
    let disk = |image: &str| -> Value {
        let info = s.qemu_img(&format!("info --output=json {image}"));
        serde_json::from_str::<Value>(&info).unwrap()["actual-size"].clone()
    };
    std::fs::copy(s.path("cow.qcow2"), s.path("other.qcow2")).unwrap();
    let before = disk("cow.qcow2");
    let line = "rebase --reclaim --output=json -b new cow.qcow2";
    let report: Value = serde_json::from_str(&s.rebasefs(line)).unwrap();
    for (key, mebibytes) in
        [("missing", 4), ("equal", 2), ("compared", 2), ("copied", 1), ("zeroed", 0), ("reclaimed", 1)]
    {
        assert_eq!(report[key], mebibytes << 20, "{key}: {report}");
    }
    assert_eq!((&report["actual-size-before"], &report["actual-size"]), (&before, &disk("cow.qcow2")));
    assert!(report["seconds"].is_number());
    let said = s.rebasefs("-v rebase --reclaim -b new other.qcow2");
    let figures = "Image rebased: of 4 MiB not in the overlay, 2 MiB were equal by metadata, 2 MiB compared; \
                   1 MiB copied, 0 B zeroed; 1 MiB reclaimed; ";
    assert!(said.starts_with(figures) && said.contains(" on the disk, ") && said.ends_with(" s\n"), "{said}");
}

#[test]
fn where_the_locale_has_no_other_characters_the_bar_is_ascii() {
    let s = scratch();
    let sent = on_a_terminal(&s, "C", 80, "$R rebase --verify -b new cow.qcow2");
    assert!(sent.iter().all(|line| line.is_ascii()), "{sent:?}");
    assert!(sent.iter().any(|line| line.contains(" % ") && line.contains('#')), "{sent:?}");
}

/// As many do: an object of an image that fails, beside the error.
#[test]
fn one_image_that_fails_has_an_object_too() {
    let s = scratch();
    let ended = s.run(rebasefs(), "rebase --output=json -b missing cow.qcow2");
    assert_eq!(ended.code, Some(1));
    let object: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(object["filename"], "cow.qcow2");
    let error = object["error"].as_str().unwrap();
    assert!(ended.stderr.contains(error) && error.contains("missing"), "{}{}", ended.stdout, ended.stderr);
}
