//! A larger disk, for a guest that writes to it.

use std::sync::Arc;

use super::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::GuestOffset;
use crate::layer::qcow2::Live;

impl Chain {
    /// The top, if a guest writes to it.
    ///
    /// # Errors
    /// It was opened for reading.
    #[doc(hidden)]
    pub fn live(&self) -> Result<&Live> {
        let live = self.top().and_then(|top| top.as_live());
        live.ok_or_else(|| {
            Error::new(ErrorKind::ReadOnly, "the disk is mounted for reading; --rw is for writing")
        })
    }

    /// The chain with a disk of `size` bytes, more than it has, durably. The new ones are zeros, also where
    /// a longer backing file has something there: they are so before the header tells the size.
    ///
    /// # Errors
    /// No guest writes to the top, or it cannot have so many bytes; its size is what it was then.
    #[doc(hidden)]
    pub fn grown(&self, size: u64) -> Result<Self> {
        let (live, below, old) = (self.live()?, self.below(0), self.virtual_size());
        let wider = live.widened(size)?;
        let view = below.under(Arc::new(wider.clone()));
        live.writer().guest().zero(&view, GuestOffset(old), size - old, true)?;
        Ok(below.under(Arc::new(wider.grown()?)))
    }
}
