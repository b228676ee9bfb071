//! Before the swap: what the image will read as, from what is durable, compared with what it reads
//! as now, in every view.

use super::Progress;
use crate::chain::Chain;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::AlignedBuffer;
use crate::layer::qcow2::Qcow2;
use crate::layer::{Detail, GuestOffset, Layer};

/// Bytes that are compared at once.
const PIECE: u64 = 256 << 10;

/// Compares `before` over `old` with the same image as it is in the file now over `new`: the
/// active disk and every snapshot. What both lead to the same place of the same file is the same. Of
/// the progress, `announced` bytes are each view's.
pub(super) fn verify(
    before: &Qcow2,
    (old, new): (&Chain, &Chain),
    announced: u64,
    progress: &Progress,
) -> Result<()> {
    before.file().drop_cache()?;
    before.data_file().drop_cache()?;
    let after = before.reopen()?;
    compare((before, old), (&after, new), announced, progress)?;
    for snapshot in before.snapshots()? {
        let (was, is) = (before.at_snapshot(&snapshot)?, after.at_snapshot(&snapshot)?);
        compare((&was, old), (&is, new), announced, progress)
            .doing(|| format!("looking at snapshot '{}'", snapshot.name))?;
    }
    Ok(())
}

fn compare(
    (before, old): (&Qcow2, &Chain),
    (after, new): (&Qcow2, &Chain),
    announced: u64,
    progress: &Progress,
) -> Result<()> {
    let mut part = progress.part(announced, announced);
    let size = before.virtual_size();
    let before = old.under(std::sync::Arc::new(before.clone()));
    let after = new.under(std::sync::Arc::new(after.clone()));
    let mut buffers = (AlignedBuffer::default(), AlignedBuffer::default());
    let mut at = GuestOffset(0);
    while at.0 < size {
        progress.stop_if_cancelled()?;
        let (was, length) = before.source_at(at, size - at.0, Detail::Holes)?;
        let (is, length) = after.source_at(at, length, Detail::Holes)?;
        if was == is {
            at = at + length;
            continue;
        }
        let length = length.min(PIECE) as usize;
        let (was, is) = (buffers.0.of_length(length), buffers.1.of_length(length));
        before.read_at(at, was)?;
        after.read_at(at, is)?;
        if let Some(first) = was.iter().zip(is.iter()).position(|(was, is)| was != is) {
            return Err(mismatch(&before, at + first as u64));
        }
        part.advance(length as u64);
        at = at + length as u64;
    }
    part.finish();
    Ok(())
}

fn mismatch(before: &Chain, at: GuestOffset) -> Error {
    let what =
        format!("the image would read differently at guest offset {at:#x}; it stays on its old backing file");
    let error = Error::new(ErrorKind::Io, what)
        .hint("has a backing file been written to meanwhile? is the disk sound?");
    match before.top() {
        Some(top) => error.path(top.file().path()),
        None => error,
    }
}
