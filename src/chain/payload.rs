//! Equal compressed clusters, told by their payloads: at most one of two is inflated, and not for its
//! bytes, but to see that it can be.

use super::Chain;
use crate::error::Result;
use crate::layer::{Compressed, Detail, ExtentKind, GuestOffset, Layer};

/// The place of a payload ends at a multiple of this many bytes, the payload itself before it
/// (qcow2 specification, *Compressed Clusters Descriptor*).
const SECTOR: u32 = 512;

/// Finds equal payloads in two chains; owns the memory that it takes.
#[derive(Debug, Default)]
pub struct Payloads {
    first: Vec<u8>,
    second: Vec<u8>,
    cluster: Vec<u8>,
}

impl Payloads {
    /// Whether two chains hold the bytes at `at` in compressed clusters of the same payload, and for
    /// how many bytes, at most `length` (≥ 1), that is so. `false` means nothing.
    ///
    /// A payload is known to its last sector only, what follows it there may be another one's.
    /// So places that agree as far as the shorter one reaches, and whose lengths differ by less
    /// than a sector, hold the same stream, if the shorter one holds it as a whole.
    ///
    /// # Errors
    /// A file cannot be read; or the payload is no stream, or its place is recorded too short: then one
    /// of the two chains cannot be read there, and equal is nothing that a reader could see.
    pub fn are_equal(
        &mut self,
        (first, second): (&Chain, &Chain),
        at: GuestOffset,
        length: u64,
    ) -> Result<(bool, u64)> {
        let one = first.extent_at(at, length, Detail::Owner)?;
        let other = second.extent_at(at, one.extent.length, Detail::Owner)?;
        let length = other.extent.length;
        let (Some(depth), ExtentKind::Compressed(place)) = (one.depth, one.extent.kind) else {
            return Ok((false, length));
        };
        let (Some(other_depth), ExtentKind::Compressed(other_place)) = (other.depth, other.extent.kind)
        else {
            return Ok((false, length));
        };
        let (layer, other_layer) = (&*first.layers()[depth], &*second.layers()[other_depth]);
        let is_comparable = inflates_to(layer) == inflates_to(other_layer)
            && place.skip == other_place.skip
            && place.size.abs_diff(other_place.size) < SECTOR;
        if !is_comparable {
            return Ok((false, length));
        }
        let shorter = place.size.min(other_place.size) as usize;
        let payload = read(layer, place, shorter, &mut self.first)?;
        if payload != read(other_layer, other_place, shorter, &mut self.second)? {
            return Ok((false, length));
        }
        // What comes of the shorter one comes of the other.
        let (layer, place) = match place.size <= other_place.size {
            true => (layer, place),
            false => (other_layer, other_place),
        };
        self.cluster.resize(length as usize, 0);
        layer.read_compressed(place, &mut self.cluster)?;
        Ok((true, length))
    }
}

/// What a payload becomes: by which method, and how many bytes.
fn inflates_to(layer: &dyn Layer) -> Option<(u8, u64)> {
    let header = layer.as_qcow2()?.header();
    Some((header.compression, header.cluster_size()))
}

fn read<'a>(
    layer: &dyn Layer,
    place: Compressed,
    length: usize,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    buffer.resize(length.max(buffer.len()), 0);
    let buffer = &mut buffer[..length];
    layer.file().read_at(place.at, buffer)?;
    Ok(buffer)
}
