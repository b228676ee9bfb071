//! Each kind of cluster × each shape of a write, beside QEMU.

use super::{Act, Guest};
use crate::scratch::Scratch;

/// Options, bytes of a cluster, and whether the image can have snapshots.
const SHAPES: [(&str, u64, bool); 8] = [
    ("cluster_size=64k", 65536, true),
    ("compat=0.10,cluster_size=4k", 4096, true),
    ("cluster_size=4k,refcount_bits=64", 4096, true),
    ("cluster_size=512", 512, true),
    ("cluster_size=4k,refcount_bits=1", 4096, false),
    ("extended_l2=on,cluster_size=32k", 32768, true),
    ("compression_type=zstd,cluster_size=64k,lazy_refcounts=on", 65536, true),
    ("data_file=data.raw,cluster_size=64k", 65536, false),
];

/// The clusters of a row, each row for one shape: before a snapshot is taken, and after.
const BEFORE: &str = "-- 11 c22 zz za zu 33 c44 .. -- -- --";
const AFTER: &str = "-- -- -- -- -- -- 55 -- -- 66 zz za";

/// Acts and where in a cluster they begin and end, in sectors from its beginning: beyond it, the next
/// one is touched too.
fn acts(sectors: u64) -> Vec<(Act, u64, u64)> {
    let (end, middle) = (sectors, sectors / 2);
    let mut acts = vec![
        (Act::Write(0x77), 0, end),
        (Act::Zero, 0, end),
        (Act::Punch, 0, end),
        (Act::Write(0x78), end - 1, end + 1),
    ];
    if sectors >= 8 {
        acts.extend([
            (Act::Write(0x79), 0, 1),
            (Act::Write(0x7a), middle - 1, middle + 2),
            (Act::Write(0x7b), end - 1, end),
            (Act::Zero, 1, middle),
            (Act::Punch, middle, end),
            (Act::Punch, middle, end + middle),
        ]);
    }
    acts
}

/// The image, with and without clusters and tables that a snapshot shares.
fn image((options, cluster, _): (&str, u64, bool), snapshot: Option<&str>) -> (Scratch, u64) {
    let s = Scratch::new();
    let rows = acts(cluster / 512).len();
    let is_external = options.contains("data_file");
    let row = |cells: &str| match is_external {
        true => cells.replace('c', ""),
        false => cells.to_owned(),
    };
    let all = |cells: &str| vec![row(cells); rows].join(" ");
    let cells = BEFORE.split_whitespace().count() * rows;
    s.draw_raw("base.raw", cluster as usize, &vec!["aa ab -- ad"; cells / 4].join(" "));
    s.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw cow.qcow2"));
    s.draw("cow.qcow2", cluster as usize, &all(BEFORE));
    if let Some(name) = snapshot {
        s.qemu_img(&format!("snapshot -c {name} cow.qcow2"));
    }
    (s, rows as u64)
}

fn written_beside_qemu(shape: (&str, u64, bool), snapshot: Option<&str>, is_drawn_after: bool) {
    let (s, rows) = image(shape, snapshot);
    let (_, cluster, _) = shape;
    if is_drawn_after {
        s.draw("cow.qcow2", cluster as usize, &vec![AFTER; rows as usize].join(" "));
    }
    let external = shape.0.contains("data_file");
    // QEMU writes to a copy; an external data file is put back between the two.
    let fresh = std::fs::read(s.path("cow.qcow2")).unwrap();
    let fresh_data = external.then(|| std::fs::read(s.path("data.raw")).unwrap());
    let per_row = BEFORE.split_whitespace().count() as u64;
    let mut todo = Vec::new();
    for (row, (act, from, end)) in (0..).zip(acts(cluster / 512)) {
        for cell in 0..per_row {
            let start = (row * per_row + cell) * cluster;
            let end = (start + end * 512).min(rows * per_row * cluster);
            todo.push((act, start + from * 512, end - (start + from * 512)));
        }
    }
    let commands: Vec<String> = todo.iter().map(|(act, at, length)| act.command(*at, *length)).collect();
    s.qemu_io("qcow2", "cow.qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
    let truth = s.guest_bytes("qcow2", "cow.qcow2");
    s.write("cow.qcow2", &fresh);
    if let Some(bytes) = &fresh_data {
        s.write("data.raw", bytes);
    }
    let snapshot_truth = snapshot.map(|name| snapshot_bytes(&s, name));
    let guest = Guest::open(&s, "cow.qcow2");
    for (act, at, length) in &todo {
        guest.act(*act, *at, *length);
    }
    assert!(guest.bytes() == truth, "{shape:?} {snapshot:?} {is_drawn_after}: before a flush");
    guest.writer().flush().unwrap();
    assert!(guest.bytes() == truth, "{shape:?} {snapshot:?} {is_drawn_after}");
    drop(guest);
    s.check_clean("cow.qcow2");
    assert!(
        s.guest_bytes("qcow2", "cow.qcow2") == truth,
        "{shape:?} {snapshot:?} {is_drawn_after}: in the file"
    );
    assert!(snapshot.map(|name| snapshot_bytes(&s, name)) == snapshot_truth, "{shape:?}: the snapshot");
}

fn snapshot_bytes(s: &Scratch, name: &str) -> Vec<u8> {
    s.qemu_img(&format!("convert -f qcow2 -l snapshot.name={name} -O raw cow.qcow2 snapshot.raw"));
    std::fs::read(s.path("snapshot.raw")).unwrap()
}

#[test]
fn each_kind_of_cluster_takes_each_shape_of_a_write_as_in_qemu() {
    for shape in SHAPES {
        written_beside_qemu(shape, None, false);
        if shape.2 {
            written_beside_qemu(shape, Some("s"), false);
            written_beside_qemu(shape, Some("s"), true);
        }
    }
}
