//! Tables and extents: an image from bytes, walked and read in all its views; bitmaps, the check,
//! `map` and `info`.
#![no_main]

mod image;
#[path = "../../mount-tests/memory_file.rs"]
#[allow(dead_code)]
mod memory_file;

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use memory_file::MemoryFile;
use rebasefs::chain::Chain;
use rebasefs::chain::info::ImageInfo;
use rebasefs::layer::qcow2::testing::data_cluster;
use rebasefs::layer::qcow2::{Qcow2, check};
use rebasefs::layer::{Detail, GuestOffset, Layer};

/// So many extents of a view are looked at, and one is read up to so many bytes.
const EXTENTS: usize = 500;
const READ: u64 = 4096;

fuzz_target!(|bytes: &[u8]| {
    let file = MemoryFile::new(bytes.to_vec());
    let Ok(image) = image::open(&file, &MemoryFile::new(vec![0x77; 65536])) else { return };
    walk(&image);
    for snapshot in image.snapshots().unwrap_or_default().iter().take(4) {
        if let Ok(view) = image.at_snapshot(snapshot) {
            walk(&view);
        }
    }
    for bitmap in image.bitmaps().unwrap_or_default() {
        let _ = data_cluster(bitmap.table_offset, image.header());
    }
    let report = check::check(&image).expect("memory can be read");
    assert!(report.messages.len() <= 100);
    let _ = ImageInfo::of(&image);
});

fn walk(image: &Qcow2) {
    let chain = Chain::new([Arc::new(image.clone()) as Arc<dyn Layer>]);
    let size = chain.virtual_size();
    let mut at = GuestOffset(0);
    for _ in 0..EXTENTS {
        if at.0 >= size {
            break;
        }
        let Ok(owned) = chain.extent_at(at, size - at.0, Detail::Holes) else {
            at = at + image.header().cluster_size();
            continue;
        };
        let length = owned.extent.length;
        assert!(length >= 1 && length <= size - at.0, "{owned:?} at {at:#x}");
        let _ = image.place_at(at, length);
        let _ = chain.read_at(at, &mut vec![0; length.min(READ) as usize]);
        at = at + length;
    }
    for entry in chain.map(0, size).take(EXTENTS) {
        if entry.is_err() {
            break;
        }
    }
}
