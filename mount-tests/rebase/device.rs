//! An overlay that lies on a block device: what a device cannot do, no rebase needs.

use crate::scratch::{LoopDevice, Scratch, rebasefs};

/// An overlay with clusters of 512 bytes on a device with sectors of this size. The first half of
/// it equals the new backing file, and of the second half two clusters of three do.
fn reclaimed(sector: &str) -> (Scratch, LoopDevice, u64) {
    let s = Scratch::new();
    let bytes: Vec<u8> = (0..400 << 10).map(|at: usize| (at / 512) as u8 | 1).collect();
    let old = s.path("old").display().to_string();
    let new = s.path("new").display().to_string();
    s.write("old", &vec![0x77; bytes.len()]);
    s.write("new", &bytes);
    s.write("disk", &vec![0x55; 2 << 20]);
    let device = LoopDevice::with(&s.path("disk"), &["--sector-size", sector]);
    s.qemu_img(&format!("create -q -f qcow2 -o cluster_size=512 -b {old} -F raw made.qcow2"));
    s.qemu_img("convert -n -f raw -O qcow2 new made.qcow2");
    let writes: Vec<String> =
        (400..800).step_by(3).map(|cluster| format!("write -q -P 0x99 {} 512", cluster * 512)).collect();
    s.qemu_io("qcow2", "made.qcow2", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    let image = std::fs::read(s.path("made.qcow2")).unwrap();
    std::fs::write(device.path(), image).unwrap();
    let before = s.guest_bytes("qcow2", device.path());
    let ended = s.run(rebasefs(), &format!("rebase --reclaim -b {new} -F raw {}", device.path()));
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{sector}");
    assert!(s.guest_bytes("qcow2", device.path()) == before, "{sector}: bytes have changed");
    s.check_clean(device.path());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(s.path("disk")).unwrap());
    (s, device, blocks * 512)
}

#[test]
fn clusters_that_are_smaller_than_a_sector_are_reclaimed() {
    for sector in ["512", "4096"] {
        let (_s, _device, allocated) = reclaimed(sector);
        // The first half of the disk was one run of clusters.
        assert!(allocated < (2 << 20) - (150 << 10), "{sector}: {allocated} bytes are still allocated");
    }
}
