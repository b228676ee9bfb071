//! The whole mounted tree, walked by `tree.sh` with a user's own tools.

use crate::mounted::{Mounted, open_dev_fuse};
use crate::scratch::{Scratch, rebasefs};

/// Runs the script in an empty directory, `as_whom` being what starts programs as somebody.
fn walk(as_whom: &[&str]) {
    open_dev_fuse();
    let scratch = Scratch::new();
    scratch.ok("chmod", "777 .");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/mount-tests/tree.sh");
    // An ordinary user may not be able to read our source.
    std::fs::copy(script, scratch.path("tree.sh")).unwrap();
    let line = [as_whom, &["bash", "tree.sh", rebasefs()]].concat();
    let ended = scratch.run_args(line[0], &line[1..]);
    let said = ended.stdout + &ended.stderr;
    assert_eq!((ended.code, said.as_str()), (Some(0), ""));
}

#[test]
fn root_walks_the_tree() {
    walk(&[]);
}

#[test]
fn an_ordinary_user_walks_the_tree() {
    walk(&["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]);
}

#[test]
fn the_layers_of_a_long_chain_and_many_snapshots_are_all_there() {
    let s = Scratch::new();
    s.draw_raw("0.img", 65536, "10 11 12 13");
    for n in 1..12 {
        let format = if n == 1 { "raw" } else { "qcow2" };
        s.qemu_img(&format!("create -q -f qcow2 -b {}.img -F {format} {n}.img", n - 1));
        s.draw(&format!("{n}.img"), 65536, ["-- 2a", "-- -- 3a", "-- -- -- 4a"][n % 3]);
    }
    for n in 0..40 {
        s.qemu_img(&format!("snapshot -c {n} 11.img"));
        s.draw("11.img", 65536, &format!("{n:02x}"));
    }
    let expected: Vec<_> =
        (0..12).map(|n| s.guest_bytes(if n == 0 { "raw" } else { "qcow2" }, &format!("{n}.img"))).collect();
    let mounted = Mounted::new(&s, "11.img");
    for (depth, bytes) in expected.iter().rev().enumerate() {
        assert_eq!(std::fs::read(mounted.path(&format!("layers/{depth}.raw"))).unwrap(), *bytes);
    }
    assert_eq!(std::fs::read_dir(mounted.path("layers")).unwrap().count(), 12);
    // More than are kept open at a time, twice. Each was taken before the next number was drawn.
    for n in (1..40).chain(1..40) {
        let bytes = std::fs::read(mounted.path(&format!("snapshots/{n}.raw"))).unwrap();
        assert!(bytes[0] == n - 1 && bytes[65536..] == expected[11][65536..], "snapshot {n}");
    }
    assert_eq!(std::fs::read_dir(mounted.path("snapshots")).unwrap().count(), 40);
}
