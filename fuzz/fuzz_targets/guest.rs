//! A guest that writes, with a model in memory: a stream of writes, zeros, flushes, rebases and growth
//! on an image made by QEMU, with space that runs out, an operation that fails, and power cuts.
//!
//! What is acknowledged is read back. What is flushed is in the file, and after a cut each byte is one
//! that it had since the last flush. Snapshots never change, and the check finds no corruption. Where space
//! is all that fails, a flush never does: metadata has its room before a write is acknowledged.
#![no_main]

mod image;
#[path = "../../mount-tests/memory_file.rs"]
#[allow(dead_code)]
mod memory_file;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memory_file::{Journal, MemoryFile, Operation};
use rebasefs::chain::Chain;
use rebasefs::layer::qcow2::Qcow2;
use rebasefs::layer::qcow2::check;
use rebasefs::layer::qcow2::testing::Live;
use rebasefs::layer::{Format, GuestOffset, Layer, Raw, Reference};
use rebasefs::{ErrorKind, Progress, Rebase};

const SECTOR: usize = 512;
/// No disk grows beyond this.
const MAX_SIZE: usize = 1 << 20;
const MAX_ACTIONS: usize = 40;

#[derive(Arbitrary, Debug)]
struct Input {
    shape: u8,
    trouble: Trouble,
    actions: Vec<Action>,
}

/// What the file does until the image is opened again.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Trouble {
    None,
    /// It can grow by so many sectors.
    Room(u16),
    /// This operation fails, and no other.
    Once(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Action {
    Write {
        at: u16,
        length: u16,
        byte: u8,
    },
    Zero {
        at: u16,
        length: u16,
        may_unmap: bool,
    },
    Flush,
    Grow {
        sectors: u8,
    },
    Rebase {
        flattens: bool,
        compresses: bool,
    },
    /// Closes the image, and drops on the way what equals the new backing file.
    RebaseClosed {
        flattens: bool,
        verifies: bool,
    },
    Reopen(Trouble),
    /// What a power cut would leave; the guest goes on as if there had been none.
    Cut {
        at: u16,
        choice: u8,
    },
}

/// `-o` options, the size in KiB, whether there are a snapshot and a bitmap, and compressed clusters.
const SHAPES: [(&str, usize, &str); 12] = [
    ("cluster_size=512", 24, ""),
    ("cluster_size=512,refcount_bits=1", 24, ""),
    ("cluster_size=512,refcount_bits=2", 17, "snapshot"),
    ("cluster_size=512,refcount_bits=64", 24, "snapshot compressed"),
    ("cluster_size=512,compat=0.10", 24, "snapshot"),
    ("cluster_size=4k", 75, "snapshot bitmap"),
    ("cluster_size=4k,refcount_bits=1", 75, "bitmap compressed"),
    ("cluster_size=4k,refcount_bits=64,compression_type=zstd", 50, "compressed"),
    ("cluster_size=4k,lazy_refcounts=on", 50, "snapshot snapshot"),
    ("cluster_size=16k,extended_l2=on", 130, "snapshot bitmap"),
    ("cluster_size=16k,extended_l2=on,refcount_bits=8", 130, "compressed snapshot"),
    ("cluster_size=64k", 280, "bitmap compressed snapshot"),
];

static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| SHAPES.iter().map(made).collect());

fn made(&(options, kibibytes, what): &(&str, usize, &str)) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = |program: &str, line: &str, more: &[&str]| {
        let words = line.split(' ').chain(more.iter().copied());
        let status = Command::new(program).args(words).current_dir(directory.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "{program} {line} {more:?}");
    };
    let (size, unit) = (format!("{kibibytes}k"), kibibytes / 8);
    run("qemu-img", &format!("create -q -u -f qcow2 -o {options} -F raw -b old i {size}"), &[]);
    run("qemu-img", &format!("create -q -f raw old {size}"), &[]);
    let write = |how: &str, at: usize, length: usize| {
        run("qemu-io", "-f qcow2 i -c", &[&format!("write -q {how} {at}k {length}k")]);
    };
    // Compressed clusters are written whole.
    let cluster = [64, 16].into_iter().find(|size| options.contains(&format!("={size}k"))).unwrap_or(4);
    write("-P 0x71", unit, unit);
    for (number, word) in what.split(' ').enumerate() {
        match word {
            "snapshot" => {
                run("qemu-img", &format!("snapshot -c s{number} i"), &[]);
                write("-P 0x72", (1 + number) * unit, unit);
            }
            "bitmap" => run("qemu-img", "bitmap --add i b", &[]),
            "compressed" => write("-c -P 0x73", 4 * unit / cluster * cluster, cluster),
            _ => {}
        }
    }
    std::fs::read(directory.path().join("i")).expect("reading what was made")
}

/// The new backing file: the engine opens it by its name.
static NEW: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("rebasefs-fuzz-guest-{}", std::process::id()));
    std::fs::write(&path, disk("11 22 -- 33 44 -- 55 66 77")).expect("writing the new backing file");
    path
});

static OLD: LazyLock<Arc<dyn Layer>> = LazyLock::new(|| {
    // With a number of its own: it would be taken for a file of the overlay.
    let file = MemoryFile::recorded(disk("11 -- 22 33 44 66 -- 88 99 aa"), 1, &Journal::default());
    Arc::new(Raw::open(Arc::new(file)))
});

/// A disk of 12 KiB pieces, a byte each.
fn disk(picture: &str) -> Vec<u8> {
    let byte = |cell: &str| u8::from_str_radix(cell, 16).unwrap_or(0);
    picture.split(' ').flat_map(|cell| vec![byte(cell); 12 << 10]).collect()
}

/// The image over what its header names.
fn over(image: &Qcow2, top: Arc<dyn Layer>) -> Chain {
    let below = match image.backing().map(|backing| &backing.name) {
        None => Chain::default(),
        Some(name) if *name == NEW.as_os_str() => Chain::open(&*NEW).expect("it is there"),
        Some(_) => Chain::new([OLD.clone()]),
    };
    below.under(top)
}

fn opened(file: &MemoryFile) -> Qcow2 {
    image::open(file, &MemoryFile::new(Vec::new())).expect("it is an image at every instant")
}

fn read(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.virtual_size() as usize];
    chain.read_at(GuestOffset(0), &mut bytes).expect("memory can be read");
    bytes
}

/// The bytes of the active disk, and of each snapshot.
fn views(bytes: Vec<u8>) -> Vec<Vec<u8>> {
    let image = opened(&MemoryFile::new(bytes));
    let mut views = vec![read(&over(&image, Arc::new(image.clone())))];
    for snapshot in image.snapshots().expect("memory can be read") {
        let at_snapshot = image.at_snapshot(&snapshot).expect("memory can be read");
        views.push(read(&over(&image, Arc::new(at_snapshot))));
    }
    views
}

/// Each byte is one that a version has there; behind the end of a version there are zeros.
fn is_one_of(bytes: &[u8], versions: &[&Vec<u8>]) {
    for (number, sector) in bytes.chunks(SECTOR).enumerate() {
        let start = number * SECTOR;
        // Most sectors are one version's, and comparing them as a whole is fast.
        if versions.iter().any(|version| version.get(start..start + sector.len()) == Some(sector)) {
            continue;
        }
        for (at, byte) in (start..).zip(sector) {
            let is_allowed = versions.iter().any(|version| version.get(at).unwrap_or(&0) == byte);
            assert!(is_allowed, "{byte:#x} at {at:#x} was never written there");
        }
    }
}

/// A guest, its disk, and what it knows of it.
struct Guest {
    file: MemoryFile,
    trouble: Trouble,
    /// What the file held when it was opened, and all that was done to it since is in its log.
    start: Vec<u8>,
    chain: Chain,
    /// What the guest reads.
    model: Vec<u8>,
    /// What it has read since the last flush: each byte in the file is one of these.
    history: Vec<Vec<u8>>,
    /// How many operations had been done when that flush ended.
    flushed: usize,
    snapshots: Vec<Vec<u8>>,
}

impl Guest {
    fn new(bytes: Vec<u8>, trouble: Trouble) -> Option<Self> {
        let mut views = views(bytes.clone());
        let model = views.remove(0);
        let file = match trouble {
            Trouble::None => MemoryFile::new(bytes.clone()),
            Trouble::Room(sectors) => {
                let room = bytes.len() + usize::from(sectors % 600) * SECTOR;
                MemoryFile::with_room(bytes.clone(), room as u64)
            }
            Trouble::Once(number) => MemoryFile::failing_once(bytes.clone(), number.into(), ErrorKind::Io),
        };
        let image = opened(&file);
        let live = Live::open(&image).ok()?;
        let chain = over(&image, Arc::new(live));
        let history = vec![model.clone()];
        Some(Self { file, trouble, start: bytes, chain, model, history, flushed: 0, snapshots: views })
    }

    fn live(&self) -> &Live {
        self.chain.live().expect("a guest writes to it")
    }

    /// A range in bytes, within the disk.
    fn range(&self, at: u16, length: u16) -> (usize, usize) {
        let sectors = self.model.len() / SECTOR;
        let at = usize::from(at) % sectors;
        let length = 1 + usize::from(length) % (sectors - at).min(160);
        (at * SECTOR, length * SECTOR)
    }

    fn act(&mut self, action: Action) -> Option<()> {
        match action {
            Action::Write { at, length, byte } => {
                let (at, length) = self.range(at, length);
                let bytes = vec![byte; length];
                let written = self.live().writer().guest().write(&self.chain, GuestOffset(at as u64), &bytes);
                self.has_written(at, length, byte, written);
            }
            Action::Zero { at, length, may_unmap } => {
                let (at, length) = self.range(at, length);
                let place = GuestOffset(at as u64);
                let zeroed = self.live().writer().guest().zero(&self.chain, place, length as u64, may_unmap);
                self.has_written(at, length, 0, zeroed);
            }
            Action::Flush => drop(self.flush()),
            Action::Grow { sectors } => self.grow(self.model.len() + usize::from(sectors) * SECTOR),
            Action::Rebase { flattens, compresses } => {
                let rebase = Rebase::of_chain(self.chain.clone());
                let rebase = match flattens {
                    true => rebase.flatten(),
                    false => rebase.onto(Reference::new(&*NEW, Format::Raw)),
                };
                let rebase = if compresses { rebase.compress() } else { rebase };
                match rebase.run(&Progress::default()) {
                    Ok(done) => self.chain = done.chain,
                    Err(error) => self.is_no_corruption(&error),
                }
            }
            Action::RebaseClosed { flattens, verifies } => {
                self.reopen(self.trouble)?;
                let file = MemoryFile::new(self.file.bytes());
                let image = opened(&file);
                let rebase = Rebase::of_chain(over(&image, Arc::new(image.clone())));
                let rebase = match flattens {
                    true => rebase.flatten(),
                    false => rebase.onto(Reference::new(&*NEW, Format::Raw)),
                };
                let rebase = if verifies { rebase.verify() } else { rebase };
                if let Err(error) = rebase.reclaim().run(&Progress::default()) {
                    self.is_no_corruption(&error);
                }
                let (before, snapshots) = (self.model.clone(), self.snapshots.clone());
                *self = Self::new(file.bytes(), self.trouble)?;
                assert!(self.model == before && self.snapshots == snapshots, "a rebase changed bytes");
            }
            Action::Reopen(trouble) => self.reopen(trouble)?,
            Action::Cut { at, choice } => self.cut(at, choice),
        }
        let found = read(&self.chain);
        let other = found.iter().zip(&self.model).position(|(found, wanted)| found != wanted);
        assert!(found == self.model, "the guest reads what it has not written: {other:?} of {}", found.len());
        Some(())
    }

    /// What was acknowledged is there; of what was not, each byte is the old or the new one.
    fn has_written(&mut self, at: usize, length: usize, byte: u8, result: rebasefs::Result<()>) {
        let mut after = self.model.clone();
        after[at..at + length].fill(byte);
        if let Err(error) = result {
            self.is_no_corruption(&error);
            self.history.push(after.clone());
            let found = read(&self.chain);
            is_one_of(&found, &[&self.model, &after]);
            after = found;
        }
        self.model = after;
        self.history.push(self.model.clone());
    }

    fn grow(&mut self, size: usize) {
        if size > MAX_SIZE {
            return;
        }
        match self.chain.grown(size as u64) {
            Ok(chain) => {
                self.chain = chain;
                self.model.resize(size, 0);
                self.history.push(self.model.clone());
            }
            Err(error) => self.is_no_corruption(&error),
        }
    }

    fn is_no_corruption(&self, error: &rebasefs::Error) {
        assert!(error.kind() != ErrorKind::Corrupt, "{error}");
        let may_fail = !matches!(self.trouble, Trouble::None);
        let is_of_the_file = matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace);
        assert!(may_fail || !is_of_the_file, "nothing fails here: {error}");
    }

    fn flush(&mut self) -> rebasefs::Result<()> {
        if let Err(error) = self.live().writer().flush() {
            assert!(matches!(self.trouble, Trouble::Once(_)), "room was promised that is not there: {error}");
            return Err(error);
        }
        self.history = vec![self.model.clone()];
        self.flushed = self.file.log().len();
        self.judge(self.file.bytes());
        Ok(())
    }

    /// What lies in the file is allowed, the snapshots are what they were, and nothing is corrupt.
    fn judge(&self, bytes: Vec<u8>) {
        let mut found = views(bytes.clone());
        let disk = found.remove(0);
        assert!(found == self.snapshots, "a snapshot has changed");
        assert!(self.history.iter().any(|version| version.len() == disk.len()), "a size it never had");
        is_one_of(&disk, &self.history.iter().rev().collect::<Vec<_>>());
        let report = check::check(&opened(&MemoryFile::new(bytes))).expect("memory can be read");
        assert!(report.is_sound(), "{:?}", report.messages);
    }

    /// What a power cut leaves: all that was synced, and of the rest up to the cut what `choice` says.
    fn cut(&self, at: u16, choice: u8) {
        let log = self.file.log();
        let length = self.flushed + usize::from(at) % (log.len() - self.flushed + 1);
        let log = &log[..length];
        let synced =
            log.iter().rposition(|operation| *operation == Operation::Sync).map_or(0, |last| last + 1);
        let mut bytes = self.start.clone();
        for (number, operation) in log.iter().enumerate() {
            if number < synced || choice.rotate_left(number as u32) & 1 != 0 {
                operation.apply(&mut bytes);
            }
        }
        self.judge(bytes);
    }

    /// Closes the image and opens it again. What a failure has taken is not known any more.
    fn reopen(&mut self, trouble: Trouble) -> Option<()> {
        let (flushed, snapshots) = (self.flush(), self.snapshots.clone());
        self.judge(self.file.bytes());
        let model = flushed.is_ok().then(|| self.model.clone());
        *self = Self::new(self.file.bytes(), trouble)?;
        assert!(self.snapshots == snapshots, "a snapshot has changed");
        assert!(model.is_none_or(|model| model == self.model), "what was flushed is gone");
        Some(())
    }
}

fuzz_target!(|input: Input| {
    let image = &IMAGES[usize::from(input.shape) % IMAGES.len()];
    let Some(mut guest) = Guest::new(image.clone(), input.trouble) else { return };
    for action in input.actions.iter().take(MAX_ACTIONS) {
        if guest.act(*action).is_none() {
            return;
        }
    }
    let _ = guest.reopen(Trouble::None);
});
