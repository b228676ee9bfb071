//! The library as other programs use it: what its builders ask for is what happens, and what would do
//! harm is refused.

use std::ops::ControlFlow;

use rebasefs::chain::Opener;
use rebasefs::file::Access;
use rebasefs::layer::{Format, Reference};
use rebasefs::rebase::{Phase, Rebase};
use rebasefs::{Chain, ErrorKind, GuestOffset, Progress};

use crate::scratch::Scratch;

const CLUSTER: usize = 65536;

/// ```text
/// old:     11 11 -- 22 33 33
/// new:     11 99 -- 22 -- 33
/// overlay: -- -- 44 -- -- 33
/// ```
fn drawn() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("old", CLUSTER, "11 11 -- 22 33 33");
    s.draw_raw("new", CLUSTER, "11 99 -- 22 -- 33");
    s.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    s.draw("cow.qcow2", CLUSTER, "-- -- 44 -- -- 33");
    s.qemu_img("convert -O raw cow.qcow2 truth.raw");
    s
}

fn open(s: &Scratch) -> Chain {
    Opener::new().chain(&s.path("cow.qcow2"), None, Access::ReadWrite).unwrap()
}

fn bytes(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.virtual_size() as usize];
    chain.read_at(GuestOffset(0), &mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_planned_is_what_is_done_and_planning_changes_nothing() {
    let s = drawn();
    let before = std::fs::read(s.path("cow.qcow2")).unwrap();
    let rebase = Rebase::new(s.path("cow.qcow2")).onto(Reference::new("new", Format::Raw)).verify();
    let found = rebase.plan().unwrap();
    let ranges: Vec<_> = found.ranges.iter().map(|range| (range.start.0, range.length)).collect();
    assert_eq!(ranges, [(CLUSTER as u64, CLUSTER as u64), (4 * CLUSTER as u64, CLUSTER as u64)]);
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == before);
    let done = rebase.run(&Progress::default()).unwrap();
    assert_eq!((done.report, done.report.reclaimed), (found.report, 0));
    assert!(bytes(&done.chain) == std::fs::read(s.path("truth.raw")).unwrap());
    drop(done);
    s.check_clean("cow.qcow2");
    s.same("cow.qcow2", "truth.raw");
}

#[test]
fn a_chain_goes_on_under_its_new_backing_file_also_when_space_was_reclaimed() {
    let s = drawn();
    let truth = std::fs::read(s.path("truth.raw")).unwrap();
    let opener = Opener::new();
    let chain = opener.chain(&s.path("cow.qcow2"), None, Access::ReadWrite).unwrap();
    let rebase = Rebase::of_chain(chain).opener(opener).onto("new").compress().reclaim();
    let mut last = None;
    let done = rebase
        .run_watched(|standing| {
            last = Some((standing.phase, standing.percent()));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(last, Some((Phase::Done, 100.0)));
    assert_eq!(done.report.reclaimed, CLUSTER as u64);
    assert!(bytes(&done.chain) == truth);
    let again = Rebase::of_chain(done.chain).flatten().run(&Progress::default()).unwrap();
    assert!(bytes(&again.chain) == truth);
    drop(again);
    s.check_clean("cow.qcow2");
    s.same("cow.qcow2", "truth.raw");
}

#[test]
fn nothing_is_reclaimed_from_under_somebody_who_holds_the_chain() {
    let s = drawn();
    let before = std::fs::read(s.path("cow.qcow2")).unwrap();
    let chain = open(&s);
    let rebase = Rebase::of_chain(chain.clone()).onto("new").reclaim();
    let error = rebase.run(&Progress::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == before);
    // Without reclaiming, he reads on by the old tables and sees the same.
    let done = Rebase::of_chain(chain.clone()).onto("new").run(&Progress::default()).unwrap();
    assert!(bytes(&chain) == bytes(&done.chain));
}

#[test]
fn a_reference_is_recorded_only_by_that_name() {
    let s = drawn();
    let image = || Rebase::new(s.path("cow.qcow2"));
    let backing = || open(&s).top().unwrap().backing().cloned();
    let error = image().record_only("moved").run().unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("with its format"), "{error}");
    let chain = image().record_only(Reference::new("moved", Format::Raw)).run().unwrap();
    assert!(chain.broken_off().is_some_and(|why| why.contains("moved")), "{chain:?}");
    drop(chain);
    std::fs::rename(s.path("old"), s.path("moved")).unwrap();
    assert!(bytes(&open(&s)) == std::fs::read(s.path("truth.raw")).unwrap());
    drop(image().record_none().run().unwrap());
    assert_eq!(backing(), None);
    for error in [
        image().onto("").plan().unwrap_err(),
        image().onto("").run(&Progress::default()).unwrap_err(),
        image().record_only("").run().unwrap_err(),
    ] {
        assert!(error.to_string().contains("needs a name (`flatten` is a rebase onto none)"), "{error}");
    }
    s.check_clean("cow.qcow2");
}

#[test]
fn a_mount_stands_as_long_as_the_program_keeps_it() {
    let s = drawn();
    let (mnt, truth) = (s.path("mnt"), std::fs::read(s.path("truth.raw")).unwrap());
    std::fs::create_dir(&mnt).unwrap();
    let is_mounted = || mnt.join("disk.raw").exists();
    let mounted = rebasefs::mount(s.path("cow.qcow2"), &mnt).unwrap();
    assert!(std::fs::read(mnt.join("disk.raw")).unwrap() == truth);
    std::fs::write(mnt.join("ctl/backing"), "new\n").unwrap();
    mounted.unmount().unwrap();
    assert!(!is_mounted());
    s.same("cow.qcow2", "truth.raw");
    let mounted = rebasefs::Mount::new(s.path("cow.qcow2"), &mnt).threads(1).start().unwrap();
    assert!(is_mounted());
    drop(mounted);
    assert!(!is_mounted());
    s.check_clean("cow.qcow2");
}
