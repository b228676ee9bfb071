//! An image in memory, opened as far as it can be.

use std::sync::Arc;

use rebasefs::file::HostFile;
use rebasefs::layer::qcow2::Qcow2;
use rebasefs::layer::qcow2::testing::{Preamble, TableCache};

use super::memory_file::MemoryFile;

/// Opens the image. Its external data file, where it wants one, is `data`.
pub fn open(file: &MemoryFile, data: &MemoryFile) -> rebasefs::Result<Qcow2> {
    let preamble = Preamble::read(file)?;
    let data_file = preamble.data_file()?.map(|_| Arc::new(data.clone()) as Arc<dyn HostFile>);
    Qcow2::open(Arc::new(file.clone()), data_file, preamble, TableCache::new())
}
