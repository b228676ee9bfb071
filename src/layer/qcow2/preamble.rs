//! The header cluster: header, extensions, the name of the backing file.
//!
//! Reads nothing beyond it, and opens no other file.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::extension::{Extensions, kind};
use super::header::{self, Header};
use crate::error::{Context, Error, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::{Format, Reference};

/// The header cluster, decoded: what can be known before any other file is opened.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Preamble {
    /// The header's fields.
    pub header: Header,
    /// The header extensions.
    pub extensions: Extensions,
    /// The backing file.
    pub backing: Option<Reference>,
}

impl Preamble {
    /// Reads, decodes and validates the header cluster.
    ///
    /// # Errors
    /// The file cannot be read, is no qcow2 image, or uses a feature that is not understood.
    pub fn read(file: &dyn HostFile) -> Result<Self> {
        Self::read_unnamed(file).path(file.path())
    }

    fn read_unnamed(file: &dyn HostFile) -> Result<Self> {
        let mut start = [0; header::DECODED_LENGTH];
        file.read_at(HostOffset(0), &mut start)?;
        let header = Header::decode(&start)?;
        header.validate_geometry()?;
        let end = match header.backing_offset {
            0 => header.cluster_size(),
            offset => offset,
        };
        let mut area = vec![0; (end - u64::from(header.length)) as usize];
        file.read_at(HostOffset(u64::from(header.length)), &mut area)?;
        let extensions = Extensions::decode(&area, u64::from(header.length))?;
        header.validate(|bit| extensions.incompatible_feature_name(bit))?;
        let backing = read_backing(file, &header, &extensions)?;
        Ok(Self { header, extensions, backing })
    }

    /// The external data file as the header names it; the format is always raw.
    ///
    /// # Errors
    /// There is one, but no name for it.
    pub fn data_file(&self) -> Result<Option<Reference>> {
        if !self.header.has_data_file() {
            return Ok(None);
        }
        match self.extensions.find(kind::DATA_FILE) {
            Some(name) if !name.is_empty() => Ok(Some(Reference {
                name: OsString::from_vec(name.to_vec()),
                format: Some(Format::Raw.to_string()),
            })),
            _ => Err(Error::corrupt("has an external data file but does not name it")),
        }
    }
}

fn read_backing(file: &dyn HostFile, header: &Header, extensions: &Extensions) -> Result<Option<Reference>> {
    if header.backing_offset == 0 || header.backing_size == 0 {
        return Ok(None);
    }
    let mut name = vec![0; header.backing_size as usize];
    file.read_at(HostOffset(header.backing_offset), &mut name)?;
    // QEMU reads it as a C string.
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    name.truncate(end);
    if name.is_empty() {
        return Ok(None);
    }
    let format = extensions.find_text(kind::BACKING_FORMAT).filter(|f| !f.is_empty());
    Ok(Some(Reference { name: OsString::from_vec(name), format }))
}
