//! What the image says of itself and is not true any more once a guest has written to it: persistent
//! bitmaps that should have recorded the write.
//!
//! They are marked as not saved properly, as QEMU marks them as long as it writes: `qemu-img info` shows
//! them as in use, and no incremental backup trusts them. Bitmaps that record nothing stay as they are.

use std::sync::atomic::Ordering;

use super::Writer;
use crate::error::{Context, Result};
use crate::file::HostOffset;
use crate::layer::qcow2::bitmap::Bitmap;

impl Writer {
    /// Before a guest's first write: lets the image tell of it, durably.
    pub(super) fn mark_written(&self) -> Result<()> {
        if self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _state = self.state();
        if !self.is_marked.load(Ordering::Acquire) {
            self.clear_unknown_autoclear_bits()?;
            self.distrust_bitmaps().doing(|| "marking bitmaps as in use".to_owned())?;
            self.is_marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn distrust_bitmaps(&self) -> Result<()> {
        let records = |bitmap: &Bitmap| bitmap.flags & (Bitmap::AUTO | Bitmap::IN_USE) == Bitmap::AUTO;
        let bitmaps: Vec<Bitmap> = self.views[0].bitmaps()?.into_iter().filter(records).collect();
        for bitmap in &bitmaps {
            let flags = bitmap.flags | Bitmap::IN_USE;
            self.file.write_at(HostOffset(bitmap.entry_offset + Bitmap::FLAGS), &flags.to_be_bytes())?;
        }
        let Some(first) = bitmaps.first() else { return Ok(()) };
        // One line: an image can have 65,535 of them.
        log::warn!(
            "{}: bitmap '{}' does not record what is written here, and is marked as in use (1 of {})",
            self.file.path().display(),
            first.name,
            bitmaps.len()
        );
        self.file.sync()
    }
}
