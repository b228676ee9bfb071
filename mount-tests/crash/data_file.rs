//! Power cuts with an external data file: two files, each with its own syncs, and states of both.
//! What is lost of the one has nothing to do with what is lost of the other.

use std::sync::Arc;

use rebasefs::Progress;
use rebasefs::chain::{Chain, Opener};
use rebasefs::file::{Access, HostFile};
use rebasefs::layer::qcow2::testing::{Preamble, TableCache};
use rebasefs::layer::qcow2::{Qcow2, check};
use rebasefs::layer::{Format, GuestOffset, Layer, Reference};

use super::{Torn, moved, subsets};
use crate::memory_file::{Journal, MemoryFile, Operation};
use crate::random_chain::Random;
use crate::scratch::Scratch;

/// The image's own file, and its data file.
const FILES: [&str; 2] = ["cow.qcow2", "data"];

/// An overlay with an external data file over `old`, to be rebased onto `new` (or flattened).
struct Case {
    scratch: Scratch,
    start: [Vec<u8>; 2],
    old: Chain,
    new: Chain,
    /// The new backing file; `None` flattens.
    backing: Option<Reference>,
    truth: Vec<u8>,
}

impl Case {
    /// ```text
    /// old:     11 11 22 -- 33 33 -- 44
    /// new:     11 99 -- 22 33 -- 77 44
    /// overlay: -- -- -- -- -- aa zz --
    /// ```
    fn new(options: &str, unit: usize, target: Option<&str>) -> Self {
        let scratch = Scratch::new();
        let s = &scratch;
        s.draw_raw("old", unit, "11 11 22 -- 33 33 -- 44");
        s.draw_raw("new", unit, "11 99 -- 22 33 -- 77 44");
        s.qemu_img(&format!("create -q -f qcow2 -o {options},data_file=data -b old -F raw cow.qcow2"));
        s.draw("cow.qcow2", unit, "-- -- -- -- -- aa zz --");
        let opener = Opener::new().force_share();
        let open = |name: &str| opener.chain(&s.path(name), None, Access::ReadOnly).unwrap();
        Self {
            start: FILES.map(|name| std::fs::read(s.path(name)).unwrap()),
            old: open("old"),
            new: target.map_or_else(Chain::default, open),
            backing: target.map(|name| Reference::new(s.path(name), Format::Raw)),
            truth: s.guest_bytes("qcow2", "cow.qcow2"),
            scratch,
        }
    }

    fn rebase(&self, [image, data]: [&MemoryFile; 2]) {
        let chain = self.old.under(Arc::new(open(image, data)));
        moved(chain, self.backing.as_ref()).reclaim().run(&Progress::default()).unwrap();
    }

    fn judge(&self, [image, data]: &[Vec<u8>; 2], what: &dyn Fn() -> String) {
        let image = open(&MemoryFile::new(image.clone()), &MemoryFile::new(data.clone()));
        let report = check::check(&image).unwrap();
        assert!(report.is_sound(), "{:?}: {}", report.messages, what());
        let below = match image.backing() {
            Some(backing) if backing.name == "old" => &self.old,
            _ => &self.new,
        };
        let mut found = vec![0; image.virtual_size() as usize];
        below.under(Arc::new(image)).read_at(GuestOffset(0), &mut found).unwrap();
        assert!(found == self.truth, "guest bytes changed: {}", what());
    }

    fn judge_by_qemu(&self, state: &[Vec<u8>; 2]) {
        let s = &self.scratch;
        FILES.iter().zip(state).for_each(|(name, bytes)| s.write(name, bytes));
        assert!(matches!(s.run("qemu-img", "check -q cow.qcow2").code, Some(0 | 3)));
        assert!(self.truth == s.guest_bytes("qcow2", "cow.qcow2"));
    }
}

fn open(image: &MemoryFile, data: &MemoryFile) -> Qcow2 {
    let preamble = Preamble::read(image).unwrap();
    let data: Arc<dyn HostFile> = Arc::new(data.clone());
    Qcow2::open(Arc::new(image.clone()), Some(data), preamble, TableCache::new()).unwrap()
}

/// One of the two files, and what is done to it.
type Either = (usize, Operation);

impl Torn for Either {
    fn torn(&self, random: &mut Random) -> Vec<Self> {
        self.1.torn(random).into_iter().map(|torn| (self.0, torn)).collect()
    }
}

/// Calls `judge` with the states that a cut can leave of both files; returns how many there were.
fn every_cut(
    start: &[Vec<u8>; 2],
    journal: &[Either],
    mut judge: impl FnMut(&[Vec<u8>; 2], &dyn Fn() -> String),
) -> usize {
    let mut random = Random::new(1);
    let mut states = 0;
    let mut synced = start.clone();
    let mut pending: Vec<Either> = Vec::new();
    for (number, (file, operation)) in journal.iter().enumerate() {
        pending.push((*file, operation.clone()));
        for subset in subsets(&pending, &mut random) {
            let mut state = synced.clone();
            subset.iter().for_each(|(file, operation)| operation.apply(&mut state[*file]));
            judge(&state, &|| format!("cut after operation {number} of {}: {subset:#.0?}", journal.len()));
            states += 1;
        }
        if *operation == Operation::Sync {
            let durable = pending.extract_if(.., |(one, _)| one == file);
            durable.for_each(|(file, operation)| operation.apply(&mut synced[file]));
        }
    }
    states
}

#[test]
fn no_power_cut_changes_a_byte_where_data_and_tables_are_two_files() {
    let (mut states, mut judged) = (0, 0);
    for (options, unit) in [
        ("cluster_size=512", 4096),
        ("cluster_size=4k,refcount_bits=64", 16384),
        ("cluster_size=64k", 65536),
        ("cluster_size=64k,lazy_refcounts=on", 65536),
        ("extended_l2=on,cluster_size=16k", 16384),
    ] {
        for target in [Some("new"), None] {
            let case = Case::new(options, unit, target);
            let journal = Journal::default();
            let [image, data] = [0, 1].map(|n| MemoryFile::recorded(case.start[n].clone(), n, &journal));
            case.rebase([&image, &data]);
            let journal = journal.lock().unwrap().clone();
            assert!(journal.iter().any(|(file, operation)| *file == 1 && *operation == Operation::Sync));
            states += every_cut(&case.start, &journal, |state, what| {
                judged += 1;
                if judged % 500 == 0 {
                    case.judge_by_qemu(state);
                }
                case.judge(state, what);
            });
            case.judge_by_qemu(&[image.bytes(), data.bytes()]);
        }
    }
    println!("{states} states of an image and its data file, none wrong");
    assert!(states > 2000, "only {states} states");
}
