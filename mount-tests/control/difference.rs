//! `ctl/difference`: where a would-be backing file differs, found out without a rebase.

use rebasefs::ErrorKind;

use super::{CLUSTER, old_and_new};
use crate::mounted::Mounted;

/// Asks for a comparison; returns start and length of each range, and the sum that the file says.
fn compared(mounted: &Mounted, name: &str) -> (Vec<(u64, u64)>, u64) {
    assert_eq!(mounted.shell(&format!("echo {name} > ctl/difference")), (Some(0), String::new()));
    let json: serde_json::Value = serde_json::from_str(&mounted.says("difference")).unwrap();
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let ranges = json["ranges"].as_array().unwrap().iter();
    let ranges = ranges.map(|range| (number(&range["start"]), number(&range["length"]))).collect();
    assert_eq!(mounted.status("bytes-different"), json["different"].to_string());
    (ranges, number(&json["different"]))
}

#[test]
fn the_difference_is_that_of_the_backing_files_and_nothing_is_written() {
    let s = old_and_new();
    // One byte more, near the end of a unit of 4 KiB.
    s.poke("new.raw", 3 * 65536 + 8191, b"!");
    let files = ["cow.qcow2", "base.raw", "new.raw"];
    let before = files.map(|name| std::fs::read(s.path(name)).unwrap());
    let mounted = Mounted::new(&s, "cow.qcow2");
    let cluster = CLUSTER as u64;
    let clusters =
        [(cluster, cluster), (3 * cluster + 4096, 4096), (4 * cluster, 2 * cluster), (7 * cluster, cluster)];
    assert_eq!(compared(&mounted, "new.raw"), (clusters.to_vec(), 4 * cluster + 4096));
    assert_eq!(mounted.status("request"), "comparison with 'new.raw'");
    assert_eq!(compared(&mounted, "base.raw"), (vec![], 0));
    // Without a backing file there would be zeros.
    assert_eq!(
        compared(&mounted, "").0,
        [(0, 2 * cluster), (3 * cluster, cluster), (5 * cluster, 3 * cluster)]
    );
    assert_eq!(mounted.says("backing"), "base.raw\n");
    mounted.unmount();
    assert_eq!(files.map(|name| std::fs::read(s.path(name)).unwrap()), before);
}

#[test]
fn a_long_list_of_ranges_is_read_whole_and_agrees_with_cmp() {
    let s = old_and_new();
    let mut new = std::fs::read(s.path("base.raw")).unwrap();
    (0..new.len()).step_by(8192).for_each(|at| new[at] ^= 1);
    s.write("new.raw", &new);
    let by_cmp = s.run("cmp", "-l base.raw new.raw").stdout.lines().count();
    let mounted = Mounted::new(&s, "cow.qcow2");
    let (ranges, bytes) = compared(&mounted, "new.raw");
    assert_eq!((ranges.len(), bytes), (by_cmp, 4096 * by_cmp as u64));
    let (code, said) = mounted.shell("cat ctl/difference | jq -e '.ranges | length == 64' >&2 && cp ctl/difference ../copy && cmp ../copy ctl/difference");
    assert_eq!((code, said.as_str()), (Some(0), "true\n"));
}

#[test]
fn what_cannot_be_a_backing_file_is_refused_with_the_reason() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    for (name, kind) in
        [("missing.raw", ErrorKind::NotFound), ("cow.qcow2", ErrorKind::Loop), (".", ErrorKind::IsDirectory)]
    {
        let error = std::fs::write(mounted.path("ctl/difference"), format!("{name}\n")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(kind.errno()), "{name}");
        assert!(mounted.status("error").contains(name), "{}", mounted.says("status"));
    }
    assert_eq!(mounted.says("difference"), "");
}
