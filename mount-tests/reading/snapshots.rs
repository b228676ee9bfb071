//! Internal snapshots: the active disk after one was taken, and the view of each.

use std::sync::Arc;

use super::{open, reads_as, reads_like_qemu};
use crate::scratch::Scratch;

/// Every snapshot of `a.qcow2` reads as qemu-img converts it. QEMU shows a snapshot in the size of
/// the active disk; ours has the size that it was taken with.
fn snapshots_read_like_qemu(s: &Scratch, cell: &str) {
    reads_like_qemu(s, "qcow2", "a.qcow2", cell);
    let chain = open(s, "a.qcow2").unwrap();
    let top = chain.top().unwrap().as_qcow2().unwrap();
    for snapshot in top.snapshots().unwrap() {
        let name = &snapshot.name;
        s.qemu_img(&format!("convert -U -f qcow2 -O raw -l snapshot.name={name} a.qcow2 view.raw"));
        let mut expected = std::fs::read(s.path("view.raw")).unwrap();
        let view = chain.below(0).under(Arc::new(top.at_snapshot(&snapshot).unwrap()));
        if view.virtual_size() > expected.len() as u64 {
            let mut beyond = vec![0; view.virtual_size() as usize - expected.len()];
            let at = rebasefs::layer::GuestOffset(expected.len() as u64);
            view.read_at(at, &mut beyond).unwrap();
            expected.append(&mut beyond);
        }
        expected.truncate(view.virtual_size() as usize);
        reads_as(&view, &expected, &format!("{cell}, snapshot {name}"));
    }
}

#[test]
fn snapshots_and_the_disk_after_them_read_like_qemu() {
    let s = Scratch::new();
    s.draw_raw("base.raw", 65536, &["b1"].repeat(8).join(" "));
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on", "compression_type=zstd"] {
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -F raw -b base.raw a.qcow2 512k"));
        s.draw("a.qcow2", 65536, "11 -- zz c12 -- za -- --");
        s.qemu_img("snapshot -c one a.qcow2");
        s.draw("a.qcow2", 65536, "zz 21 -- -- .. 22 -- --");
        s.qemu_img("snapshot -c two a.qcow2");
        s.draw("a.qcow2", 65536, "31 -- 32 33 -- -- -- 34");
        snapshots_read_like_qemu(&s, options);
    }
}

#[test]
fn snapshots_of_another_size_than_the_disk_read_like_qemu() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 -o cluster_size=512 a.qcow2 64k");
    s.draw("a.qcow2", 32768, "11 12");
    s.qemu_img("snapshot -c small a.qcow2");
    s.qemu_img("resize -q -f qcow2 a.qcow2 256k");
    s.draw("a.qcow2", 32768, "-- 21 -- -- -- -- -- 22");
    s.qemu_img("snapshot -c large a.qcow2");
    s.qemu_img("resize -q --shrink -f qcow2 a.qcow2 128k");
    snapshots_read_like_qemu(&s, "resized");
    let top = open(&s, "a.qcow2").unwrap().top().unwrap().clone();
    let sizes: Vec<u64> =
        top.as_qcow2().unwrap().snapshots().unwrap().iter().map(|snapshot| snapshot.disk_size).collect();
    assert_eq!(sizes, [64 << 10, 256 << 10]);
}

#[test]
fn snapshot_names_and_ids_are_those_that_qemu_lists() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 a.qcow2 1M");
    for name in ["one", "größer", "three:x"] {
        s.qemu_img(&format!("snapshot -c {name} a.qcow2"));
    }
    let json: serde_json::Value =
        serde_json::from_str(&s.qemu_img("info -f qcow2 --output=json a.qcow2")).unwrap();
    let chain = open(&s, "a.qcow2").unwrap();
    let ours = chain.top().unwrap().as_qcow2().unwrap().snapshots().unwrap();
    for (ours, theirs) in ours.iter().zip(json["snapshots"].as_array().unwrap()) {
        assert_eq!(ours.id, theirs["id"].as_str().unwrap());
        assert_eq!(ours.name, theirs["name"].as_str().unwrap());
        assert_eq!(u64::from(ours.date_seconds), theirs["date-sec"].as_u64().unwrap());
        assert_eq!(ours.vm_state_size, theirs["vm-state-size"].as_u64().unwrap());
    }
    assert_eq!(ours.len(), 3);
}
