//! An image that is being written while it is read, as a layer: what it says is ahead of the file.
//!
//! Owns nothing but the connection between the [`Writer`] and the view that looks into its tables.

use std::sync::{Arc, RwLockReadGuard};

use super::writer::Staged;
use super::{Qcow2, Writer};
use crate::error::Result;
use crate::file::HostFile;
use crate::layer::{Compressed, Detail, Extent, Format, GuestOffset, Layer, Overlay, Reference};

/// The active disk of an image that a guest writes to.
#[derive(Clone, Debug)]
pub struct Live {
    image: Qcow2,
    writer: Arc<Writer>,
}

/// Keeps the clusters that were in use from being given to others.
pub type Hold<'a> = RwLockReadGuard<'a, ()>;

impl Live {
    /// Takes an image, opened for writing and closed properly, of which the tables are right.
    ///
    /// # Errors
    /// The image cannot be written, see [`Writer::open`].
    pub fn open(image: &Qcow2) -> Result<Self> {
        let writer = Writer::open(image)?;
        writer.check_tables()?;
        let writer = Arc::new(writer.live());
        Ok(Self { image: writer.active(image), writer })
    }

    /// The same with its header as it is in the file now.
    pub(crate) fn reopen(&self) -> Result<Self> {
        let image = self.writer.active(&self.image.reopen()?);
        Ok(Self { image, writer: self.writer.clone() })
    }

    /// A view of a disk of so many bytes, more than it has, with room for its tables. What lies behind
    /// the old end is to be zeroed by this view before [`grown`](Self::grown) makes it the disk's size.
    pub(crate) fn widened(&self, size: u64) -> Result<Self> {
        self.writer.refuse_growth(size)?;
        self.writer.make_room(size)?;
        Ok(Self { image: self.image.with_size(size), writer: self.writer.clone() })
    }

    /// The disk with the size of this view, durably.
    pub(crate) fn grown(&self) -> Result<Self> {
        self.writer.set_size(self.virtual_size())?;
        self.reopen()
    }

    /// Who writes it.
    pub fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }
}

impl Qcow2 {
    /// The same view of a disk of so many bytes.
    pub(super) fn with_size(&self, virtual_size: u64) -> Self {
        Self { virtual_size, ..self.clone() }
    }

    /// The same view by tables that are ahead of the file.
    pub(super) fn looking_into(&self, staged: &Staged, view: usize) -> Self {
        Self { staged: Some((staged.clone(), view)), ..self.clone() }
    }
}

impl Layer for Live {
    fn format(&self) -> Format {
        self.image.format()
    }

    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    fn extent_at(&self, at: GuestOffset, length: u64, detail: Detail) -> Result<Extent> {
        self.image.extent_at(at, length, detail)
    }

    fn read_compressed(&self, place: Compressed, buffer: &mut [u8]) -> Result<()> {
        self.image.read_compressed(place, buffer)
    }

    fn file(&self) -> &Arc<dyn HostFile> {
        self.image.file()
    }

    fn data_file(&self) -> &Arc<dyn HostFile> {
        self.image.data_file()
    }

    fn backing(&self) -> Option<&Reference> {
        self.image.backing()
    }

    fn as_qcow2(&self) -> Option<&Qcow2> {
        Some(&self.image)
    }

    fn as_live(&self) -> Option<&Live> {
        Some(self)
    }

    fn hold(&self) -> Option<Hold<'_>> {
        Some(self.writer.hold())
    }
}
