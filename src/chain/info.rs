//! What can be said of a layer without reading guest data, in the words of `qemu-img info`.
//!
//! The types serialise to qemu-img's JSON, which `json` lays out. Prints nothing.

use serde::Serialize;
use serde_json::ser::PrettyFormatter;

use super::name;
use crate::error::{Error, Result};
use crate::file::HostFile;
use crate::layer::qcow2::extension::kind;
use crate::layer::qcow2::header::{autoclear, compatible, incompatible};
use crate::layer::qcow2::{Bitmap, Compression, Header, Qcow2, Snapshot};
use crate::layer::{Layer, Reference};
use crate::shown;

/// An image; the fields of qemu-img's ImageInfo.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ImageInfo {
    /// The files that the image lies in.
    pub children: Vec<Child>,
    /// The format of the backing file, if the image records it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// Bytes.
    pub virtual_size: u64,
    /// As typed, or as resolved from the image above.
    pub filename: String,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Name of the format.
    pub format: String,
    /// Bytes that it takes on its file system.
    pub actual_size: u64,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// Where the name of the backing file leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file as the header names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Whether the refcounts may be wrong.
    pub dirty_flag: bool,
}

/// A file that an image lies in.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Child {
    /// What the image uses it for.
    pub name: &'static str,
    /// The file.
    pub info: FileInfo,
}

/// A host file; the fields of an ImageInfo that a file has.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct FileInfo {
    /// The files that a file lies in: none.
    pub children: [(); 0],
    /// Its length in whole sectors, in bytes.
    pub virtual_size: u64,
    /// Its name.
    pub filename: String,
    /// `file`, or `host_device` for a block device.
    pub format: &'static str,
    /// Bytes that it takes on its file system.
    pub actual_size: u64,
    /// What only a file of this machine has: nothing.
    pub format_specific: FormatSpecific,
    /// Never.
    pub dirty_flag: bool,
}

/// What only one format has.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
#[non_exhaustive]
pub enum FormatSpecific {
    /// Of a file or device of this machine.
    File {},
    /// Of a qcow2 image.
    Qcow2(Qcow2Info),
}

/// What only a qcow2 image has.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Qcow2Info {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: &'static str,
    /// How compressed clusters are compressed.
    pub compression_type: &'static str,
    /// Whether refcounts may be written late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// The persistent bitmaps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// The external data file as the header names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether that file is a raw image by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Whether the image is marked as damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether it has subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// `in-use`, `auto`.
    pub flags: Vec<&'static str>,
    /// Its name.
    pub name: String,
    /// Guest bytes that a bit stands for.
    pub granularity: u64,
}

/// An internal snapshot.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Instruction count, where it was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// Nanoseconds of the second that the guest's clock was at.
    pub vm_clock_nsec: u64,
    /// Its name.
    pub name: String,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Seconds that the guest had run.
    pub vm_clock_sec: u64,
    /// Its id.
    pub id: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
}

impl ImageInfo {
    /// What can be said of a layer.
    ///
    /// # Errors
    /// The file system does not answer; snapshots or bitmaps cannot be read.
    pub fn of(layer: &dyn Layer) -> Result<Self> {
        let file = FileInfo::of(&**layer.file())?;
        let image = layer.as_qcow2();
        let snapshots = image.map(Qcow2::listed_snapshots).transpose()?.unwrap_or_default();
        let full = |backing| name::full(layer.file().path(), backing);
        Ok(Self {
            backing_filename_format: layer.backing().and_then(|backing| backing.format.clone()),
            snapshots: snapshots.into_iter().map(SnapshotInfo::from).collect(),
            virtual_size: layer.virtual_size(),
            filename: file.filename.clone(),
            cluster_size: image.map(|image| image.header().cluster_size()),
            format: layer.format().to_string(),
            actual_size: file.actual_size,
            format_specific: image.map(Qcow2Info::of).transpose()?.map(FormatSpecific::Qcow2),
            full_backing_filename: layer.backing().map(full),
            backing_filename: layer.backing().map(name_of),
            dirty_flag: image.is_some_and(|image| image.header().incompatible & incompatible::DIRTY != 0),
            children: vec![Child { name: "file", info: file }],
        })
    }
}

/// A value as qemu-img writes JSON: indented by four spaces.
///
/// # Errors
/// The value has no JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<String> {
    let mut bytes = Vec::new();
    let mut serializer =
        serde_json::Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"    "));
    let written = value.serialize(&mut serializer);
    written.map_err(|e| Error::io(e.into(), "cannot write JSON"))?;
    Ok(shown::json(&String::from_utf8_lossy(&bytes)).into_owned())
}

fn name_of(reference: &Reference) -> String {
    reference.name.to_string_lossy().into_owned()
}

impl FileInfo {
    fn of(file: &dyn HostFile) -> Result<Self> {
        let is_device = file.identity().is_block_device();
        Ok(Self {
            children: [],
            virtual_size: file.size().next_multiple_of(512),
            filename: file.path().to_string_lossy().into_owned(),
            format: if is_device { "host_device" } else { "file" },
            actual_size: file.allocated_bytes()?,
            format_specific: FormatSpecific::File {},
            dirty_flag: false,
        })
    }
}

impl Qcow2Info {
    fn of(image: &Qcow2) -> Result<Self> {
        let header = image.header();
        let bitmaps = image.bitmaps()?.into_iter().map(BitmapInfo::from).collect();
        let data_file = image.preamble().extensions.find_text(kind::DATA_FILE);
        let v3 = Self { bitmaps, ..Self::of_header(header)? };
        Ok(match header.version {
            2 => v3,
            _ => Self {
                lazy_refcounts: Some(header.compatible & compatible::LAZY_REFCOUNTS != 0),
                data_file: data_file.filter(|_| header.has_data_file()),
                data_file_raw: header
                    .has_data_file()
                    .then_some(header.autoclear & autoclear::DATA_FILE_RAW != 0),
                corrupt: Some(header.incompatible & incompatible::CORRUPT != 0),
                extended_l2: Some(header.has_subclusters()),
                ..v3
            },
        })
    }

    /// The fields that version 2 has, too.
    fn of_header(header: &Header) -> Result<Self> {
        Ok(Self {
            compat: if header.version == 2 { "0.10" } else { "1.1" },
            compression_type: match header.compression()? {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            },
            lazy_refcounts: None,
            bitmaps: Vec::new(),
            refcount_bits: 1 << header.refcount_order,
            data_file: None,
            data_file_raw: None,
            corrupt: None,
            extended_l2: None,
        })
    }
}

impl From<Bitmap> for BitmapInfo {
    fn from(bitmap: Bitmap) -> Self {
        let named = [(Bitmap::IN_USE, "in-use"), (Bitmap::AUTO, "auto")];
        let flags = named.into_iter().filter(|(bit, _)| bitmap.flags & bit != 0);
        Self {
            flags: flags.map(|(_, name)| name).collect(),
            granularity: 1u64.checked_shl(u32::from(bitmap.granularity_bits)).unwrap_or(0),
            name: bitmap.name,
        }
    }
}

impl From<Snapshot> for SnapshotInfo {
    fn from(snapshot: Snapshot) -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            icount: snapshot.icount,
            vm_clock_nsec: snapshot.vm_clock_nanoseconds % SECOND,
            name: snapshot.name,
            date_sec: snapshot.date_seconds,
            date_nsec: snapshot.date_nanoseconds,
            vm_clock_sec: snapshot.vm_clock_nanoseconds / SECOND,
            id: snapshot.id,
            vm_state_size: snapshot.vm_state_size,
        }
    }
}
