//! Random chains, each from its seed, rebased by us and by qemu-img side by side.

use super::backing_of;
use crate::random_chain::{Image, Random, grow, qcow2};
use crate::scratch::{Scratch, rebasefs};

/// An overlay on a random chain, and what to rebase it onto.
struct Case {
    seed: u64,
    scratch: Scratch,
    overlay: Image,
    target: Option<Image>,
    has_snapshot: bool,
    compress: bool,
}

impl Case {
    /// Old and new chain have nothing, a common base, or all but the upper layers in common.
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new();
        let s = &scratch;
        let mut random = Random::new(seed);
        let size = random.pick(&[100_352, 1 << 20, 2 << 20, 3 << 20]);
        let depth = random.below(3) as usize;
        let base = grow(s, &mut random, "base", None, depth, size);
        let depth = random.below(3) as usize;
        let old = grow(s, &mut random, "old", base.first(), depth, size);
        let overlay = qcow2(s, &mut random, "cow", size, old.first().or(base.first()));
        // Narrow refcounts allow none; QEMU finds that out late, and leaks a cluster.
        let has_snapshot = random.chance(30)
            && s.run("qemu-img", &format!("snapshot -c one {}", overlay.name)).code == Some(0);
        s.run("qemu-img", &format!("check -q -r leaks {}", overlay.name));
        if has_snapshot {
            let writes = crate::random_chain::guest_writes(&mut random, &overlay);
            if !writes.is_empty() {
                s.qemu_io("qcow2", &overlay.name, &writes.iter().map(String::as_str).collect::<Vec<_>>());
            }
        }
        let target = match random.below(10) {
            0 => None,
            // Onto an ancestor, or onto the same file again.
            1..4 => old.iter().chain(&base).nth(random.below(4) as usize).cloned(),
            4..6 => grow(s, &mut random, "new", None, 1, size).into_iter().next(),
            _ => grow(s, &mut random, "new", base.first(), 2, size).into_iter().next(),
        };
        let compress = random.chance(30);
        Self { seed, scratch, overlay, target, has_snapshot, compress }
    }

    fn arguments(&self, image: &str) -> Vec<String> {
        let target = match &self.target {
            Some(target) => vec!["-b", &target.name, "-F", target.format],
            None => vec!["-b", ""],
        };
        let compress = if self.compress { &["-c"][..] } else { &[] };
        ["rebase"]
            .iter()
            .chain(compress)
            .chain(&target)
            .chain(&[image])
            .map(|&word| word.to_owned())
            .collect()
    }

    fn run(&self, program: &str, image: &str) -> Option<i32> {
        let arguments = self.arguments(image);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match program {
            // qemu-img may crash or never end where ours must not (traps 3, 4 and 18).
            "qemu-img" => self.scratch.run_args("timeout", &[&["20", "qemu-img"], &*arguments].concat()).code,
            _ => self.scratch.run_args(program, &arguments).code,
        }
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        self.has_snapshot.then(|| {
            let name = &self.overlay.name;
            self.scratch.qemu_img(&format!("convert -U -l snapshot.name=one -O raw {name} one.raw"));
            std::fs::read(self.scratch.path("one.raw")).unwrap()
        })
    }

    /// In whole clusters: which subcluster of the last one was written last is chance.
    fn size_of(&self, image: &str) -> u64 {
        let bytes = std::fs::metadata(self.scratch.path(image)).unwrap().len();
        bytes.next_multiple_of(self.overlay.cluster)
    }

    /// Our result is right by itself, and no worse than QEMU's where QEMU has one.
    fn judge(&self) -> bool {
        let (s, ours, context) = (&self.scratch, self.overlay.name.as_str(), self.describe());
        let before = (s.guest_bytes("qcow2", ours), self.snapshot());
        std::fs::copy(s.path(ours), s.path("qemu.qcow2")).unwrap();
        s.check_clean("qemu.qcow2");
        assert_eq!(self.run(rebasefs(), ours), Some(0), "{context}");
        assert!(before.0 == s.guest_bytes("qcow2", ours), "guest bytes changed: {context}");
        assert!(before.1 == self.snapshot(), "the snapshot changed: {context}");
        s.check_clean(ours);
        // QEMU may also succeed and show other bytes (trap 16).
        if self.run("qemu-img", "qemu.qcow2") != Some(0) || before.0 != s.guest_bytes("qcow2", "qemu.qcow2") {
            return false;
        }
        assert_eq!(backing_of(s, ours), backing_of(s, "qemu.qcow2"), "{context}");
        // QEMU does nothing for snapshots, which costs no space.
        if !self.has_snapshot {
            let (ours, theirs) = (self.size_of(ours), self.size_of("qemu.qcow2"));
            // A cluster that is not compressed begins at a multiple of its size, and what a gap
            // before it can take depends on who of the workers comes first.
            let more = if self.compress { 2 * self.overlay.cluster + theirs / 64 } else { 0 };
            assert!(ours <= theirs + more, "{ours} bytes, QEMU's {theirs}: {context}");
        }
        true
    }

    fn describe(&self) -> String {
        let files = self.scratch.run("ls", "").stdout.replace('\n', " ");
        let Self { seed, overlay, target, compress, .. } = self;
        format!("seed {seed}: {overlay:?} onto {target:?}, -c: {compress}, among {files}")
    }
}

fn seeds(seeds: std::ops::Range<u64>) {
    let compared = seeds.clone().filter(|&seed| Case::new(seed).judge()).count();
    // QEMU crashes on a few of them only.
    assert!(compared * 10 > seeds.count() * 8, "qemu-img succeeded on {compared} only");
}

#[test]
fn two_hundred_random_rebases_beside_qemu_img_seeds_0_to_99() {
    seeds(0..100);
}

#[test]
fn two_hundred_random_rebases_beside_qemu_img_seeds_100_to_199() {
    seeds(100..200);
}

/// Not in CI: `REBASEFS_SEEDS=1000..3000 cargo test --test mount-tests more_random -- --ignored`.
#[test]
#[ignore = "takes many minutes; choose seeds with REBASEFS_SEEDS"]
fn more_random_rebases_beside_qemu_img() {
    let range = std::env::var("REBASEFS_SEEDS").unwrap_or_else(|_| "1000..3000".to_owned());
    let (start, end) = range.split_once("..").expect("REBASEFS_SEEDS is FIRST..END");
    seeds(start.parse().expect("a number")..end.parse().expect("a number"));
}
