//! Backing files that are cut short or fail to read: an error for that read, and never zeros in
//! the place of data.
//!
//! The broken disk is `disk.raw` of another mount, one cluster of which cannot be inflated: the
//! kernel answers EIO there, as for a bad sector, and everywhere else there are data.

use std::fs::File;
use std::io::{Error, Read};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use crate::mounted::{Mounted, is_running, wait_until};
use crate::scratch::Scratch;
use crate::traced::{At, let_go_on};

const CLUSTER: usize = 65536;
const EIO: Option<i32> = Some(5);

/// One cluster of a file, read by itself.
fn cluster(mounted: &Mounted, number: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xee; CLUSTER];
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    disk.read_exact_at(&mut bytes, (number * CLUSTER) as u64).map(|()| bytes)
}

/// ```text
/// base:    11 22 33 44 55 66 77 88
/// new:     11 -- 33 -- -- -- -- --
/// overlay: -- -- -- dd -- -- -- --
/// ```
fn old_and_new(base: &str) -> Scratch {
    let s = Scratch::new();
    s.draw_raw("base.raw", CLUSTER, "11 22 33 44 55 66 77 88");
    s.draw_raw("new.raw", CLUSTER, "11 -- 33 -- -- -- -- --");
    if base == "base.qcow2" {
        s.qemu_img("convert -f raw -O qcow2 base.raw base.qcow2");
    }
    let format = base.rsplit('.').next().unwrap();
    s.qemu_img(&format!("create -q -f qcow2 -b {base} -F {format} cow.qcow2"));
    s.draw("cow.qcow2", CLUSTER, "-- -- -- dd -- -- -- --");
    s
}

#[test]
fn what_a_backing_file_has_lost_is_an_error_and_not_zeros() {
    for base in ["base.raw", "base.qcow2"] {
        let s = old_and_new(base);
        let mounted = Mounted::new(&s, "cow.qcow2");
        let image = std::fs::read(s.path("cow.qcow2")).unwrap();
        let whole = std::fs::read(s.path(base)).unwrap();
        // Clusters 4 to 7, and half of 3, which the overlay holds.
        s.cut(base, 4 * CLUSTER as u64 + 4096);
        for _ in 0..2 {
            for number in [7, 4, 6, 5] {
                assert_eq!(cluster(&mounted, number).unwrap_err().raw_os_error(), EIO, "{base}: {number}");
            }
            for (number, byte) in [(0, 0x11), (1, 0x22), (2, 0x33), (3, 0xdd)] {
                assert!(cluster(&mounted, number).unwrap() == vec![byte; CLUSTER], "{base}: {number}");
            }
        }
        // New has holes where old has lost its data: that is not the same.
        assert_eq!(mounted.rebase("new.raw").unwrap_err().raw_os_error(), EIO, "{base}");
        let error = mounted.status("error");
        assert!(error.contains(&format!("{base}: ")) && error.contains("cut short"), "{error}");
        assert_eq!(mounted.says("backing"), format!("{base}\n"));
        s.write(base, &whole);
        mounted.rebase("new.raw").unwrap();
        let disk = std::fs::read(mounted.path("disk.raw")).unwrap();
        mounted.unmount();
        assert!(disk == s.guest_bytes("qcow2", "cow.qcow2"), "{base}");
        s.write("cow.qcow2", &image);
        assert!(disk == s.guest_bytes("qcow2", "cow.qcow2"), "{base}");
    }
}

/// A rebase that has looked at the first half is stopped while the second half gets lost.
#[test]
fn a_backing_file_cut_short_during_a_rebase_fails_it_and_whole_again_lets_it_complete() {
    let s = old_and_new("base.raw");
    s.draw_raw("new.raw", CLUSTER, "88 77 66 55 44 33 22 11");
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let whole = std::fs::read(s.path("base.raw")).unwrap();
    let size = || s.path("cow.qcow2").metadata().unwrap().len();
    let size_before = size();
    let mut rebase = At { system_call: "pwrite64", number: 1, signal: "STOP" }
        .command(&s.path(""), "rebase -b new.raw -F raw cow.qcow2");
    let mut rebase = rebase.stderr(Stdio::piped()).spawn().unwrap();
    wait_until("something is written", || size() != size_before);
    s.cut("base.raw", 3 * CLUSTER as u64);
    assert_eq!(let_go_on(rebase.id(), &mut rebase).code(), Some(1));
    let mut said = String::new();
    rebase.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("base.raw: ") && said.contains("cut short"), "{said}");
    s.write("base.raw", &whole);
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
    s.rebasefs("rebase -b new.raw -F raw cow.qcow2");
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == before);
    assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)));
}

#[test]
fn seeking_holes_does_not_find_one_where_data_were_lost() {
    let s = old_and_new("base.raw");
    let mounted = Mounted::new(&s, "cow.qcow2");
    s.cut("base.raw", 4 * CLUSTER as u64);
    let said = s.run("cp", &format!("--sparse=auto {} copy", mounted.path("disk.raw").display()));
    assert!(said.code != Some(0) && said.stderr.contains("Input/output error"), "{}", said.stderr);
    assert!(is_running(mounted.server()));
}

/// A disk that holds 11 22 33 44 55 66 and a bad cluster, then 88.
struct BrokenDisk(Mounted);

impl BrokenDisk {
    fn new(s: &Scratch) -> Self {
        s.qemu_img("create -q -f qcow2 broken.qcow2 512k");
        s.draw("broken.qcow2", CLUSTER, "11 22 33 44 55 66 c77 88");
        // Behind header, refcount table and block, L1 and L2 table, and six clusters.
        s.poke("broken.qcow2", 11 * CLUSTER as u64, &[0xff; 16]);
        let mounted = Mounted::new(s, "broken.qcow2");
        assert_eq!(cluster(&mounted, 6).unwrap_err().raw_os_error(), EIO);
        assert!(cluster(&mounted, 7).unwrap() == vec![0x88; CLUSTER]);
        Self(mounted)
    }

    fn name(&self) -> String {
        self.0.path("disk.raw").display().to_string()
    }
}

#[test]
fn a_bad_sector_under_the_mount_is_eio_for_who_reads_it_alone() {
    let s = old_and_new("base.raw");
    let broken = BrokenDisk::new(&s);
    s.qemu_img(&format!("create -q -f qcow2 -b {} -F raw cow.qcow2", broken.name()));
    let mounted = Mounted::new(&s, "cow.qcow2");
    for _ in 0..2 {
        assert_eq!(cluster(&mounted, 6).unwrap_err().raw_os_error(), EIO);
        for (number, byte) in [(0, 0x11), (5, 0x66), (7, 0x88)] {
            assert!(cluster(&mounted, number).unwrap() == vec![byte; CLUSTER], "{number}");
        }
    }
    refused(&s, &mounted, "base.raw", &broken.name());
}

#[test]
fn a_bad_sector_of_the_new_backing_file_fails_the_rebase() {
    let s = old_and_new("base.raw");
    let broken = BrokenDisk::new(&s);
    let before = s.guest_bytes("qcow2", "cow.qcow2");
    let mounted = Mounted::new(&s, "cow.qcow2");
    refused(&s, &mounted, &broken.name(), &broken.name());
    assert!(mounted.bytes() == before);
    mounted.rebase("new.raw").unwrap();
    assert!(mounted.bytes() == before);
}

#[test]
fn a_backing_file_whose_disk_is_gone_altogether_fails_and_the_server_lives() {
    let s = old_and_new("base.raw");
    let broken = BrokenDisk::new(&s);
    s.qemu_img(&format!("create -q -f qcow2 -b {} -F raw cow.qcow2", broken.name()));
    let mounted = Mounted::new(&s, "cow.qcow2");
    broken.0.signal("KILL");
    wait_until("its server is dead", || !is_running(broken.0.server()));
    s.ok("umount", &format!("--lazy {}", broken.0.path("").display()));
    // What no cache holds.
    assert_eq!(cluster(&mounted, 6).unwrap_err().raw_os_error(), EIO);
    assert!(mounted.rebase("base.raw").is_err());
    assert_eq!(mounted.says("backing"), broken.name() + "\n");
    assert!(is_running(mounted.server()));
}

/// A rebase fails with EIO, naming the file at fault; the overlay stands on what it stood on.
fn refused(s: &Scratch, mounted: &Mounted, target: &str, at_fault: &str) {
    let backing = mounted.says("backing");
    let error = mounted.rebase(target).unwrap_err();
    assert_eq!(error.raw_os_error(), EIO, "{error}");
    let error = mounted.status("error");
    assert!(
        error.contains(&format!("{at_fault}: cannot read at offset 0x60000: Input/output error")),
        "{error}"
    );
    assert_eq!(mounted.says("backing"), backing);
    assert!(is_running(mounted.server()));
    s.check_clean("-U cow.qcow2");
}
