//! Random chains from a seed: formats, versions, cluster sizes, disk sizes, and what is written,
//! zeroed, discarded and compressed in each layer.
//!
//! The same seed makes the same chain. A layer costs two processes, a raw one none.

use std::os::unix::fs::FileExt;

use crate::scratch::Scratch;

/// Pseudo-random numbers: the same ones for the same seed (the SplitMix64 sequence).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Bytes of which the lowest `bits` (1 to 8) are random and the others zero.
    pub fn bytes(&mut self, length: usize, bits: u32) -> Vec<u8> {
        (0..length).map(|_| (self.next() >> (64 - bits)) as u8).collect()
    }

    /// A number from 0 to `end` − 1.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True so many times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A layer as it was made.
#[derive(Clone, Debug)]
pub struct Image {
    /// File name in the scratch directory.
    pub name: String,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// Virtual size in bytes.
    pub size: u64,
    /// Cluster size in bytes; a sector for raw.
    pub cluster: u64,
}

/// Makes `depth` layers on top of `below`, named `PREFIX0`, `PREFIX1` … from the bottom. Top first.
/// `size` is about how large the disks are, in bytes.
pub fn grow(
    s: &Scratch,
    random: &mut Random,
    prefix: &str,
    below: Option<&Image>,
    depth: usize,
    size: u64,
) -> Vec<Image> {
    let mut layers: Vec<Image> = Vec::new();
    for number in 0..depth {
        let name = format!("{prefix}{number}");
        let size = random_size(random, size);
        let layer = match layers.last().or(below) {
            None if random.chance(50) => raw(s, random, &name, size),
            below => qcow2(s, random, &name, size, below),
        };
        layers.push(layer);
    }
    layers.reverse();
    layers
}

/// Mostly `size`; else shorter or longer, by any number of sectors.
fn random_size(random: &mut Random, size: u64) -> u64 {
    match random.below(10) {
        0..6 => size,
        6..8 => (random.below(size) / 512).max(1) * 512,
        _ => size + random.below(size) / 512 * 512,
    }
}

/// A raw file with some data and some holes.
pub fn raw(s: &Scratch, random: &mut Random, name: &str, size: u64) -> Image {
    let name = format!("{name}.raw");
    let file = std::fs::File::create(s.path(&name)).expect("creating a raw file");
    file.set_len(size).expect("sizing a raw file");
    for _ in 0..random.below(12) {
        let (at, length) = range(random, size, 512);
        let byte = random.pick(&PATTERNS);
        file.write_all_at(&vec![byte; length as usize], at).expect("writing a raw file");
    }
    Image { name, format: "raw", size, cluster: 512 }
}

/// A qcow2 image over `below`, with some of everything.
pub fn qcow2(s: &Scratch, random: &mut Random, name: &str, size: u64, below: Option<&Image>) -> Image {
    let name = format!("{name}.qcow2");
    let cluster: u64 = random.pick(&[512, 1024, 4096, 4096, 16384, 65536, 65536, 65536, 1 << 20, 2 << 20]);
    let options = options(random, cluster);
    let backing = below.map_or(String::new(), |below| format!("-u -F {} -b {}", below.format, below.name));
    s.qemu_img(&format!("create -q -f qcow2 -o {options} {backing} {name} {size}"));
    let image = Image { name, format: "qcow2", size, cluster };
    write_into(s, random, &image);
    image
}

fn options(random: &mut Random, cluster: u64) -> String {
    let mut options = format!("cluster_size={cluster}");
    if random.chance(25) {
        return options + ",compat=0.10";
    }
    if cluster >= 16384 && random.chance(35) {
        options += ",extended_l2=on";
    }
    if random.chance(30) {
        options += &format!(",refcount_bits={}", random.pick(&[1, 2, 4, 8, 32, 64]));
    }
    if random.chance(30) {
        options += ",compression_type=zstd";
    }
    if random.chance(20) {
        options += ",lazy_refcounts=on";
    }
    options
}

/// Few values, zero among them, so that layers are equal here and there.
const PATTERNS: [u8; 5] = [0x00, 0x11, 0x22, 0x33, 0x44];

/// What a guest does with its disk. Also for an image that has been written to before: compressed
/// clusters are written first, and only by this function, since nothing can be overwritten with them.
fn write_into(s: &Scratch, random: &mut Random, image: &Image) {
    let mut commands: Vec<String> = Vec::new();
    let mut compressed: Vec<u64> =
        (0..random.below(4)).map(|_| random.below(image.size.div_ceil(image.cluster))).collect();
    compressed.sort_unstable();
    compressed.dedup();
    for at in compressed.into_iter().map(|number| number * image.cluster) {
        let length = image.cluster.min(image.size - at);
        commands.push(format!("write -q -c -P {} {at} {length}", random.pick(&PATTERNS)));
    }
    commands.extend(guest_writes(random, image));
    if !commands.is_empty() {
        s.qemu_io("qcow2", &image.name, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// qemu-io commands of a guest that writes, zeroes and discards here and there.
pub fn guest_writes(random: &mut Random, image: &Image) -> Vec<String> {
    let count = random.below(14);
    let command = |random: &mut Random| {
        let unit = random.pick(&[512, image.cluster]);
        let (at, length) = range(random, image.size, unit);
        match random.below(10) {
            0..6 => format!("write -q -P {} {at} {length}", random.pick(&PATTERNS)),
            6 => format!("write -q -z {at} {length}"),
            7 => format!("write -q -z -u {at} {length}"),
            _ => format!("discard -q {at} {length}"),
        }
    };
    (0..count).map(|_| command(random)).collect()
}

/// A range of the disk, at most 256 KiB or two units long, that begins at a multiple of `unit`.
fn range(random: &mut Random, size: u64, unit: u64) -> (u64, u64) {
    let at = random.below(size.div_ceil(unit)) * unit;
    let units = 1 + random.below((256 << 10) / unit + 2);
    (at, (units * unit).min(size - at))
}
