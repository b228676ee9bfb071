//! The raw format: the file is the disk. Holes are zero extents.

use std::sync::Arc;

use super::{Compressed, Detail, Extent, ExtentKind, Format, GuestOffset, Layer};
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

/// QEMU counts disks in sectors of this many bytes; a raw file's last one is filled up with zeros.
const SECTOR: u64 = 512;

/// A raw image: file or block device.
#[derive(Debug)]
pub struct Raw {
    file: Arc<dyn HostFile>,
    virtual_size: u64,
}

impl Raw {
    /// Takes the file as a disk of its own length, rounded up to whole sectors.
    pub fn open(file: Arc<dyn HostFile>) -> Self {
        let virtual_size = file.size().next_multiple_of(SECTOR);
        Self { file, virtual_size }
    }
}

impl Layer for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn extent_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<Extent> {
        let host = HostOffset(at.0);
        let data = Extent { kind: ExtentKind::Data(host), length };
        match detail {
            Detail::Owner => Ok(data),
            Detail::Holes => match self.file.run_at(host, length)? {
                run if run.is_data => Ok(Extent { length: run.length, ..data }),
                run => Ok(Extent { kind: ExtentKind::Zero(Some(host)), length: run.length }),
            },
        }
    }

    fn read_compressed(&self, _: Compressed, _: &mut [u8]) -> Result<()> {
        Err(Error::invalid("a raw image has no compressed clusters").path(self.file.path()))
    }

    fn file(&self) -> &Arc<dyn HostFile> {
        &self.file
    }
}
