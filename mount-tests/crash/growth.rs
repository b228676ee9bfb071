//! Power cuts while the refcount structures grow: new blocks, and a table that moves because it has
//! become too small.

use rebasefs::layer::Layer;

use super::{Case, every_cut, open};
use crate::memory_file::MemoryFile;

/// A refcount block of 512 bytes counts 64 clusters at 64 bits each, the table of one cluster 4096:
/// the overlay takes nearly as many before, and more afterwards.
#[test]
fn no_power_cut_changes_a_byte_while_the_refcount_table_moves() {
    let mut case = Case::new(("cluster_size=512,refcount_bits=64", 64 << 10), Some("new"), false, false);
    let s = &case.scratch;
    // Behind what the rebase is about.
    s.qemu_img("resize -q -f qcow2 cow.qcow2 4M");
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x66 64k 1968k"]);
    case.overlay = std::fs::read(s.path("cow.qcow2")).unwrap();
    case.truth = super::views(&MemoryFile::new(case.overlay.clone()), &case.old);
    let file = MemoryFile::new(case.overlay.clone());
    let before = open(&file);
    case.rebase(&file).unwrap();
    let after = open(&file);
    let table = |image: &rebasefs::layer::qcow2::Qcow2| {
        (image.header().refcount_table_clusters, image.header().refcount_table_offset)
    };
    assert_eq!(before.virtual_size(), after.virtual_size());
    assert!(
        table(&before).0 < table(&after).0 && table(&before).1 != table(&after).1,
        "the table has not moved"
    );
    let mut judged = 0;
    let states = every_cut(&case.overlay, &file.log(), |bytes, what| {
        judged += 1;
        if judged % 500 == 0 {
            case.judge_by_qemu(&bytes);
        }
        case.judge(bytes, what);
    });
    case.judge_by_qemu(&file.bytes());
    println!("{states} states while the refcount table moves, none wrong");
    assert!(states > 500, "only {states} states");
}
