//! What `stat` shows as the times of modification and of change: what can change a byte moves both, what
//! changes none moves neither.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::old_and_new;
use crate::mounted::{Mounted, wait_until};
use crate::scratch::Scratch;

const FILES: [&str; 12] = [
    "disk.raw",
    "partitions/1.raw",
    "snapshots/one.raw",
    "layers/0.raw",
    "layers/1.raw",
    "ctl/backing",
    "ctl/chain",
    "ctl/difference",
    "ctl/info",
    "ctl/map",
    "ctl/rebase",
    "ctl/status",
];

/// An overlay with a snapshot and a partition of its own.
fn image() -> Scratch {
    let s = old_and_new();
    // From sector 8 on, 64 of them.
    let table: Vec<String> = [(446, 0x00), (450, 0x83), (454, 8), (458, 64), (510, 0x55), (511, 0xaa)]
        .iter()
        .map(|(at, byte)| format!("write -q -P {byte} {at} 1"))
        .collect();
    let table: Vec<&str> =
        [&["write -q -z 0 512"], &table.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat();
    s.qemu_io("qcow2", "cow.qcow2", &table);
    s.qemu_img("snapshot -c one cow.qcow2");
    s
}

/// Time of modification and of change in nanoseconds.
fn times(mounted: &Mounted) -> [(i128, i128); FILES.len()] {
    FILES.map(|name| {
        let shown = mounted.path(name).metadata().unwrap();
        let time = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        (time(shown.mtime(), shown.mtime_nsec()), time(shown.ctime(), shown.ctime_nsec()))
    })
}

/// Does it; the files whose times have moved. Others have the times that they had.
fn moves(mounted: &Mounted, deed: impl FnOnce()) -> Vec<&'static str> {
    let before = times(mounted);
    deed();
    let after = times(mounted);
    let files = FILES.iter().zip(before.into_iter().zip(after));
    let moved = files.filter(|(name, ((mtime, ctime), (mtime_now, ctime_now)))| {
        assert_eq!(mtime_now > mtime, ctime_now > ctime, "{name}");
        assert!(mtime_now >= mtime && mtime_now == ctime_now, "{name}");
        mtime_now > mtime
    });
    moved.map(|(name, _)| *name).collect()
}

fn asks(mounted: &Mounted, line: &str) {
    std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap();
}

const REBASED: [&str; 6] = ["layers/1.raw", "ctl/backing", "ctl/chain", "ctl/info", "ctl/map", "ctl/status"];

#[test]
fn a_safe_rebase_moves_the_times_of_no_byte_of_the_disk_and_an_unsafe_one_those_of_all() {
    let s = image();
    s.draw_raw("other.raw", 65536, "12 13 14 15 16 17 18 19");
    let image_time = s.path("cow.qcow2").metadata().unwrap().modified().unwrap();
    let mounted = Mounted::new(&s, "cow.qcow2");
    for name in FILES {
        assert_eq!(mounted.path(name).metadata().unwrap().modified().unwrap(), image_time, "{name}");
    }
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    let (bytes, open) = (mounted.bytes(), || disk.metadata().unwrap().modified().unwrap());
    // A reader that has looked at it looks at nothing again.
    assert_eq!(moves(&mounted, || drop(mounted.bytes())), [""; 0]);
    assert_eq!(moves(&mounted, || mounted.rebase("new.raw").unwrap()), REBASED);
    assert_eq!(moves(&mounted, || asks(&mounted, "--reclaim -b base.raw")), REBASED);
    assert_eq!(moves(&mounted, || drop(mounted.rebase("missing").unwrap_err())), REBASED[3..]);
    let rehearsed = ["ctl/info", "ctl/map", "ctl/rebase", "ctl/status"];
    assert_eq!(moves(&mounted, || asks(&mounted, "--dry-run -b new.raw")), rehearsed);
    let compare = || std::fs::write(mounted.path("ctl/difference"), "new.raw\n").unwrap();
    assert_eq!(moves(&mounted, compare), ["ctl/difference", "ctl/info", "ctl/map", "ctl/status"]);
    assert_eq!((open(), mounted.bytes()), (image_time, bytes.clone()));
    // The snapshot and the partition were looked at before, and the kernel remembers.
    let exchanged = [&FILES[..5], &REBASED[1..]].concat();
    assert_eq!(moves(&mounted, || asks(&mounted, "-u -F raw -b other.raw")), exchanged);
    assert!(mounted.bytes() != bytes && open() > image_time);
    assert_eq!(moves(&mounted, || asks(&mounted, "-b base.raw")), REBASED);
}

#[test]
fn a_write_moves_the_times_of_the_disk_and_its_partitions_alone() {
    let s = image();
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw --grow");
    let disk = File::options().write(true).open(mounted.path("disk.raw")).unwrap();
    let written = ["disk.raw", "partitions/1.raw", "layers/0.raw", "ctl/info", "ctl/map"];
    for deed in [
        &(|| disk.write_all_at(b"x", 5000).unwrap()) as &dyn Fn(),
        &|| drop(s.ok("fallocate", &format!("-p -o 65536 -l 65536 {}", mounted.path("disk.raw").display()))),
        &|| disk.set_len(1 << 20).unwrap(),
    ] {
        assert_eq!(moves(&mounted, deed), written);
    }
    assert_eq!(moves(&mounted, || disk.sync_all().unwrap()), [""; 0]);
    assert_eq!(moves(&mounted, || mounted.rebase("new.raw").unwrap()), REBASED);
}

#[test]
fn the_times_of_status_move_when_a_backing_file_has_changed() {
    let s = image();
    let mounted = Mounted::new(&s, "cow.qcow2");
    assert_eq!(mounted.status("changed"), "");
    let status = || mounted.path("ctl/status").metadata().unwrap().modified().unwrap();
    let before = status();
    s.poke("base.raw", 0, &[0x11]);
    wait_until("it is told", || !mounted.status("changed").is_empty());
    assert!(status() > before);
}

/// What others have written to the image is shown after a rebase; nobody may take it for what it was.
#[test]
fn beside_those_who_write_a_rebase_moves_all_times() {
    let s = image();
    let mounted = Mounted::with(&s, "cow.qcow2", "-U");
    let _ = mounted.bytes();
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x99 64k 64k"]);
    let moved = moves(&mounted, || mounted.rebase("new.raw").unwrap());
    assert_eq!(moved, [&FILES[..5], &REBASED[1..]].concat());
    assert!(mounted.bytes() == s.guest_bytes("qcow2", "cow.qcow2"));
}
