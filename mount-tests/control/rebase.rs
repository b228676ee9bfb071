//! `ctl/rebase`: the options of `rebasefs rebase` on an image that is mounted.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::names::refused;
use super::{CLUSTER, backing, mounted_by_nobody, nobody, old_and_new, output_of, uncached, waiting_writer};
use crate::interrupted::large;
use crate::mounted::{Mounted, wait_until};
use crate::scratch::Scratch;
use crate::traced::slow_down;

/// Writes a line to `ctl/rebase`, as a shell does; it must be accepted.
fn asks(mounted: &Mounted, line: &str) {
    let written = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n"));
    assert!(written.is_ok(), "{line}: {written:?}: {}", mounted.says("status"));
}

/// The same, and it must fail; returns the error in `ctl/status`.
fn fails(mounted: &Mounted, line: &str, kind: ErrorKind) -> String {
    let error = std::fs::write(mounted.path("ctl/rebase"), format!("{line}\n")).unwrap_err();
    assert_eq!(error.kind(), kind, "{line}: {error}: {}", mounted.says("status"));
    assert_eq!(mounted.status("state"), "failed");
    mounted.status("error")
}

#[test]
fn a_safe_rebase_with_options_changes_nothing_else() {
    let scratch = old_and_new();
    std::fs::copy(scratch.path("new.raw"), scratch.path("the new.raw")).unwrap();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    let line = "echo \"-F raw --verify -T none -b 'the new.raw'\" > ctl/rebase";
    assert_eq!(mounted.shell(line), (Some(0), String::new()));
    assert_eq!((mounted.says("backing"), mounted.bytes()), ("the new.raw\n".to_owned(), before.clone()));
    assert_eq!(mounted.status("request"), "rebase onto 'the new.raw'");
    assert_eq!(mounted.status("bytes-copied"), (2 * CLUSTER).to_string());
    asks(&mounted, "-b ''");
    assert_eq!(mounted.says("backing"), "");
    mounted.unmount();
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), before);
    scratch.check_clean("cow.qcow2");
}

/// ```text
/// overlay over new: 11 44 -- 22 55 -- 33 88
/// ```
#[test]
fn an_unsafe_rebase_shows_the_new_bytes_at_once() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    // Lets the kernel cache all of it, and keeps it open.
    let (before, held) = (mounted.bytes(), std::fs::File::open(mounted.path("disk.raw")).unwrap());
    asks(&mounted, "-u -F raw -b new.raw");
    let (cached, bytes) = (mounted.bytes(), uncached(&mounted, before.len()));
    assert!(bytes != before && cached == bytes, "the page cache holds what was");
    assert_eq!(mounted.status("state"), "done");
    assert_eq!(mounted.status("request"), "unsafe: rebase onto 'new.raw'");
    assert_eq!(mounted.path("disk.raw").metadata().unwrap().len(), before.len() as u64);
    // And back again.
    asks(&mounted, "-u -b base.raw");
    assert!(mounted.bytes() == before && uncached(&mounted, before.len()) == before);
    asks(&mounted, "-u -F raw -b new.raw");
    drop(held);
    mounted.unmount();
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), bytes);
    assert_eq!(backing(&scratch), ("new.raw".to_owned(), "raw".to_owned()));
    scratch.check_clean("cow.qcow2");
}

/// It may be where it is to be later only; until then its bytes are unknown, not zeros.
#[test]
fn an_unsafe_rebase_onto_a_missing_file_is_recorded_and_what_lies_there_is_an_error() {
    let scratch = old_and_new();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    let error = fails(&mounted, "-u -b later.raw", ErrorKind::NotFound);
    assert!(error.contains("later.raw"), "{error}");
    asks(&mounted, "-u -F raw -b later.raw");
    assert_eq!((mounted.says("backing"), mounted.status("state")), ("later.raw\n".into(), "done".into()));
    assert!(mounted.status("missing").contains("later.raw: cannot open"), "{}", mounted.says("status"));
    assert_eq!(std::fs::read(mounted.path("disk.raw")).unwrap_err().raw_os_error(), Some(5));
    let error = fails(&mounted, "-b new.raw", ErrorKind::NotFound);
    assert!(error.contains("broken off") && error.contains("later.raw"), "{error}");
    scratch.ok("mv", "base.raw later.raw");
    asks(&mounted, "-u -F raw -b later.raw");
    assert_eq!((mounted.bytes(), mounted.status("missing")), (before, String::new()));
}

#[test]
fn a_dry_run_writes_nothing_and_is_what_the_rebase_then_does() {
    let scratch = old_and_new();
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let on_the_command_line = scratch.rebasefs("rebase --dry-run -b new.raw --output json cow.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    assert_eq!(mounted.says("rebase"), "");
    asks(&mounted, "--dry-run -b new.raw");
    assert_eq!(mounted.status("request"), "dry run: rebase onto 'new.raw'");
    let figures = ["missing", "equal", "compared", "copied", "zeroed"]
        .map(|key| mounted.status(&format!("bytes-{key}")));
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let (mut here, mut there) = (json(&mounted.says("rebase")), json(&on_the_command_line));
    assert_eq!(here["filename"], scratch.path("cow.qcow2").to_str().unwrap());
    (here["filename"], there["filename"]) = Default::default();
    assert_eq!(here, there);
    assert_eq!(here["ranges"].as_array().unwrap().len(), 2);
    assert_eq!((mounted.says("backing"), mounted.status("state")), ("base.raw\n".into(), "done".into()));
    assert!(std::fs::read(scratch.path("cow.qcow2")).unwrap() == image);
    asks(&mounted, "-b new.raw");
    for (key, figure) in ["missing", "equal", "compared", "copied", "zeroed"].iter().zip(figures) {
        assert_eq!(mounted.status(&format!("bytes-{key}")), figure, "{key}");
    }
}

/// Longer than a page, which is the size that other control files show.
#[test]
fn the_ranges_of_a_dry_run_can_be_copied_whole() {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", CLUSTER, &"11 -- ".repeat(200));
    scratch.draw_raw("new.raw", CLUSTER, &"22 -- ".repeat(200));
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    asks(&mounted, "--dry-run -b new.raw");
    assert!(mounted.path("ctl/rebase").metadata().unwrap().len() > 4096);
    for line in [
        "cat ctl/rebase > ../copy",
        "cp ctl/rebase ../copy",
        "dd if=ctl/rebase of=../copy bs=512 status=none",
    ] {
        assert_eq!(mounted.shell(line), (Some(0), String::new()));
        assert_eq!(scratch.ok("jq", "-r .ranges|length copy"), "200\n", "{line}");
    }
    assert_eq!(
        mounted.shell("jq -e '.ranges[199].start == 398 * 65536' ctl/rebase >&2"),
        (Some(0), "true\n".into())
    );
}

#[test]
fn an_image_that_cannot_be_written_has_dry_runs_all_the_same() {
    let scratch = old_and_new();
    scratch.ok("chmod", "444 cow.qcow2");
    let _mounted = mounted_by_nobody(&scratch);
    scratch.write("try", b"echo --dry-run -b new.raw > mnt/ctl/rebase; echo -b new.raw > mnt/ctl/rebase; cat mnt/ctl/rebase mnt/ctl/status");
    let said = nobody(&scratch, "bash try");
    assert!(said.contains("\"copied\": 131072"), "{said}");
    assert!(said.contains("error: the image could be opened for reading only"), "{said}");
}

#[test]
fn reclaim_shrinks_the_image_and_no_reader_sees_another_byte() {
    let scratch = Scratch::new();
    let cells = |step: usize| (0..128).map(|n| format!("{:02x}", n % step + 1)).collect::<Vec<_>>().join(" ");
    scratch.draw_raw("base.raw", CLUSTER, &cells(7));
    scratch.draw_raw("new.raw", CLUSTER, &cells(5));
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let expected = mounted.bytes();
    let size = || scratch.path("cow.qcow2").metadata().unwrap().blocks() * 512;
    let (is_over, reads) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert!(uncached(&mounted, expected.len()) == expected);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Readers must end also if something here fails.
        let _over = Raised(&is_over);
        for _ in 0..6 {
            asks(&mounted, "-b new.raw");
            let full = size();
            // All that was copied for new equals base, and is dropped again.
            asks(&mounted, "-b base.raw --reclaim");
            let reclaimed: u64 = mounted.status("bytes-reclaimed").parse().unwrap();
            assert!(reclaimed > 100 * CLUSTER as u64, "{reclaimed}");
            // A table may take up another block of the file system.
            assert!(
                size() + reclaimed < full + CLUSTER as u64,
                "{full} bytes, then {}; {reclaimed} reclaimed",
                size()
            );
        }
        let sofar = reads.load(Ordering::Relaxed);
        wait_until("each reader has read", || reads.load(Ordering::Relaxed) > sofar + 3);
    });
    assert_eq!(mounted.bytes(), expected);
    mounted.unmount();
    assert_eq!(scratch.guest_bytes("qcow2", "cow.qcow2"), expected);
    scratch.check_clean("cow.qcow2");
    println!("{reads:?} reads of the whole disk beside 6 rebases and 6 reclaims");
}

/// A flag that is raised when this is dropped.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn what_is_wrong_with_the_options_is_one_line_in_status() {
    let scratch = old_and_new();
    let image = std::fs::read(scratch.path("cow.qcow2")).unwrap();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for (line, words) in [
        ("", "no backing file given"),
        ("-F raw", "no backing file given"),
        ("-b", "a value is required for '--backing <FILE>'"),
        ("-b 'new.raw", "a quotation mark is not closed"),
        ("--dry-run -u -b new.raw", "cannot be used with"),
        ("--reclaims -b new.raw", "unexpected argument '--reclaims' found"),
        ("-F floppy -b new.raw", "format 'floppy' is not supported"),
        ("-b new.raw cow.qcow2", "'cow.qcow2' has no place in ctl/rebase"),
        ("-p -b new.raw", "-p (--progress) has no place in ctl/rebase"),
        ("-b new.raw\r", "carriage return"),
    ] {
        let error = fails(&mounted, line, ErrorKind::InvalidInput);
        assert!(error.contains(words), "{line}: {error}");
    }
    let error = fails(&mounted, "-F vmdk -b new.raw", ErrorKind::Unsupported);
    assert!(error.contains("format 'vmdk' is not supported"), "{error}");
    let error = fails(&mounted, "-b missing.raw", ErrorKind::NotFound);
    assert!(error.contains("missing.raw"), "{error}");
    assert!(std::fs::read(scratch.path("cow.qcow2")).unwrap() == image);
    // ctl/backing has no options: this is a name.
    refused(&scratch, &mounted, "-b new.raw", "No such file or directory");
}

#[test]
fn trap_14_a_stopped_rebase_says_how_far_it_came_and_goes_on_from_there() {
    let scratch = large();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let before = mounted.bytes();
    slow_down(mounted.server(), "pwrite64", 20);
    let writer = waiting_writer(&mounted, "new.raw");
    let figure = |key: &str| mounted.status(key).parse::<u64>().unwrap_or(0);
    wait_until("something is copied", || figure("bytes-done") > 0);
    assert_eq!(mounted.shell("echo > ctl/cancel").0, Some(0));
    assert!(output_of(writer).contains("Interrupted system call"));
    assert_eq!(mounted.status("state"), "cancelled");
    let (done, total, kept) = (figure("bytes-done"), figure("bytes-total"), figure("bytes-kept"));
    assert!(0 < kept && kept <= done && done < total, "{kept} {done} {total}");
    asks(&mounted, "-b new.raw");
    assert_eq!((figure("bytes-copied"), total), (total - kept, before.len() as u64));
    println!("{kept} of {total} bytes kept, {} copied when it was started again", total - kept);
    assert_eq!(mounted.bytes(), before);
    mounted.unmount();
    scratch.check_clean("cow.qcow2");
}
