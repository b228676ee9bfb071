//! Making a new, empty qcow2 image.
//!
//! Computes where everything lies, writes the tables, and last of all the header: until then the
//! file is no image. Validates what is asked for before the first write.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use super::entry::COPIED;
use super::extension::{Extension, Extensions, kind};
use super::header::{Compression, Header, MAX_BACKING_NAME, V2_LENGTH, autoclear, compatible, incompatible};
use super::refcount::write_refcount;
use super::table::encode_words;
use crate::error::{Error, ErrorKind, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::Reference;

/// Bytes of a version 3 header with compression type and padding.
const V3_FULL_LENGTH: u32 = 112;
/// Names of the feature bits that we know: type (0 incompatible, 1 compatible, 2 autoclear), bit.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
const FEATURE_NAME_LENGTH: usize = 46;

/// How much is set aside for guest data beforehand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every guest cluster has its place in the file, which is a hole.
    Metadata,
    /// The places have space on the file system.
    Falloc,
    /// The places are written with zeros.
    Full,
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// Whether clusters have subclusters.
    pub has_subclusters: bool,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// Whether refcounts may be written late.
    pub has_lazy_refcounts: bool,
    /// How clusters are to be compressed.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<Reference>,
    /// Name of the external data file.
    pub data_file: Option<OsString>,
    /// Whether the external data file is to be a raw image by itself.
    pub is_data_file_raw: bool,
    /// What is set aside.
    pub preallocation: Preallocation,
}

impl Default for Spec {
    /// What QEMU makes if nothing is asked for.
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 16,
            size: 0,
            has_subclusters: false,
            refcount_order: 4,
            has_lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            is_data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

impl Spec {
    /// Refuses what cannot be made, by name.
    ///
    /// # Errors
    /// Names what cannot be had together, or does not fit.
    pub fn validate(&self) -> Result<()> {
        self.validate_version()?;
        let is_preallocated = self.preallocation != Preallocation::Off;
        let impossible = [
            (self.data_file.is_none() && self.is_data_file_raw, "data_file_raw needs data_file"),
            (
                self.backing.is_some() && self.is_data_file_raw,
                "a raw external data file rules out a backing file",
            ),
            (
                self.backing.is_some() && is_preallocated && !self.has_subclusters,
                "with a backing file, preallocation needs extended_l2",
            ),
        ];
        if let Some((_, why)) = impossible.into_iter().find(|(is_so, _)| *is_so) {
            return Err(Error::invalid(why));
        }
        let layout = Layout::of(self);
        layout
            .header(self)
            .validate(|_| None)
            .map_err(|e| e.hint("a disk of this size needs larger clusters: `-o cluster_size=2M`"))?;
        self.header_cluster(&layout).map(drop)
    }

    fn validate_version(&self) -> Result<()> {
        let needs_v3 = [
            (self.has_subclusters, "extended_l2"),
            (self.has_lazy_refcounts, "lazy_refcounts"),
            (self.refcount_order != 4, "refcount_bits other than 16"),
            (self.compression != Compression::Zlib, "compression_type other than zlib"),
            (self.data_file.is_some(), "data_file"),
        ];
        match needs_v3.into_iter().find(|(is_so, _)| *is_so && self.version < 3) {
            Some((_, what)) => Err(Error::invalid(format!("{what} needs compat=1.1 (version 3)"))),
            None => Ok(()),
        }
    }

    /// A raw external data file has its clusters where the guest has them, from the beginning.
    fn has_tables(&self) -> bool {
        self.preallocation != Preallocation::Off || self.is_data_file_raw
    }

    fn extensions(&self) -> Extensions {
        let mut list = Vec::new();
        let mut add = |kind, data: &[u8]| list.push(Extension { kind, data: data.to_vec() });
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            add(kind::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            add(kind::DATA_FILE, name.as_bytes());
        }
        if self.version >= 3 {
            add(kind::FEATURE_NAMES, &feature_names());
        }
        Extensions(list)
    }

    /// Header, extensions, name of the backing file. The table of feature names is left out where
    /// there is no room for it: it is for messages only.
    fn header_cluster(&self, layout: &Layout) -> Result<Vec<u8>> {
        let mut header = layout.header(self);
        let mut extensions = self.extensions();
        let name = self.backing.as_ref().map(|backing| backing.name.as_bytes()).unwrap_or_default();
        if name.len() > MAX_BACKING_NAME {
            let what =
                format!("the backing file name has {} bytes, at most {MAX_BACKING_NAME} fit", name.len());
            return Err(
                Error::new(ErrorKind::NameTooLong, what).hint("a relative or a shorter path would do")
            );
        }
        let room = header.cluster_size() as usize - header.length as usize;
        if extensions.encode().len() + name.len() > room {
            extensions.set(kind::FEATURE_NAMES, None);
        }
        let extensions = extensions.encode();
        if extensions.len() + name.len() > room {
            let what = "header, extensions and backing file name do not fit into one cluster";
            return Err(
                Error::new(ErrorKind::NoSpace, what).hint("use larger clusters: `-o cluster_size=64k`")
            );
        }
        if !name.is_empty() {
            header.backing_offset = u64::from(header.length) + extensions.len() as u64;
            header.backing_size = name.len() as u32;
        }
        let mut cluster = [&header.encode(), &extensions, name].concat();
        cluster.resize(header.cluster_size() as usize, 0);
        Ok(cluster)
    }
}

fn feature_names() -> Vec<u8> {
    let entry = |(kind, bit, name): (u8, u8, &str)| {
        let mut bytes = vec![kind, bit];
        bytes.extend(name.as_bytes());
        bytes.resize(2 + FEATURE_NAME_LENGTH, 0);
        bytes
    };
    FEATURE_NAMES.into_iter().flat_map(entry).collect()
}

/// How many clusters each part takes; the parts follow each other in this order after the header.
struct Layout {
    cluster_size: u64,
    refcount_table: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    fn of(spec: &Spec) -> Self {
        let cluster_size = 1 << spec.cluster_bits;
        let entry_size = if spec.has_subclusters { 16 } else { 8 };
        let guest_clusters = spec.size.div_ceil(cluster_size);
        let l1_entries = guest_clusters.div_ceil(cluster_size / entry_size);
        let has_own_data = spec.has_tables() && spec.data_file.is_none();
        let mut layout = Self {
            cluster_size,
            refcount_table: 1,
            refcount_blocks: 1,
            l1_entries,
            l1: (l1_entries * 8).div_ceil(cluster_size),
            l2: if spec.has_tables() { l1_entries } else { 0 },
            data: if has_own_data { guest_clusters } else { 0 },
        };
        layout.settle((cluster_size * 8) >> spec.refcount_order);
        layout
    }

    /// The refcounts count their own clusters, too.
    fn settle(&mut self, per_block: u64) {
        loop {
            let blocks = self.total().div_ceil(per_block);
            let table = (blocks * 8).div_ceil(self.cluster_size);
            if (blocks, table) == (self.refcount_blocks, self.refcount_table) {
                return;
            }
            (self.refcount_blocks, self.refcount_table) = (blocks, table);
        }
    }

    fn total(&self) -> u64 {
        self.data_start() + self.data
    }

    fn blocks_start(&self) -> u64 {
        1 + self.refcount_table
    }

    fn l1_start(&self) -> u64 {
        self.blocks_start() + self.refcount_blocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2
    }

    /// The length of the file: a last cluster with the L1 table need not be there in full.
    fn file_size(&self) -> u64 {
        match self.l2 {
            0 => self.l1_start() * self.cluster_size + self.l1_entries * 8,
            _ => self.total() * self.cluster_size,
        }
    }

    /// The header, without a backing file. A size beyond the format's limits shows as tables that
    /// are too large.
    fn header(&self, spec: &Spec) -> Header {
        let set = |is_set: bool, bit: u64| if is_set { bit } else { 0 };
        let is_zstd = spec.compression == Compression::Zstd;
        Header {
            version: spec.version,
            backing_offset: 0,
            backing_size: 0,
            cluster_bits: spec.cluster_bits,
            size: spec.size,
            encryption: 0,
            l1_entries: u32::try_from(self.l1_entries).unwrap_or(u32::MAX),
            l1_offset: self.l1_start().saturating_mul(self.cluster_size),
            refcount_table_offset: self.cluster_size,
            refcount_table_clusters: u32::try_from(self.refcount_table).unwrap_or(u32::MAX),
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: set(spec.data_file.is_some(), incompatible::DATA_FILE)
                | set(is_zstd, incompatible::COMPRESSION)
                | set(spec.has_subclusters, incompatible::EXTENDED_L2),
            compatible: set(spec.has_lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: set(spec.is_data_file_raw, autoclear::DATA_FILE_RAW),
            refcount_order: spec.refcount_order,
            length: if spec.version == 2 { V2_LENGTH } else { V3_FULL_LENGTH },
            compression: u8::from(is_zstd),
        }
    }
}

/// Makes the image in `file`, which is taken as empty. `data_file` is the external data file, if
/// the image is to have one. Durable when it returns.
///
/// # Errors
/// What is asked for cannot be made, see [`Spec::validate`]; a file cannot be written. What is there is no
/// image then.
pub fn create(file: &dyn HostFile, data_file: Option<&dyn HostFile>, spec: &Spec) -> Result<()> {
    spec.validate().map_err(|e| e.path(file.path()))?;
    let layout = Layout::of(spec);
    let writing = Writing { file, layout: &layout, spec };
    if let Some(data_file) = data_file {
        data_file.set_size(spec.size)?;
        writing.set_aside(data_file, 0, spec.size)?;
        data_file.sync()?;
    }
    writing.refcounts()?;
    writing.l1()?;
    writing.l2()?;
    if file.size() < layout.file_size() {
        file.set_size(layout.file_size())?;
    }
    if layout.data > 0 {
        writing.set_aside(
            file,
            layout.data_start() * layout.cluster_size,
            layout.data * layout.cluster_size,
        )?;
    }
    file.sync()?;
    file.write_at(HostOffset(0), &spec.header_cluster(&layout)?)?;
    file.sync()
}

struct Writing<'a> {
    file: &'a dyn HostFile,
    layout: &'a Layout,
    spec: &'a Spec,
}

impl Writing<'_> {
    fn at_cluster(&self, cluster: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_at(HostOffset(cluster * self.layout.cluster_size), bytes)
    }

    fn refcounts(&self) -> Result<()> {
        let layout = self.layout;
        let first = layout.blocks_start();
        let blocks = first..first + layout.refcount_blocks;
        let offsets: Vec<u64> = blocks.clone().map(|cluster| cluster * layout.cluster_size).collect();
        let mut table = encode_words(&offsets);
        table.resize((layout.refcount_table * layout.cluster_size) as usize, 0);
        self.at_cluster(1, &table)?;
        let per_block = (layout.cluster_size * 8) >> self.spec.refcount_order;
        for (number, cluster) in blocks.enumerate() {
            let mut block = vec![0; layout.cluster_size as usize];
            let in_use = (layout.total() - number as u64 * per_block).min(per_block);
            (0..in_use).for_each(|index| write_refcount(&mut block, self.spec.refcount_order, index, 1));
            self.at_cluster(cluster, &block)?;
        }
        Ok(())
    }

    /// Written even if it is all zeros: on a block device there may be anything.
    fn l1(&self) -> Result<()> {
        let layout = self.layout;
        let entry = |index| match layout.l2 {
            0 => 0,
            _ => COPIED | ((layout.l2_start() + index) * layout.cluster_size),
        };
        let words: Vec<u64> = (0..layout.l1_entries).map(entry).collect();
        self.at_cluster(layout.l1_start(), &encode_words(&words))
    }

    fn l2(&self) -> Result<()> {
        let layout = self.layout;
        let extra = if self.spec.has_subclusters { 1 } else { 0 };
        let per_table = layout.cluster_size / 8 / (1 + extra as u64);
        let start = if self.spec.data_file.is_some() { 0 } else { layout.data_start() };
        let guest_clusters = self.spec.size.div_ceil(layout.cluster_size);
        for table in 0..layout.l2 {
            let first = table * per_table;
            let clusters = first..guest_clusters.min(first + per_table);
            let words = clusters.flat_map(|cluster| {
                // A subcluster that nothing was written to stays unallocated: the bitmap is empty.
                let word = COPIED | ((start + cluster) * layout.cluster_size);
                std::iter::once(word).chain(std::iter::repeat_n(0, extra))
            });
            let mut bytes = encode_words(&words.collect::<Vec<u64>>());
            bytes.resize(layout.cluster_size as usize, 0);
            self.at_cluster(layout.l2_start() + table, &bytes)?;
        }
        Ok(())
    }

    fn set_aside(&self, file: &dyn HostFile, at: u64, length: u64) -> Result<()> {
        match self.spec.preallocation {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => file.allocate(HostOffset(at), length),
            Preallocation::Full => write_zeros(file, at, length),
        }
    }
}

/// Writes zeros, not holes.
pub(crate) fn write_zeros(file: &dyn HostFile, at: u64, length: u64) -> Result<()> {
    const CHUNK: u64 = 2 << 20;
    let zeros = vec![0; CHUNK.min(length) as usize];
    (0..length).step_by(CHUNK as usize).try_for_each(|done| {
        let now = CHUNK.min(length - done) as usize;
        file.write_at(HostOffset(at + done), &zeros[..now])
    })
}
