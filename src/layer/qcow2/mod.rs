//! qcow2, versions 2 and 3: reading.
//!
//! Owns what an image is when it is open: header, extensions, one L1 table (of the active disk or
//! of an internal snapshot), and how a guest offset becomes an extent. Opening costs the header
//! and the L1 table. The parts:
//!
//! | file | what |
//! |---|---|
//! | `header`, `extension`, `preamble`, `entry`, `compressed`, `bitmap` | what bytes mean; pure, but for reading the header cluster |
//! | `table`, `l1`, `snapshot` | reading tables |
//! | `refcount`, `writer` | writing, in the order of invariants I2 and I3 |
//! | `live` | an image that is being written, as a layer |
//! | `create` | making a new image |
//! | `references`, `counts`, `stored`, `check` | who points where, and whether the refcounts say so |
//! | `repair` | making them say so |

pub(crate) mod bitmap;
pub mod check;
mod compressed;
mod counts;
pub mod create;
mod entry;
pub(crate) mod extension;
pub(crate) mod header;
mod l1;
mod live;
mod preamble;
mod refcount;
mod references;
pub mod repair;
mod room;
mod snapshot;
mod stored;
pub(crate) mod table;
mod writer;

pub use bitmap::Bitmap;
pub use header::{Compression, Header};
pub(crate) use live::{Hold, Live};
pub(crate) use preamble::Preamble;
pub use snapshot::Snapshot;
pub(crate) use writer::Writer;

/// What the tests and fuzz targets of this repository use of the rest. Promises nothing.
#[doc(hidden)]
pub mod testing {
    pub use super::bitmap::data_cluster;
    pub use super::compressed::{deflate, inflate};
    pub use super::extension::{Extension, Extensions};
    pub use super::header::DECODED_LENGTH;
    pub use super::live::Live;
    pub use super::preamble::Preamble;
    pub use super::table::TableCache;
    pub use super::writer::Writer;
}

use std::sync::Arc;

use self::bitmap::Directory;
use self::entry::{Cluster, L2Entry, SUBCLUSTERS, Standard, State};
use self::extension::kind;
use self::header::{autoclear, incompatible};
use self::l1::L1Table;
use self::snapshot::{Fault, SnapshotTable};
use self::table::{L2Slice, SLICE_BYTES, TableCache};
use self::writer::Staged;
use super::{Compressed, Detail, Extent, ExtentKind, Format, GuestOffset, Layer, Reference};
use crate::error::{Context, Error, Result};
use crate::file::{HostFile, HostOffset};

/// A qcow2 image, opened for reading one of its views: the active disk or an internal snapshot.
#[derive(Clone, Debug)]
pub struct Qcow2 {
    file: Arc<dyn HostFile>,
    data_file: Arc<dyn HostFile>,
    preamble: Arc<Preamble>,
    compression: Compression,
    cache: Arc<TableCache>,
    /// Names this layer in the cache.
    number: u64,
    virtual_size: u64,
    l1: Arc<L1Table>,
    /// Whether clusters that are data by the tables can be holes of the file all the same, as in
    /// an image with preallocated metadata.
    is_sparse: bool,
    /// The tables of an image that is being written, which are ahead of the file, and the view.
    staged: Option<(Staged, usize)>,
}

impl Qcow2 {
    /// Opens the active disk. `data_file` is the external data file, opened, if `preamble` asks
    /// for one.
    ///
    /// # Errors
    /// The L1 table cannot be read.
    #[doc(hidden)]
    pub fn open(
        file: Arc<dyn HostFile>,
        data_file: Option<Arc<dyn HostFile>>,
        preamble: Preamble,
        cache: Arc<TableCache>,
    ) -> Result<Self> {
        Self::open_with(L1Table::read, file, data_file, preamble, cache)
    }

    /// The same to be looked at, and not to be read: what its L1 table has past the end of the file is empty.
    ///
    /// # Errors
    /// The L1 table cannot be read.
    pub(crate) fn open_to_look(
        file: Arc<dyn HostFile>,
        data_file: Option<Arc<dyn HostFile>>,
        preamble: Preamble,
        cache: Arc<TableCache>,
    ) -> Result<Self> {
        Self::open_with(L1Table::read_cut, file, data_file, preamble, cache)
    }

    fn open_with(
        read_l1: fn(&dyn HostFile, u64, u32) -> Result<L1Table>,
        file: Arc<dyn HostFile>,
        data_file: Option<Arc<dyn HostFile>>,
        preamble: Preamble,
        cache: Arc<TableCache>,
    ) -> Result<Self> {
        let header = &preamble.header;
        let l1 = read_l1(&*file, header.l1_offset, header.l1_entries).path(file.path())?;
        let data_file = data_file.unwrap_or_else(|| file.clone());
        Ok(Self {
            is_sparse: is_sparse(&*data_file, header.cluster_size())?,
            data_file,
            file,
            compression: header.compression()?,
            cache,
            number: TableCache::next_layer_number(),
            virtual_size: whole_sectors(header.size),
            l1: Arc::new(l1),
            preamble: Arc::new(preamble),
            staged: None,
        })
    }

    /// The same image as it is in the file now.
    pub(crate) fn reopen(&self) -> Result<Self> {
        let data_file = self.preamble.header.has_data_file().then(|| self.data_file.clone());
        let preamble = Preamble::read(&*self.file)?;
        Self::open(self.file.clone(), data_file, preamble, self.cache.clone())
    }

    /// The header's fields.
    pub fn header(&self) -> &Header {
        &self.preamble.header
    }

    /// Whether it was not closed properly by a writer with lazy refcounts.
    pub fn is_dirty(&self) -> bool {
        self.header().incompatible & incompatible::DIRTY != 0
    }

    /// The whole header cluster.
    pub(crate) fn preamble(&self) -> &Preamble {
        &self.preamble
    }

    /// The L1 table of this view.
    fn l1(&self) -> &L1Table {
        &self.l1
    }

    /// The internal snapshots.
    ///
    /// # Errors
    /// The snapshot table cannot be read, or breaks the rules of the format.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        SnapshotTable::read(&*self.file, self.header())
    }

    /// The same for who only lists them: whether their disks can be read does not matter.
    ///
    /// # Errors
    /// The snapshot table cannot be read, or claims more than it may.
    pub(crate) fn listed_snapshots(&self) -> Result<Vec<Snapshot>> {
        let entries = SnapshotTable::read_as_it_is(&*self.file, self.header())?.entries;
        let listed = entries.into_iter().map(|entry| match entry.fault {
            Some(fault @ Fault::TooMuchExtra(_)) => Err(fault.into()),
            _ => Ok(entry.snapshot),
        });
        listed.collect::<Result<_>>().path(self.file.path()).doing(|| "reading the snapshot table".to_owned())
    }

    /// The persistent bitmaps, none if they are not consistent with the image.
    ///
    /// # Errors
    /// The bitmap directory cannot be read, or breaks the rules of the format.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let extension = self.preamble.extensions.find(kind::BITMAPS);
        let is_consistent = self.header().autoclear & autoclear::BITMAPS != 0;
        let Some(extension) = extension.filter(|_| is_consistent) else {
            return Ok(Vec::new());
        };
        let read = || {
            let directory = Directory::decode(extension, self.header())?;
            directory.read(&*self.file, self.header())
        };
        read().path(self.file.path()).doing(|| "reading the bitmap directory".to_owned())
    }

    /// The view of an internal snapshot.
    ///
    /// # Errors
    /// The L1 table of the snapshot cannot be read.
    pub fn at_snapshot(&self, snapshot: &Snapshot) -> Result<Self> {
        let l1 = L1Table::read(&*self.file, snapshot.l1_offset, snapshot.l1_entries)
            .path(self.file.path())
            .doing(|| format!("opening snapshot '{}'", snapshot.name))?;
        let virtual_size = whole_sectors(snapshot.disk_size);
        Ok(Self { l1: Arc::new(l1), virtual_size, staged: None, ..self.clone() })
    }

    /// The L2 entry for the cluster at `at`, `None` if there is no L2 table.
    fn l2_entry(&self, at: GuestOffset) -> Result<Option<L2Entry>> {
        let slice = self.l2_slice(at)?;
        Ok(slice.map(|(slice, index)| slice.entry(index, self.header().l2_entry_size())))
    }

    /// The piece of an L2 table that has the entry for the cluster at `at`, and which it is there.
    fn l2_slice(&self, at: GuestOffset) -> Result<Option<(Arc<L2Slice>, u64)>> {
        let header = self.header();
        let Some(table) = self.l2_table(at.0 / header.l2_coverage())? else {
            return Ok(None);
        };
        if let Some((staged, _)) = &self.staged {
            return staged.slice_with(table, at).map(Some);
        }
        let index = (at.0 >> header.cluster_bits) % header.l2_entries();
        let slice_bytes = SLICE_BYTES.min(header.cluster_size());
        let per_slice = slice_bytes / header.l2_entry_size();
        let slice_at = table + index / per_slice * slice_bytes;
        let slice = self.cache.slice(self.number, &*self.file, slice_at, slice_bytes)?;
        Ok(Some((slice, index % per_slice)))
    }

    /// The place in the data file that a cluster has for what lies at `at`, whether it is in use
    /// or not, and for how many bytes, at most `length`, the answer holds.
    ///
    /// # Errors
    /// The L2 table cannot be read, or breaks the rules of the format.
    #[doc(hidden)]
    pub fn place_at(&self, at: GuestOffset, length: u64) -> Result<(Option<HostOffset>, u64)> {
        let Some(entry) = self.l2_entry(at)? else {
            return Ok((None, self.absent_run(at, length)?));
        };
        let within = at.0 % self.header().cluster_size();
        let length = length.min(self.header().cluster_size() - within);
        match entry.decode(self.header())? {
            Cluster::Standard(Standard { host: Some(host), .. }) => Ok((Some(host + within), length)),
            _ => Ok((None, length)),
        }
    }

    fn l2_table(&self, l1_index: u64) -> Result<Option<HostOffset>> {
        let entry = match &self.staged {
            Some((staged, view)) => staged.l1_entry(*view, l1_index),
            None => self.l1.entry(l1_index),
        };
        let table = entry::l2_table(entry, self.header())?;
        match table {
            // A new one need not be in the file yet.
            Some(at) if self.staged.is_none() && at.0 >= self.file.size() => {
                Err(Error::corrupt(format!("L1 entry {entry:#018x} points past the end of the file")))
            }
            _ => Ok(table),
        }
    }

    /// Length of the run of absent L2 tables from `at` on, at most `length` bytes.
    fn absent_run(&self, at: GuestOffset, length: u64) -> Result<u64> {
        let coverage = self.header().l2_coverage();
        let first = at.0 / coverage;
        let last = (at.0 + length - 1) / coverage;
        let next_used = |index| match &self.staged {
            Some((staged, view)) => staged.next_used(*view, index),
            None => self.l1.next_used(index),
        };
        let used_from = |index| next_used(index).filter(|next| *next <= last);
        let mut next = used_from(first + 1);
        while let Some(index) = next
            && self.l2_table(index)?.is_none()
        {
            next = used_from(index + 1);
        }
        let end = next.map_or(u64::MAX, |index| index * coverage);
        Ok((end - at.0).min(length))
    }

    fn extent_in_cluster(&self, at: GuestOffset, length: u64, entry: L2Entry) -> Result<Extent> {
        let header = self.header();
        let within = at.0 % header.cluster_size();
        let length = length.min(header.cluster_size() - within);
        match entry.decode(header)? {
            Cluster::Compressed { at, size } => {
                self.within_file(&self.file, at, "compressed cluster")?;
                let kind = ExtentKind::Compressed(Compressed { at, size, skip: within as u32 });
                Ok(Extent { kind, length })
            }
            Cluster::Standard(standard) => {
                self.refuse_misplaced(standard, at.0 - within)?;
                self.extent_in_standard(standard, within, length)
            }
        }
    }

    fn extent_in_standard(&self, cluster: Standard, within: u64, length: u64) -> Result<Extent> {
        let subcluster = self.header().cluster_size() / u64::from(SUBCLUSTERS);
        let first = (within / subcluster) as u32;
        let end = (within + length).div_ceil(subcluster) as u32;
        let run_end = u64::from(first + cluster.run(first, end)) * subcluster;
        let length = length.min(run_end - within);
        let host = cluster.host.map(|host| host + within);
        let kind = match (cluster.state(first), host) {
            (State::Zero, host) => ExtentKind::Zero(host),
            (State::Data, Some(host)) => {
                self.within_file(&self.data_file, host, "cluster")?;
                ExtentKind::Data(host)
            }
            // `decode` has refused data without a host cluster.
            (State::Unallocated | State::Data, _) => ExtentKind::NotMine,
        };
        Ok(Extent { kind, length })
    }

    /// In an external data file, each cluster lies where the guest has it (as QEMU demands): there
    /// are no refcounts that could tell whose it is.
    fn refuse_misplaced(&self, cluster: Standard, guest: u64) -> Result<()> {
        match cluster.host {
            Some(host) if self.header().has_data_file() && host.0 != guest => {
                let what = "a cluster does not lie at its guest offset in the external data file";
                Err(Error::corrupt(what).path(self.data_file.path()).offset(host.0))
            }
            _ => Ok(()),
        }
    }

    /// A cluster that begins past the end of its file is lost data, not zeros. That the file ends
    /// within its last cluster is normal.
    fn within_file(&self, file: &Arc<dyn HostFile>, host: HostOffset, what: &str) -> Result<()> {
        if host.0 & !(self.header().cluster_size() - 1) < file.size() {
            return Ok(());
        }
        let what = format!("a {what} lies past the end of the file: the file was cut short");
        Err(Error::corrupt(what).path(file.path()).offset(host.0))
    }

    fn split_by_holes(&self, host: HostOffset, length: u64) -> Result<Extent> {
        let run = self.data_file.run_at(host, length)?;
        let kind = if run.is_data { ExtentKind::Data(host) } else { ExtentKind::Zero(Some(host)) };
        Ok(Extent { kind, length: run.length })
    }

    /// Lengthens `extent` by what follows it in the same way in the clusters after it.
    fn grow(&self, at: GuestOffset, length: u64, mut extent: Extent) -> Result<Extent> {
        // One L2 table at a time, so that a call stays short.
        let coverage = self.header().l2_coverage();
        let limit = length.min(coverage - at.0 % coverage);
        let entry_size = self.header().l2_entry_size();
        let (cluster, cluster_bits) = (self.header().cluster_size(), self.header().cluster_bits);
        while extent.length < limit {
            let Some((slice, mut index)) = self.l2_slice(at + extent.length)? else { break };
            if extent.kind == ExtentKind::NotMine {
                // Most entries of a sparse disk: there is nothing to decode.
                let empty = slice.empty_entries_from(index, entry_size);
                index += empty;
                let within = (at + extent.length).0 & (cluster - 1);
                extent.length += (empty << cluster_bits).saturating_sub(within).min(limit - extent.length);
            }
            if !self.grow_by(slice.entries_from(index, entry_size), at, limit, &mut extent) {
                break;
            }
        }
        Ok(extent)
    }

    /// The same, up to `limit` bytes, by the clusters of these entries; whether it may go on behind
    /// them.
    fn grow_by(
        &self,
        entries: impl Iterator<Item = L2Entry>,
        at: GuestOffset,
        limit: u64,
        extent: &mut Extent,
    ) -> bool {
        let cluster = self.header().cluster_size();
        for entry in entries {
            // Nothing was asked about what follows.
            if extent.length == limit {
                return false;
            }
            let next = at + extent.length;
            let more = match self.extent_in_cluster(next, limit - extent.length, entry) {
                Ok(more) if continues(*extent, more.kind) => more.length,
                // What is wrong with a cluster is said when someone asks for it, not for what precedes it.
                _ => return false,
            };
            extent.length += more;
            // Another subcluster follows.
            if (next.0 + more) & (cluster - 1) != 0 {
                return false;
            }
        }
        true
    }
}

/// Whether `next` is what follows `extent` when it goes on in the same way.
fn continues(extent: Extent, next: ExtentKind) -> bool {
    match (extent.kind, next) {
        (ExtentKind::Data(host), ExtentKind::Data(next)) => next == host + extent.length,
        (ExtentKind::Zero(Some(host)), ExtentKind::Zero(Some(next))) => next == host + extent.length,
        (ExtentKind::Zero(None), ExtentKind::Zero(None)) | (ExtentKind::NotMine, ExtentKind::NotMine) => true,
        _ => false,
    }
}

/// Whether the file takes so much less space than it has clusters that looking for holes in data
/// clusters pays. The threshold is QEMU's, so that `map` shows the same.
fn is_sparse(file: &dyn HostFile, cluster_size: u64) -> Result<bool> {
    let allocated = file.allocated_bytes()? / cluster_size;
    let threshold = (allocated + allocated / 9).max(allocated + 2);
    Ok(file.size().div_ceil(cluster_size) >= threshold)
}

/// QEMU counts disks in sectors of 512 bytes, and does not show a last one that is not whole.
fn whole_sectors(bytes: u64) -> u64 {
    bytes & !511
}

impl Layer for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn extent_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<Extent> {
        let found = match self.l2_entry(at) {
            Ok(None) => {
                let length = self.absent_run(at, length)?;
                return Ok(Extent { kind: ExtentKind::NotMine, length });
            }
            Ok(Some(entry)) => {
                self.extent_in_cluster(at, length, entry).and_then(|extent| match extent.kind {
                    ExtentKind::Compressed(_) => Ok(extent),
                    _ => self.grow(at, length, extent),
                })
            }
            Err(e) => Err(e),
        };
        let extent = found.path(self.file.path()).doing(|| format!("looking up guest offset {at:#x}"))?;
        match (extent.kind, detail) {
            (ExtentKind::Data(host), Detail::Holes) if self.is_sparse => {
                self.split_by_holes(host, extent.length)
            }
            _ => Ok(extent),
        }
    }

    fn read_compressed(&self, place: Compressed, buffer: &mut [u8]) -> Result<()> {
        let inflate = || {
            let mut payload = vec![0; place.size as usize];
            self.file.read_at(place.at, &mut payload)?;
            let mut cluster = vec![0; self.header().cluster_size() as usize];
            compressed::inflate(self.compression, &payload, &mut cluster)
                .map_err(|e| e.path(self.file.path()).offset(place.at.0))?;
            Ok(cluster.into())
        };
        let number = self.staged.as_ref().map_or(self.number, |(staged, _)| staged.cluster_number());
        let cluster = self.cache.cluster(number, (place.at, place.size), inflate)?;
        let skip = place.skip as usize;
        buffer.copy_from_slice(&cluster[skip..skip + buffer.len()]);
        Ok(())
    }

    fn file(&self) -> &Arc<dyn HostFile> {
        &self.file
    }

    fn data_file(&self) -> &Arc<dyn HostFile> {
        &self.data_file
    }

    fn backing(&self) -> Option<&Reference> {
        self.preamble.backing.as_ref()
    }

    fn as_qcow2(&self) -> Option<&Qcow2> {
        Some(self)
    }
}
