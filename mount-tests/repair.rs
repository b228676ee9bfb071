//! `rebasefs check -r`: damaged images are sound afterwards, and every view reads as before.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rebasefs::chain::Chain;
use rebasefs::file::HostFile;
use rebasefs::layer::qcow2::testing::{Preamble, TableCache};
use rebasefs::layer::qcow2::{Qcow2, check, repair};
use serde_json::Value;

use crate::crash::{every_cut, views};
use crate::memory_file::MemoryFile;
use crate::random_chain::Random;
use crate::scratch::{Scratch, rebasefs};

/// Options, cluster size in bytes: all refcount widths, the smallest and largest clusters.
const SHAPES: [(&str, usize); 14] = [
    ("cluster_size=512", 512),
    ("cluster_size=512,refcount_bits=1", 512),
    ("cluster_size=512,refcount_bits=64", 512),
    ("cluster_size=4k,refcount_bits=2", 4096),
    ("cluster_size=4k,refcount_bits=4", 4096),
    ("cluster_size=4k,refcount_bits=8", 4096),
    ("cluster_size=64k,refcount_bits=32", 65536),
    ("cluster_size=64k", 65536),
    ("cluster_size=64k,lazy_refcounts=on", 65536),
    ("cluster_size=2M", 2 << 20),
    ("compat=0.10", 65536),
    ("extended_l2=on,cluster_size=16k", 16384),
    ("compression_type=zstd,cluster_size=4k", 4096),
    ("data_file=data.raw", 65536),
];

/// An image with data, zeros, compressed clusters, a snapshot and a bitmap, where it can have them.
fn image(s: &Scratch, options: &str, cluster: usize) {
    s.qemu_img(&format!("create -q -f qcow2 -o {options} i.qcow2 {}", 40 * cluster));
    s.draw("i.qcow2", cluster, "11 -- 22 zz 33 44 -- -- 55");
    if !options.contains("data_file") {
        let write = |byte: u8, at: usize| format!("write -q -c -P {byte} {} {cluster}", at * cluster);
        s.qemu_io("qcow2", "i.qcow2", &[&write(0x66, 20)]);
        // Two in one host cluster, and a snapshot of both, are more than two bits can count.
        if !options.contains("refcount_bits=2") {
            s.qemu_io("qcow2", "i.qcow2", &[&write(0x67, 21)]);
        }
        if !options.contains("refcount_bits=1") {
            s.qemu_img("snapshot -c before i.qcow2");
            s.draw("i.qcow2", cluster, "-- 77 zz 88");
        }
        if !options.contains("compat=0.10") {
            s.qemu_img("bitmap --add i.qcow2 one");
            s.draw("i.qcow2", cluster, "12 -- -- -- -- -- -- 13");
        }
    }
    s.check_clean("i.qcow2");
}

/// Where the structures of an image lie.
struct Places {
    cluster: u64,
    refcount_table: u64,
    refcount_block: u64,
    l1: u64,
    l2: u64,
    width: u64,
}

impl Places {
    fn of(bytes: &[u8]) -> Self {
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
        let refcount_table = word(48);
        let order = if bytes[7] == 2 { 4 } else { bytes[99] };
        Self {
            cluster: 1 << bytes[23],
            refcount_table,
            refcount_block: word(refcount_table),
            l1: word(40),
            l2: word(word(40)) & 0x00ff_ffff_ffff_fe00,
            width: 1 << order,
        }
    }

    /// Damage to refcounts, their table, or flags: what can always be repaired. Place and bytes.
    fn repairable(&self, random: &mut Random, bytes: &[u8]) -> (u64, Vec<u8>) {
        let some = |random: &mut Random, length: u64| (0..length).map(|_| random.next() as u8).collect();
        let counted = (bytes.len() as u64 / self.cluster * self.width / 8).clamp(1, self.cluster);
        match random.below(5) {
            0 => (self.refcount_block + random.below(counted), some(random, 1)),
            1 => (self.refcount_block, vec![random.pick(&[0, 0xff, 1]); counted as usize]),
            2 => (self.refcount_table + random.below(4) * 8, some(random, 8)),
            3 => {
                let somewhere = random.below(bytes.len() as u64 / self.cluster) * self.cluster;
                (self.refcount_table + random.below(2) * 8, somewhere.to_be_bytes().to_vec())
            }
            _ => {
                let at = self.l2 + random.below(24) * 8;
                let word = u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
                // Only the flag of an entry that leads to a cluster, and not to a compressed one.
                let is_entry = word & (1 << 62) == 0 && word & !(1 << 63 | 1) != 0;
                let at = if is_entry { at } else { self.l1 };
                (at, vec![bytes[at as usize] ^ 0x80])
            }
        }
    }

    /// Damage to anything but the header. Place and bytes.
    fn any(&self, random: &mut Random, bytes: &[u8]) -> (u64, Vec<u8>) {
        let table = random.pick(&[self.refcount_table, self.refcount_block, self.l1, self.l2, self.l2]);
        let at = table + random.below(self.cluster.min(512) / 8) * 8;
        let word = match random.below(4) {
            0 => 0,
            1 => random.next(),
            2 => 1 << 63 | (random.below(bytes.len() as u64 / self.cluster) * self.cluster),
            // Bit 0 means nothing in version 2; to QEMU's check, that is.
            _ => 2 << random.below(63),
        };
        (at, word.to_be_bytes().to_vec())
    }
}

/// What the active disk and the snapshot read as, for QEMU; `None` where it does not open.
fn guest_views(s: &Scratch) -> Vec<Option<Vec<u8>>> {
    ["", "-l snapshot.name=before"]
        .map(|which| {
            let line = format!("convert -U -f qcow2 -O raw {which} i.qcow2 out.raw");
            (s.run("qemu-img", &line).code == Some(0)).then(|| std::fs::read(s.path("out.raw")).unwrap())
        })
        .into()
}

/// `rebasefs check -r …`: exit code and JSON.
fn repaired(s: &Scratch, what: &str) -> (Option<i32>, Value) {
    let ended = s.run(rebasefs(), &format!("check -r {what} --output=json i.qcow2"));
    let json = serde_json::from_str(&ended.stdout);
    (ended.code, json.unwrap_or_else(|e| panic!("{e}: {}{}", ended.stdout, ended.stderr)))
}

#[test]
fn damaged_refcounts_and_flags_are_repaired_in_every_shape() {
    for (number, (options, cluster)) in SHAPES.into_iter().enumerate() {
        let s = Scratch::new();
        image(&s, options, cluster);
        let sound = std::fs::read(s.path("i.qcow2")).unwrap();
        let before = guest_views(&s);
        let mut random = Random::new(number as u64);
        for round in 0..12 {
            let (at, damage) = Places::of(&sound).repairable(&mut random, &sound);
            s.write("i.qcow2", &sound);
            s.poke("i.qcow2", at, &damage);
            let about = format!("{options}, round {round}: {damage:02x?} at {at:#x}");
            let (code, said) = repaired(&s, "all");
            assert_eq!(code, Some(0), "{about}: {said}");
            let ended = s.run("qemu-img", "check -f qcow2 i.qcow2");
            assert_eq!(ended.code, Some(0), "{about}: {}{}", ended.stdout, ended.stderr);
            assert!(guest_views(&s) == before, "{about}");
        }
    }
}

/// Of ours, QEMU must say what we say of it; nothing that could be read may read differently.
#[test]
fn whatever_is_damaged_nothing_readable_changes_and_the_verdict_is_true() {
    let mut sound_again = 0;
    for (number, (options, cluster)) in
        SHAPES.into_iter().enumerate().filter(|(_, (_, size))| *size < 1 << 20)
    {
        let s = Scratch::new();
        image(&s, options, cluster);
        let sound = std::fs::read(s.path("i.qcow2")).unwrap();
        let mut random = Random::new(1000 + number as u64);
        for round in 0..20 {
            let (at, damage) = Places::of(&sound).any(&mut random, &sound);
            s.write("i.qcow2", &sound);
            s.poke("i.qcow2", at, &damage);
            let before = guest_views(&s);
            let about = format!("{options}, round {round}: {damage:02x?} at {at:#x}");
            let (code, said) = repaired(&s, if round % 3 == 0 { "leaks" } else { "all" });
            let theirs = s.run("qemu-img", "check -f qcow2 i.qcow2");
            assert_eq!(code, theirs.code, "{about}: {said}\n{}{}", theirs.stdout, theirs.stderr);
            assert!(guest_views(&s) == before, "{about}");
            sound_again += usize::from(code == Some(0));
        }
    }
    assert!(sound_again > 100, "only {sound_again} of 260 were sound afterwards");
}

#[test]
fn text_json_and_exit_codes_are_those_of_qemu_img() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 i.qcow2 4M");
    s.draw("i.qcow2", 65536, "11 22");
    s.poke("i.qcow2", 0xf_ffff, &[0]);
    s.poke("i.qcow2", 0x20000 + 2 * 9, &[0, 1, 0, 1]);
    std::fs::copy(s.path("i.qcow2"), s.path("damaged")).unwrap();
    std::fs::copy(s.path("i.qcow2"), s.path("theirs.qcow2")).unwrap();
    let text = s.rebasefs("check -r leaks i.qcow2");
    assert!(
        text.starts_with("The following inconsistencies were found and repaired:\n\n    2 leaked clusters\n")
    );
    assert_eq!(text, s.qemu_img("check -r leaks theirs.qcow2"));
    assert!(std::fs::read(s.path("i.qcow2")).unwrap() == std::fs::read(s.path("theirs.qcow2")).unwrap());
    std::fs::copy(s.path("damaged"), s.path("i.qcow2")).unwrap();
    let (code, ours) = repaired(&s, "all");
    std::fs::copy(s.path("damaged"), s.path("i.qcow2")).unwrap();
    let theirs: Value = serde_json::from_str(&s.qemu_img("check -r all --output=json i.qcow2")).unwrap();
    assert_eq!((code, &ours), (Some(0), &theirs));
    assert_eq!(ours["leaks-fixed"], 2);
    assert_eq!(s.rebasefs("check -r all i.qcow2"), s.qemu_img("check -r all i.qcow2"), "nothing left to do");
    s.rebasefs_fails(63, "check -r all -f raw i.qcow2");
    s.rebasefs_fails(1, "check -r everything i.qcow2");
    assert!(s.rebasefs_fails(1, "check -U -r all i.qcow2").contains("--force-share"));
}

#[test]
fn leaks_alone_never_touches_what_is_in_use() {
    let s = Scratch::new();
    image(&s, "cluster_size=4k", 4096);
    let sound = std::fs::read(s.path("i.qcow2")).unwrap();
    let block = Places::of(&sound).refcount_block;
    s.poke("i.qcow2", block, &[0, 1, 0, 0, 0, 0, 0, 5]);
    let (code, said) = repaired(&s, "leaks");
    assert_eq!((code, said["leaks-fixed"].as_u64()), (Some(2), Some(1)), "{said}");
    let after = std::fs::read(s.path("i.qcow2")).unwrap();
    assert_eq!(after[block as usize..][..8], [0, 1, 0, 0, 0, 0, 0, 1]);
    let (code, _) = repaired(&s, "all");
    assert_eq!(code, Some(0));
    assert!(std::fs::read(s.path("i.qcow2")).unwrap() == sound);
}

/// An entry that leads out of the file: the cluster it led to seems to be leaked.
#[test]
fn nothing_is_freed_while_a_pointer_leads_nowhere() {
    let s = Scratch::new();
    image(&s, "cluster_size=64k", 65536);
    let l2 = Places::of(&std::fs::read(s.path("i.qcow2")).unwrap()).l2;
    s.poke("i.qcow2", l2, &(1u64 << 40 | 1 << 63).to_be_bytes());
    let damaged = std::fs::read(s.path("i.qcow2")).unwrap();
    let said = s.rebasefs_fails(2, "check -r all i.qcow2");
    assert!(said.contains("Nothing is freed") && said.contains("cannot be repaired"), "{said}");
    let said = s.rebasefs_fails(2, "check -r leaks i.qcow2");
    assert!(said.contains("Nothing is freed"), "{said}");
    // Of the damage itself QEMU and we think alike.
    assert_eq!(s.run("qemu-img", "check i.qcow2").code, Some(2));
    assert_eq!(damaged.len(), std::fs::read(s.path("i.qcow2")).unwrap().len());
}

/// An L1 entry that leads to the L1 table itself: the L2 table it led to, and all its clusters, seem to be
/// leaked.
#[test]
fn nothing_is_freed_while_a_pointer_leads_to_a_structure() {
    for options in ["cluster_size=64k", "compat=0.10", "extended_l2=on,cluster_size=16k"] {
        let s = Scratch::new();
        let cluster = if options.contains("16k") { 16384 } else { 65536 };
        image(&s, options, cluster);
        let sound = std::fs::read(s.path("i.qcow2")).unwrap();
        let l1 = Places::of(&sound).l1;
        for what in ["leaks", "all"] {
            s.write("i.qcow2", &sound);
            s.poke("i.qcow2", l1, &(l1 | 1 << 63).to_be_bytes());
            let said = s.rebasefs_fails(2, &format!("check -r {what} i.qcow2"));
            assert!(said.contains("Nothing is freed"), "{options}: {said}");
            // Nothing was given to others: with its entry the image is as it was.
            s.poke("i.qcow2", l1, &sound[l1 as usize..][..8]);
            s.rebasefs("check -r all i.qcow2");
            s.check_clean("i.qcow2");
            assert!(std::fs::read(s.path("i.qcow2")).unwrap() == sound, "{options}, {what}");
        }
    }
}

/// With refcounts of one bit a snapshot fails half way, and what it allocated stays allocated.
#[test]
fn leaks_that_qemu_made_are_freed() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 -o refcount_bits=1,cluster_size=512 i.qcow2 64k");
    s.draw("i.qcow2", 512, "11 22 33");
    assert_ne!(s.run("qemu-img", "snapshot -c no i.qcow2").code, Some(0));
    if s.run("qemu-img", "check i.qcow2").code == Some(0) {
        // This QEMU cleans up after itself: a killed one cannot.
        kill_while_writing(&s, "cluster_size=512", "write -P 0x11 0 32k");
    }
    let before = s.guest_bytes("qcow2", "i.qcow2");
    let (code, said) = repaired(&s, "all");
    assert_eq!(code, Some(0), "{said}");
    s.check_clean("i.qcow2");
    assert!(s.guest_bytes("qcow2", "i.qcow2") == before);
}

/// Makes `i.qcow2` and kills qemu-io when it has written to it and not closed it.
fn kill_while_writing(s: &Scratch, options: &str, write: &str) {
    s.qemu_img(&format!("create -q -f qcow2 -o {options} i.qcow2 4M"));
    let flush = ["-c", "flush", "-c", "sigraise 9"];
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-c", write]).args(flush).arg(s.path("i.qcow2"));
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(!status.success(), "qemu-io was not killed");
}

#[test]
fn a_dirty_image_is_repaired_and_its_bit_cleared() {
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=4k,refcount_bits=8"] {
        let s = Scratch::new();
        kill_while_writing(&s, &format!("lazy_refcounts=on,{options}"), "write -P 0x11 64k 1M");
        assert_eq!(std::fs::read(s.path("i.qcow2")).unwrap()[79] & 1, 1, "{options}: not dirty");
        let (code, said) = repaired(&s, "all");
        assert_eq!(code, Some(0), "{options}: {said}");
        assert_eq!(std::fs::read(s.path("i.qcow2")).unwrap()[79] & 1, 0, "{options}: still dirty");
        s.check_clean("i.qcow2");
        s.qemu_io("qcow2", "i.qcow2", &["read -P 0x11 64k 1M", "read -P 0 0 64k"]);
    }
}

#[test]
fn a_rebase_of_a_dirty_image_repairs_it_first() {
    let s = Scratch::new();
    s.draw_raw("new", 65536, "21 22 23 24");
    kill_while_writing(&s, "lazy_refcounts=on", "write -P 0x11 64k 128k");
    // A dry run writes nothing, not even that; what would be copied does not hang on refcounts.
    let dirty = std::fs::read(s.path("i.qcow2")).unwrap();
    let dry = s.run(rebasefs(), "rebase --dry-run -b new -F raw --output json i.qcow2");
    assert!(dry.code == Some(0) && dry.stderr.contains("was not closed properly"), "{}", dry.stderr);
    assert!(std::fs::read(s.path("i.qcow2")).unwrap() == dirty);
    let dry: Value = serde_json::from_str(&dry.stdout).unwrap();
    // Clusters 0 and 3 of the new one.
    assert_eq!((&dry["zeroed"], &dry["copied"]), (&(2 * 65536).into(), &0.into()));
    let said = s.run("env", &format!("RUST_LOG=info {} rebase -b new -F raw i.qcow2", rebasefs()));
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("was not closed properly; repaired"), "{}", said.stderr);
    s.check_clean("i.qcow2");
    s.qemu_io("qcow2", "i.qcow2", &["read -P 0 0 64k", "read -P 0x11 64k 128k", "read -P 0 192k 3904k"]);
}

#[test]
fn a_compressed_cluster_marked_as_writable_in_place_is_mended() {
    let s = Scratch::new();
    image(&s, "cluster_size=64k", 65536);
    let l2 = Places::of(&std::fs::read(s.path("i.qcow2")).unwrap()).l2;
    let before = guest_views(&s);
    let entry = std::fs::read(s.path("i.qcow2")).unwrap()[l2 as usize + 20 * 8];
    assert_eq!(entry & 0xc0, 0x40);
    s.poke("i.qcow2", l2 + 20 * 8, &[entry | 0x80]);
    assert_eq!(repaired(&s, "all").0, Some(0));
    s.check_clean("i.qcow2");
    assert!(guest_views(&s) == before);
}

#[test]
fn the_corrupt_bit_goes_when_all_is_repaired() {
    let s = Scratch::new();
    image(&s, "cluster_size=64k", 65536);
    s.poke("i.qcow2", 79, &[2]);
    repaired(&s, "leaks");
    assert_eq!(std::fs::read(s.path("i.qcow2")).unwrap()[79], 2);
    assert_eq!(repaired(&s, "all").0, Some(0));
    assert_eq!(std::fs::read(s.path("i.qcow2")).unwrap()[79], 0);
}

#[test]
fn an_image_that_is_in_use_is_not_repaired() {
    let s = Scratch::new();
    image(&s, "cluster_size=64k", 65536);
    // Line by line, so that its first line tells that it has the image.
    let mut holder = Command::new("stdbuf");
    holder.args(["-oL", "qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", "-c", "sleep 600000"]);
    let mut holder = holder.arg(s.path("i.qcow2")).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("read 512/512"), "{line}");
    let said = s.rebasefs_fails(1, "check -r all i.qcow2");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(said.contains("in use by another process"), "{said}");
    s.rebasefs("check -r all i.qcow2");
}

/// Whatever a power cut leaves of a repair can be repaired, and reads as before.
#[test]
fn no_power_cut_during_a_repair_makes_it_worse() {
    let mut states = 0;
    let shapes = SHAPES.into_iter().enumerate().filter(|(_, (_, size))| *size < 32 << 10);
    for (number, (options, cluster)) in shapes {
        let s = Scratch::new();
        image(&s, options, cluster);
        let sound = std::fs::read(s.path("i.qcow2")).unwrap();
        let truth = views(&MemoryFile::new(sound.clone()), &Chain::default());
        let mut random = Random::new(2000 + number as u64);
        for round in 0..6 {
            let (at, damage) = Places::of(&sound).repairable(&mut random, &sound);
            let mut damaged = sound.clone();
            damaged[at as usize..][..damage.len()].copy_from_slice(&damage);
            let file = MemoryFile::new(damaged.clone());
            repair::repair(&open(&file), repair::Repair::All).unwrap();
            states += every_cut(&damaged, &file.log(), |bytes, what| {
                let file = MemoryFile::new(bytes);
                let about = || format!("{options}, round {round}, {damage:02x?} at {at:#x}: {}", what());
                assert!(views(&file, &Chain::default()) == truth, "{}", about());
                let again = repair::repair(&open(&file), repair::Repair::All).unwrap();
                assert!(again.left.is_sound() && again.left.leaks == 0, "{}: {:?}", about(), again.left);
                assert!(check::check(&open(&file)).unwrap().is_sound(), "{}", about());
                assert!(views(&file, &Chain::default()) == truth, "{}", about());
            });
        }
    }
    println!("{states} states that a power cut can leave of a repair, all repaired");
    assert!(states > 500, "only {states} states");
}

fn open(file: &MemoryFile) -> Qcow2 {
    let preamble = Preamble::read(file).unwrap();
    let file: Arc<dyn HostFile> = Arc::new(file.clone());
    Qcow2::open(file, None, preamble, TableCache::new()).unwrap()
}
