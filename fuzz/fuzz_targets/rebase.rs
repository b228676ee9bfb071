//! A whole rebase of an image in memory, with the invariants as assertions. The first four bytes
//! choose what is asked for, the rest is the image.
//!
//! If the engine takes the image, every view reads as before (I1), also after a cut at some point
//! (I2, I3), and the check is as content as before. If it refuses it, nothing was written.
#![no_main]

mod image;
#[path = "../../mount-tests/memory_file.rs"]
#[allow(dead_code)]
mod memory_file;

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use memory_file::{Journal, MemoryFile, Operation};
use rebasefs::chain::Chain;
use rebasefs::layer::qcow2::check;
use rebasefs::layer::qcow2::repair::{Repair, repair};
use rebasefs::layer::{Format, GuestOffset, Layer, Raw, Reference};
use rebasefs::{Progress, Rebase};

/// How much of a view is read from its beginning, and from its end.
const LOOK: u64 = 512 << 10;
const PIECE: u64 = 64 << 10;

/// What is asked for, a bit each.
mod ask {
    pub const FLATTEN: u8 = 1 << 0;
    pub const UNSAFE: u8 = 1 << 1;
    pub const VERIFY: u8 = 1 << 2;
    /// Damaged refcounts are repaired before: sound images of a shape that no program makes.
    pub const REPAIR: u8 = 1 << 3;
    pub const RECLAIM: u8 = 1 << 4;
    pub const COMPRESS: u8 = 1 << 5;
}

/// The new backing file: the engine opens it by its name.
static NEW: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("rebasefs-fuzz-new-{}", std::process::id()));
    std::fs::write(&path, disk("11 22 -- 33 44 -- 55")).expect("writing the new backing file");
    path
});

fuzz_target!(|bytes: &[u8]| {
    let Some((&[asked, cut, choice, _], image)) = bytes.split_first_chunk::<4>() else { return };
    let file = MemoryFile::new(image.to_vec());
    if let Some(case) = Case::new(&file, asked) {
        case.run(&file, usize::from(cut) << 3 | usize::from(choice) & 7, choice);
    }
});

/// A disk of 12 KiB pieces, a byte each.
fn disk(picture: &str) -> Vec<u8> {
    let byte = |cell: &str| u8::from_str_radix(cell, 16).unwrap_or(0);
    picture.split(' ').flat_map(|cell| vec![byte(cell); 12 << 10]).collect()
}

struct Case {
    asked: u8,
    old: Chain,
    is_sound: bool,
    is_dirty: bool,
    start: Vec<u8>,
    /// The external data file, where the image has one.
    data: MemoryFile,
    truth: Vec<View>,
}

/// A view's bytes, piece by piece; `None` where they cannot be read.
type View = Vec<Option<Vec<u8>>>;

impl Case {
    fn new(file: &MemoryFile, asked: u8) -> Option<Self> {
        let data = MemoryFile::new(disk("-- 77 88 -- 99 aa"));
        let mut image = image::open(file, &data).ok()?;
        if asked & ask::REPAIR != 0 && asked & ask::UNSAFE == 0 {
            repair(&image, Repair::All).ok()?;
            image = image::open(file, &data).expect("a repair leaves what can be opened");
        }
        // With a number of its own: it would be taken for a file of the overlay, and refused.
        let old = MemoryFile::recorded(disk("11 -- 22 33 44 66"), 1, &Journal::default());
        let old: Arc<dyn Layer> = Arc::new(Raw::open(Arc::new(old)));
        let old = image.backing().map_or_else(Chain::default, |_| Chain::new([old]));
        let mut case = Self {
            asked,
            old,
            is_sound: check::check(&image).expect("memory can be read").is_sound(),
            is_dirty: image.is_dirty(),
            start: file.bytes(),
            data,
            truth: Vec::new(),
        };
        case.truth = case.views(&case.start)?;
        Some(case)
    }

    fn run(&self, file: &MemoryFile, cut: usize, choice: u8) {
        let log_start = file.log().len();
        let chain = self.old.under(Arc::new(image::open(file, &self.data).expect("it was opened before")));
        let result = self.rebase(chain);
        if result.is_err() && !(self.is_sound || self.is_dirty && !self.is(ask::UNSAFE)) {
            assert!(file.bytes() == self.start, "refused, and written all the same");
        }
        if result.is_ok() {
            assert!(self.is_sound || self.is_dirty || self.is(ask::UNSAFE));
        }
        self.judge(&file.bytes());
        // Two files lose their writes by themselves: that is a matter for the tests.
        if self.is_sound && self.data.log().is_empty() {
            self.judge(&cut_at(&self.start, &file.log()[log_start..], cut, choice));
        }
    }

    fn is(&self, bit: u8) -> bool {
        self.asked & bit != 0
    }

    fn rebase(&self, chain: Chain) -> rebasefs::Result<()> {
        let rebase = Rebase::of_chain(chain);
        let backing = Reference::new(&*NEW, Format::Raw);
        let mut safe = match (self.is(ask::UNSAFE), self.is(ask::FLATTEN)) {
            (true, true) => return rebase.record_none().run().map(drop),
            (true, false) => return rebase.record_only(backing).run().map(drop),
            (false, true) => rebase.flatten(),
            (false, false) => rebase.onto(backing),
        };
        safe = if self.is(ask::VERIFY) { safe.verify() } else { safe };
        safe = if self.is(ask::RECLAIM) { safe.reclaim() } else { safe };
        safe = if self.is(ask::COMPRESS) { safe.compress() } else { safe };
        safe.run(&Progress::default()).map(drop)
    }

    /// What is read now is what was read before; what could not be read may be readable by now.
    fn judge(&self, bytes: &[u8]) {
        let found = self.views(bytes).expect("what could be opened can be opened");
        assert_eq!(found.len(), self.truth.len());
        for (found, truth) in found.iter().zip(&self.truth) {
            let pieces = found.iter().zip(truth).enumerate();
            for (number, (found, truth)) in pieces.filter(|(_, (_, truth))| truth.is_some()) {
                assert!(found == truth, "guest bytes changed: piece {number}");
            }
        }
        if self.is_sound {
            let image = image::open(&MemoryFile::new(bytes.to_vec()), &self.data)
                .expect("it was opened a moment ago");
            let report = check::check(&image).expect("memory can be read");
            assert!(report.is_sound(), "{:?}", report.messages);
        }
    }

    /// The bytes of the active disk and of each snapshot, over the chain that the header names;
    /// what the overlay holds by itself, where bytes may change.
    fn views(&self, bytes: &[u8]) -> Option<Vec<View>> {
        let file = MemoryFile::new(bytes.to_vec());
        let image = image::open(&file, &self.data).ok()?;
        let named = image.backing().map(|backing| &backing.name);
        let below = match named {
            _ if self.is(ask::UNSAFE) => Chain::default(),
            None => Chain::default(),
            Some(name) if *name == NEW.as_os_str() => Chain::open(&*NEW).expect("it is there"),
            Some(_) => self.old.clone(),
        };
        let snapshots = image.snapshots().ok()?;
        let mut views = vec![look(&below.under(Arc::new(image.clone())))];
        for snapshot in snapshots.iter().take(3) {
            views.push(look(&below.under(Arc::new(image.at_snapshot(snapshot).ok()?))));
        }
        Some(views)
    }
}

fn look(chain: &Chain) -> View {
    let size = chain.virtual_size();
    let cluster = chain.top().and_then(|top| top.as_qcow2()).map_or(PIECE, |top| top.header().cluster_size());
    let piece = cluster.clamp(4096, PIECE);
    let start = (0..size.min(LOOK)).step_by(piece as usize);
    let end = (size.saturating_sub(PIECE).max(size.min(LOOK))..size).step_by(piece as usize);
    let read = |at: u64| {
        let mut bytes = vec![0; piece.min(size - at) as usize];
        chain.read_at(GuestOffset(at), &mut bytes).ok().map(|()| bytes)
    };
    start.chain(end).map(read).collect()
}

/// What a power cut leaves: all that was synced, and of the rest up to the cut what `choice` says.
fn cut_at(start: &[u8], log: &[Operation], cut: usize, choice: u8) -> Vec<u8> {
    let log = &log[..cut % (log.len() + 1)];
    let synced = log.iter().rposition(|operation| *operation == Operation::Sync).map_or(0, |last| last + 1);
    let mut bytes = start.to_vec();
    for (number, operation) in log.iter().enumerate() {
        if number < synced || choice.rotate_left(number as u32) & 1 != 0 {
            operation.apply(&mut bytes);
        }
    }
    bytes
}
