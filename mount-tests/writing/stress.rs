//! Random writes, zeros, holes and syncs by several writers at once, with rebases, cancels and remounts in
//! between, beside a flat file as model.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;

use rebasefs::file::{Access, CacheMode, HostFile, HostOffset, LocalFile};

use crate::mounted::Mounted;
use crate::random_chain::Random;
use crate::scratch::Scratch;

const DISK: usize = 3 << 20;
const WRITERS: usize = 4;
const O_DIRECT: i32 = 0x4000;

/// Options, bytes in which writers take turns along the disk, and whether there is a snapshot.
const SHAPES: [(&str, usize, bool); 5] = [
    ("cluster_size=64k", 40_000, true),
    ("cluster_size=4k", 5000, true),
    ("extended_l2=on,cluster_size=32k", 3000, true),
    ("compat=0.10,cluster_size=16k", 9000, false),
    ("cluster_size=512,refcount_bits=8", 1100, true),
];

/// What one writer has done to his part of the disk.
struct Writer<'a> {
    disk: &'a File,
    /// The same, to punch holes.
    holes: &'a LocalFile,
    random: Random,
    /// He may write to every `WRITERS`th stripe, beginning with this one.
    first: usize,
    stripe: usize,
    /// All of the disk, of which only his stripes are right.
    model: Vec<u8>,
}

impl Writer<'_> {
    /// A range within a stripe of his own.
    fn range(&mut self) -> (usize, usize) {
        let stripes = DISK.div_ceil(self.stripe);
        let mine = stripes.saturating_sub(self.first).div_ceil(WRITERS);
        let start = (self.first + WRITERS * self.random.below(mine as u64) as usize) * self.stripe;
        let end = (start + self.stripe).min(DISK);
        let at = start + self.random.below((end - start) as u64) as usize;
        (at, 1 + self.random.below((end - at) as u64) as usize)
    }

    fn act(&mut self, mount: &Mounted) {
        let (at, length) = self.range();
        match self.random.below(100) {
            0..45 => {
                let byte = self.random.next() as u8;
                let bytes: Vec<u8> = (0..length).map(|n| byte.wrapping_add((n / 100) as u8)).collect();
                self.disk.write_all_at(&bytes, at as u64).unwrap();
                self.model[at..at + length].copy_from_slice(&bytes);
            }
            45..85 => {
                let mut bytes = vec![0; length];
                self.disk.read_exact_at(&mut bytes, at as u64).unwrap();
                assert!(bytes == self.model[at..at + length], "[{at}, +{length}) by writer {}", self.first);
            }
            85..97 => {
                self.holes.punch(HostOffset(at as u64), length as u64).unwrap();
                self.model[at..at + length].fill(0);
            }
            97 => {
                let arguments = [&format!("-zo{at}"), &format!("-l{length}")];
                let zeroed = Command::new("fallocate").args(arguments).arg(self.holes.path()).status();
                assert!(zeroed.expect("running fallocate").success());
                self.model[at..at + length].fill(0);
            }
            98 => self.disk.sync_data().unwrap(),
            _ => drop(mount.says("status")),
        }
    }
}

/// So many operations on each kind of image; returns how many there were, and how many rebases.
fn stress(operations: usize, seed: u64) -> (usize, usize) {
    let (done, rebases) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for (number, (options, stripe, has_snapshot)) in (0..).zip(SHAPES) {
        let s = Scratch::new();
        let mut random = Random::new(seed + number);
        for name in ["one.raw", "two.raw", "three.raw"] {
            let bytes = random.bytes(DISK / 1000, 2);
            s.write(name, &bytes.iter().flat_map(|byte| [*byte; 1000]).collect::<Vec<_>>());
            s.ok("truncate", &format!("-s {DISK} {name}"));
        }
        s.qemu_img(&format!("create -q -f qcow2 -o {options} -b one.raw -F raw cow.qcow2"));
        s.qemu_io(
            "qcow2",
            "cow.qcow2",
            &["write -q -c -P 5 0 1M", "write -q -P 6 1M 512k", "write -q -z 2M 100k"],
        );
        if has_snapshot {
            s.qemu_img("snapshot -c s cow.qcow2");
        }
        let snapshot = has_snapshot.then(|| snapshot_bytes(&s));
        let mut model = s.guest_bytes("qcow2", "cow.qcow2");
        let rounds = 4;
        for round in 0..rounds {
            let mount = Mounted::with(&s, "cow.qcow2", "--rw --threads 4");
            let flags = if round % 2 == 1 { O_DIRECT } else { 0 };
            let mut how = OpenOptions::new();
            how.read(true).write(true).custom_flags(flags);
            let disk = how.open(mount.path("disk.raw")).unwrap();
            let holes = LocalFile::open(&mount.path("disk.raw"), Access::ReadWrite, CacheMode::default());
            let holes = holes.unwrap();
            let is_over = AtomicBool::new(false);
            let models = std::thread::scope(|scope| {
                let writers: Vec<_> = (0..WRITERS)
                    .map(|first| {
                        let random = Random::new(random.next());
                        let mut writer = Writer {
                            disk: &disk,
                            holes: &holes,
                            random,
                            first,
                            stripe,
                            model: model.clone(),
                        };
                        let (mount, done) = (&mount, &done);
                        scope.spawn(move || {
                            for _ in 0..operations / SHAPES.len() / rounds / WRITERS {
                                writer.act(mount);
                                done.fetch_add(1, Ordering::Relaxed);
                            }
                            writer.model
                        })
                    })
                    .collect();
                scope.spawn(|| {
                    let mut random = Random::new(seed + 77 + round as u64);
                    while !is_over.load(Ordering::Relaxed) {
                        rebase(&mount, &mut random);
                        rebases.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let models = writers.into_iter().map(ScopedJoinHandle::join).collect::<Vec<_>>();
                is_over.store(true, Ordering::Relaxed);
                models.into_iter().map(Result::unwrap).collect::<Vec<_>>()
            });
            for (number, part) in model.chunks_mut(stripe).enumerate() {
                let at = number * stripe;
                part.copy_from_slice(&models[number % WRITERS][at..at + part.len()]);
            }
            drop((disk, holes));
            assert!(mount.bytes() == model, "{options}, round {round}: in the mount");
            mount.unmount();
            s.check_clean("cow.qcow2");
            assert!(s.guest_bytes("qcow2", "cow.qcow2") == model, "{options}, round {round}: in the file");
            assert!(
                has_snapshot.then(|| snapshot_bytes(&s)) == snapshot,
                "{options}, round {round}: the snapshot"
            );
        }
    }
    (done.into_inner(), rebases.into_inner())
}

/// A rebase of some kind: to its end, or stopped soon after it began.
fn rebase(mount: &Mounted, random: &mut Random) {
    let name = random.pick(&["one.raw", "two.raw", "three.raw"]);
    let options = random.pick(&["", "", "-c", "--reclaim", "--dry-run"]);
    let is_stopped = random.chance(25);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if is_stopped {
                std::thread::sleep(std::time::Duration::from_millis(2));
                std::fs::write(mount.path("ctl/cancel"), "\n").unwrap();
            }
        });
        let result = std::fs::write(mount.path("ctl/rebase"), format!("{options} -F raw -b {name}\n"));
        if let Err(e) = result {
            assert!(
                is_stopped && e.raw_os_error() == Some(4),
                "{options} {name}: {e}: {}",
                mount.says("status")
            );
        }
    });
}

fn snapshot_bytes(s: &Scratch) -> Vec<u8> {
    s.qemu_img("convert -f qcow2 -l snapshot.name=s -O raw cow.qcow2 snapshot.raw");
    std::fs::read(s.path("snapshot.raw")).unwrap()
}

#[test]
fn many_writers_read_what_they_wrote_whatever_is_rebased_meanwhile() {
    let (done, rebases) = stress(20_000, 1);
    println!("{done} operations, {rebases} rebases, no difference");
}

/// The full number, for a run by hand.
#[test]
#[ignore = "takes minutes: cargo test --release --test mount-tests -- --ignored hundred_thousand"]
fn a_hundred_thousand_operations_make_no_difference() {
    let (done, rebases) = stress(100_000, 1000);
    println!("{done} operations, {rebases} rebases, no difference");
    assert!(done >= 100_000);
}
