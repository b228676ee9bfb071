//! Power cuts and failing disks: whatever is lost of the writes that were not yet synced, the
//! image is whole, and the active disk and every snapshot read as before (invariants I1–I3).
//!
//! A rebase runs on a file in memory that keeps every write and sync. Then the file is rebuilt for
//! every cut point, with all, none and many subsets of the writes since the last sync, whole and
//! torn at sectors of 512 bytes, and opened again.

mod data_file;
mod growth;
mod header_swap;
mod room;

use std::sync::Arc;

use rebasefs::ErrorKind;
use rebasefs::chain::{Chain, Opener};
use rebasefs::file::{Access, HostFile};
use rebasefs::layer::qcow2::testing::{Preamble, TableCache};
use rebasefs::layer::qcow2::{Qcow2, check};
use rebasefs::layer::{Format, GuestOffset, Layer, Reference};
use rebasefs::rebase::SafeRebase;
use rebasefs::{Progress, Rebase};

use crate::memory_file::{MemoryFile, Operation};
use crate::random_chain::Random;
use crate::scratch::Scratch;

/// An overlay over `old`, to be rebased onto `new` (or flattened).
struct Case {
    scratch: Scratch,
    name: String,
    overlay: Vec<u8>,
    old: Chain,
    new: Chain,
    /// The new backing file; `None` flattens.
    backing: Option<Reference>,
    compress: bool,
    verify: bool,
    /// What the active disk and the snapshots read as.
    truth: Vec<Vec<u8>>,
}

impl Case {
    fn new((options, disk): (&str, u64), target: Option<&str>, has_snapshots: bool, compress: bool) -> Self {
        let scratch = Scratch::new();
        let s = &scratch;
        let unit = disk / 16;
        s.qemu_img(&format!("create -q -f raw old {disk}"));
        s.qemu_img(&format!("create -q -f raw new {disk}"));
        let pattern =
            |byte: u8, from: u64, count: u64| format!("write -q -P {byte} {} {}", from * unit, count * unit);
        s.qemu_io("raw", "old", &[&pattern(0x11, 0, 7), &pattern(0x12, 9, 3), &pattern(0x13, 14, 1)]);
        s.qemu_io("raw", "new", &[&pattern(0x11, 0, 2), &pattern(0x22, 2, 2), &pattern(0x12, 7, 6)]);
        if compress {
            // What takes about half a cluster, and crosses the ends of host clusters.
            s.poke("old", 4 * unit, &Random::new(disk).bytes(2 * unit as usize, 4));
        }
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b old -F raw cow.qcow2"));
        s.qemu_io(
            "qcow2",
            "cow.qcow2",
            &[
                &pattern(0x33, 1, 1),
                &pattern(0x12, 7, 2),
                &format!("write -q -P 0x34 {} 1024", 3 * unit + 512),
            ],
        );
        if has_snapshots {
            s.qemu_img("snapshot -c one cow.qcow2");
            s.qemu_io(
                "qcow2",
                "cow.qcow2",
                &[&pattern(0x44, 4, 1), &format!("write -q -P 0x45 {} 512", 5 * unit)],
            );
            s.qemu_img("snapshot -c two cow.qcow2");
            s.qemu_io("qcow2", "cow.qcow2", &[&pattern(0x55, 0, 1)]);
        }
        let overlay = std::fs::read(s.path("cow.qcow2")).unwrap();
        let opener = Opener::new().force_share();
        let open = |name: &str| opener.chain(&s.path(name), None, Access::ReadOnly).unwrap();
        let (old, new) = (open("old"), target.map_or_else(Chain::default, open));
        let backing = target.map(|name| Reference::new(s.path(name), Format::Raw));
        let truth = views(&MemoryFile::new(overlay.clone()), &old);
        assert!(truth[0] == s.guest_bytes("qcow2", "cow.qcow2"));
        let name = format!("{options} onto {target:?}, snapshots: {has_snapshots}, -c: {compress}");
        Self { scratch, name, overlay, old, new, backing, compress, verify: false, truth }
    }

    /// Rebases the overlay that lies in `file`, and reclaims space.
    fn rebase(&self, file: &MemoryFile) -> rebasefs::Result<()> {
        let chain = self.chain_below(file).under(Arc::new(open(file)));
        let mut rebase = moved(chain, self.backing.as_ref()).reclaim();
        rebase = if self.compress { rebase.compress() } else { rebase };
        rebase = if self.verify { rebase.verify() } else { rebase };
        rebase.run(&Progress::default()).map(drop)
    }

    /// The chain that the header in `file` names.
    fn chain_below(&self, file: &MemoryFile) -> &Chain {
        match open(file).backing() {
            Some(backing) if backing.name == "old" => &self.old,
            _ => &self.new,
        }
    }

    /// What a user finds after the power came back: everything as before, leaks at most.
    fn judge(&self, bytes: Vec<u8>, what: &dyn Fn() -> String) {
        let file = MemoryFile::new(bytes);
        let found = views(&file, self.chain_below(&file));
        assert!(found == self.truth, "{}: guest bytes changed: {}", self.name, what());
        let report = check::check(&open(&file)).unwrap();
        assert!(report.is_sound(), "{}: {:?}: {}", self.name, report.messages, what());
    }

    /// The same, with QEMU as judge.
    fn judge_by_qemu(&self, bytes: &[u8]) {
        let s = &self.scratch;
        s.write("cut.qcow2", bytes);
        let code = s.run("qemu-img", "check -q cut.qcow2").code;
        assert!(matches!(code, Some(0 | 3)), "{}: qemu-img check ends with {code:?}", self.name);
        assert!(self.truth[0] == s.guest_bytes("qcow2", "cut.qcow2"), "{}", self.name);
    }
}

/// The rebase of a chain onto this backing file, or onto none.
pub fn moved(chain: Chain, backing: Option<&Reference>) -> SafeRebase {
    let rebase = Rebase::of_chain(chain).opener(Opener::new().force_share());
    match backing {
        Some(backing) => rebase.onto(backing.clone()),
        None => rebase.flatten(),
    }
}

pub fn open(file: &MemoryFile) -> Qcow2 {
    let preamble = Preamble::read(file).unwrap();
    let file: Arc<dyn HostFile> = Arc::new(file.clone());
    Qcow2::open(file, None, preamble, TableCache::new()).unwrap()
}

/// The bytes of the active disk, then those of each snapshot.
pub fn views(file: &MemoryFile, below: &Chain) -> Vec<Vec<u8>> {
    let image = open(file);
    let snapshots = image.snapshots().unwrap();
    let at_snapshots = snapshots.iter().map(|snapshot| image.at_snapshot(snapshot).unwrap());
    std::iter::once(image.clone())
        .chain(at_snapshots)
        .map(|view| {
            let mut bytes = vec![0; view.virtual_size() as usize];
            below.under(Arc::new(view)).read_at(GuestOffset(0), &mut bytes).unwrap();
            bytes
        })
        .collect()
}

/// Calls `judge` with every state of interest that a cut can leave; returns how many there were.
pub fn every_cut(
    start: &[u8],
    log: &[Operation],
    mut judge: impl FnMut(Vec<u8>, &dyn Fn() -> String),
) -> usize {
    every_numbered_cut(start, log, |_, bytes, what| judge(bytes, what))
}

/// The same, with the number of the operation after which it was cut.
pub fn every_numbered_cut(
    start: &[u8],
    log: &[Operation],
    mut judge: impl FnMut(usize, Vec<u8>, &dyn Fn() -> String),
) -> usize {
    let mut random = Random::new(1);
    let mut states = 0;
    let mut synced = start.to_vec();
    let mut epoch_start = 0;
    for (number, operation) in log.iter().enumerate() {
        let pending = &log[epoch_start..=number];
        for (variant, subset) in subsets(pending, &mut random).into_iter().enumerate() {
            let mut bytes = synced.clone();
            subset.iter().for_each(|operation| operation.apply(&mut bytes));
            let what =
                || format!("cut after operation {number} of {}, variant {variant}: {subset:#.0?}", log.len());
            judge(number, bytes, &what);
            states += 1;
        }
        if *operation == Operation::Sync {
            pending.iter().for_each(|operation| operation.apply(&mut synced));
            epoch_start = number + 1;
        }
    }
    states
}

/// What can be stored in part.
trait Torn: Clone {
    /// A write of which some sectors only reached the disk: up to four ways.
    fn torn(&self, random: &mut Random) -> Vec<Self>;
}

/// What can have reached the disk of writes that were not synced: all of them, all but one, one
/// alone, the last one torn at every sector (of many: at some), and random subsets of torn ones.
fn subsets<T: Torn>(pending: &[T], random: &mut Random) -> Vec<Vec<T>> {
    let Some((last, before)) = pending.split_last() else { return Vec::new() };
    let mut found = vec![pending.to_vec(), vec![last.clone()]];
    for _ in 0..8.min(before.len()) {
        let mut without = pending.to_vec();
        without.remove(random.below(before.len() as u64) as usize);
        found.push(without);
    }
    for torn in last.torn(random) {
        found.push([before, std::slice::from_ref(&torn)].concat());
        found.push(vec![torn]);
    }
    for _ in 0..if before.is_empty() { 0 } else { 44 } {
        let some = pending.iter().filter(|_| random.chance(50)).cloned().collect::<Vec<_>>();
        found.push(some.iter().flat_map(|operation| operation.torn(random).into_iter().next()).collect());
    }
    found
}

impl Torn for Operation {
    fn torn(&self, random: &mut Random) -> Vec<Self> {
        let Self::Write(at, bytes) = self else { return Vec::new() };
        let sectors = bytes.len().div_ceil(512) as u64;
        let part = |from: u64, end: u64| {
            let (from, end) = (from as usize * 512, (end as usize * 512).min(bytes.len()));
            Self::Write(at + from as u64, bytes[from..end].to_vec())
        };
        match sectors {
            0 | 1 => vec![self.clone()],
            _ => {
                let middle = 1 + random.below(sectors - 1);
                vec![part(0, middle), part(middle, sectors), part(middle, middle + 1), part(0, 1)]
            }
        }
    }
}

/// Options, and the size of the disk.
const SHAPES: [(&str, u64); 12] = [
    ("compat=0.10", 1 << 20),
    ("compat=0.10,cluster_size=512", 32 << 10),
    ("cluster_size=512", 64 << 10),
    ("cluster_size=512,refcount_bits=64", 128 << 10),
    ("cluster_size=1k,refcount_bits=2", 128 << 10),
    ("cluster_size=4k", 256 << 10),
    ("cluster_size=64k", 1 << 20),
    ("cluster_size=64k,lazy_refcounts=on", 1 << 20),
    ("cluster_size=2M", 4 << 20),
    ("extended_l2=on,cluster_size=16k", 256 << 10),
    ("extended_l2=on,cluster_size=64k", 512 << 10),
    ("compression_type=zstd,cluster_size=4k", 128 << 10),
];

fn cases() -> impl Iterator<Item = Case> {
    let variants =
        [(Some("new"), false, false), (Some("new"), true, false), (None, true, false), (None, true, true)];
    SHAPES.iter().flat_map(move |&shape| {
        variants.map(|(target, has_snapshots, compress)| Case::new(shape, target, has_snapshots, compress))
    })
}

#[test]
fn trap_1_no_power_cut_changes_a_byte_of_disk_or_snapshots() {
    let (mut states, mut judged_by_qemu) = (0, 0);
    for case in cases() {
        let file = MemoryFile::new(case.overlay.clone());
        case.rebase(&file).unwrap();
        states += every_cut(&case.overlay, &file.log(), |bytes, what| {
            // A process takes its time: one state in so many is shown to QEMU as well.
            judged_by_qemu += 1;
            if judged_by_qemu % 500 == 0 {
                case.judge_by_qemu(&bytes);
            }
            case.judge(bytes, what);
        });
        case.judge_by_qemu(&file.bytes());
    }
    println!("{states} states that a power cut can leave, none wrong");
    assert!(states >= 20_000, "only {states} states");
}

#[test]
fn a_disk_that_fails_at_any_write_or_sync_loses_nothing_and_the_rebase_can_be_started_again() {
    let mut faults = 0;
    for case in cases() {
        let healthy = MemoryFile::new(case.overlay.clone());
        case.rebase(&healthy).unwrap();
        for number in 0..healthy.log().len() {
            // A disk that breaks, one that is full (or a quota), one that is full within a write.
            let (fail, kind): (fn(_, _, _) -> _, _) = match number % 3 {
                0 => (MemoryFile::failing_from, ErrorKind::Io),
                1 => (MemoryFile::failing_from, ErrorKind::NoSpace),
                _ => (MemoryFile::failing_halfway_from, ErrorKind::NoSpace),
            };
            let file = fail(case.overlay.clone(), number, kind);
            let Err(error) = case.rebase(&file) else {
                // Which neighbours are one write depends on who comes first.
                assert!(file.log().len() <= number, "{}", case.name);
                continue;
            };
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains("memory.qcow2: the disk is broken at offset 0x4d"), "{error}");
            case.judge(file.bytes(), &|| format!("operation {number} failed"));
            let again = MemoryFile::new(file.bytes());
            case.rebase(&again).unwrap();
            case.judge(again.bytes(), &|| format!("started again after operation {number} failed"));
            faults += 1;
        }
    }
    println!("{faults} faults, nothing lost");
}

#[test]
fn trap_14_verify_sees_what_a_lying_disk_has_stored_and_leaves_the_image_on_its_old_backing_file() {
    let mut lies = 0;
    for mut case in cases() {
        case.verify = true;
        let honest = MemoryFile::new(case.overlay.clone());
        case.rebase(&honest).unwrap();
        case.judge(honest.bytes(), &|| "an honest disk".to_owned());
        // Guest data, not metadata: one value throughout.
        let is_data = |operation: &Operation| matches!(operation, Operation::Write(_, bytes) if bytes[0] != 0 && bytes.iter().all(|b| *b == bytes[0]));
        let log = honest.log();
        for number in (0..log.len()).filter(|&number| is_data(&log[number])).take(3) {
            let file = MemoryFile::lying_at(case.overlay.clone(), number);
            let error = case.rebase(&file).unwrap_err();
            assert!(error.to_string().contains("would read differently at guest offset"), "{error}");
            assert_eq!(open(&file).backing().map(|backing| backing.name.clone()), Some("old".into()));
            lies += 1;
        }
    }
    println!("{lies} lies, all seen");
    assert!(lies > 20);
}
