//! The parts of an image that are files of their own: layers, internal snapshots, partitions.
//!
//! Finds them, names them and opens them, each when somebody asks for it. Belongs to one chain: when
//! that is replaced, so is this.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::flat::Flat;
use super::partitions::{Disk, Partition};
use super::snapshots::Snapshots;
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::qcow2::Qcow2;
use crate::layer::{GuestOffset, Layer};

/// So many parts are kept open. Each has tables in memory.
const MAX_OPEN: usize = 16;

/// What the names of all parts end with.
const SUFFIX: &str = ".raw";

/// A part of the image, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    /// What a guest would see of the layer at this depth and those below it.
    Layer(u32),
    /// An internal snapshot, by its place in the table of snapshots.
    Snapshot(u32),
    /// A partition, by the number that the kernel gives it.
    Partition(u32),
}

/// Where parts lie in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Folder {
    Layers,
    Partitions,
    Snapshots,
}

/// The parts of one chain, as far as somebody has asked for them.
#[derive(Debug)]
pub(super) struct Parts {
    snapshots: Mutex<Option<Arc<Snapshots>>>,
    partitions: Mutex<Option<Arc<[Partition]>>>,
    /// Those that are open, the last one used at the end.
    open: Mutex<Vec<(Part, Arc<Flat>)>>,
    /// All that were ever opened, of this chain and those before it, but layers.
    viewed: Arc<Mutex<BTreeSet<Part>>>,
}

impl Parts {
    pub(super) fn new(viewed: Arc<Mutex<BTreeSet<Part>>>) -> Self {
        let (snapshots, partitions, open) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { snapshots, partitions, open, viewed }
    }

    pub(super) fn viewed(&self) -> Arc<Mutex<BTreeSet<Part>>> {
        self.viewed.clone()
    }

    /// Forgets what a guest's write may have changed: where partitions lie, and what is data in them.
    pub(super) fn note_written(&self) {
        *lock(&self.partitions) = None;
        lock(&self.open).retain(|(part, _)| !matches!(part, Part::Partition(_)));
    }

    /// Lets all block counts that are under way stop.
    pub(super) fn stop_counting(&self) {
        lock(&self.open).iter().for_each(|(_, flat)| flat.stop_counting());
    }

    /// The part of this name, if there is one.
    pub(super) fn named(&self, chain: &Chain, folder: Folder, name: &str) -> Result<Option<Part>> {
        let Some(name) = name.strip_suffix(SUFFIX) else { return Ok(None) };
        Ok(match folder {
            Folder::Layers => number(name).filter(|n| *n < layers(chain)).map(Part::Layer),
            Folder::Partitions => {
                let partitions = self.partitions(chain)?;
                let is_there = |n: &u32| partitions.iter().any(|partition| partition.number == *n);
                number(name).filter(is_there).map(Part::Partition)
            }
            Folder::Snapshots => self.snapshots(chain)?.named(name).map(Part::Snapshot),
        })
    }

    /// So many parts with their names, without those that come first.
    pub(super) fn list(
        &self,
        chain: &Chain,
        folder: Folder,
        skip: usize,
        take: usize,
    ) -> Result<Vec<(String, Part)>> {
        let file = |name: &dyn std::fmt::Display, part| (format!("{name}{SUFFIX}"), part);
        Ok(match folder {
            Folder::Layers => {
                (0..layers(chain)).skip(skip).take(take).map(|n| file(&n, Part::Layer(n))).collect()
            }
            Folder::Partitions => {
                let partitions = self.partitions(chain)?;
                let numbers = partitions.iter().map(|partition| partition.number).skip(skip).take(take);
                numbers.map(|n| file(&n, Part::Partition(n))).collect()
            }
            Folder::Snapshots => {
                let snapshots = self.snapshots(chain)?;
                let numbered = (0..).zip(snapshots.names()).skip(skip).take(take);
                numbered.map(|(n, name)| file(name, Part::Snapshot(n))).collect()
            }
        })
    }

    /// The bytes of a part.
    ///
    /// # Errors
    /// There is no such part (any more), or its tables cannot be read.
    pub(super) fn open(&self, chain: &Chain, part: Part) -> Result<Arc<Flat>> {
        let mut open = lock(&self.open);
        if let Some(place) = open.iter().position(|(other, _)| *other == part) {
            let found = open.remove(place);
            let flat = found.1.clone();
            open.push(found);
            return Ok(flat);
        }
        drop(open);
        let flat = Arc::new(self.find(chain, part)?);
        if !matches!(part, Part::Layer(_)) {
            lock(&self.viewed).insert(part);
        }
        let mut open = lock(&self.open);
        // Two may have found it at the same time, and share what the first one found.
        if let Some((_, first)) = open.iter().find(|(other, _)| *other == part) {
            return Ok(first.clone());
        }
        if open.len() >= MAX_OPEN {
            open.remove(0).1.stop_counting();
        }
        open.push((part, flat.clone()));
        Ok(flat)
    }

    fn find(&self, chain: &Chain, part: Part) -> Result<Flat> {
        Ok(match part {
            Part::Layer(0) => Flat::whole(chain.clone()),
            Part::Layer(depth) if depth < layers(chain) => Flat::whole(chain.below(depth as usize - 1)),
            Part::Layer(_) => return Err(gone("layer")),
            Part::Partition(n) => {
                let partitions = self.partitions(chain)?;
                let found = partitions.iter().find(|partition| partition.number == n);
                let Some(Partition { start, length, .. }) = found else { return Err(gone("partition")) };
                Flat::part(chain.clone(), *start, *length)
            }
            Part::Snapshot(n) => {
                let snapshots = self.snapshots(chain)?;
                let top = chain.top().and_then(|top| top.as_qcow2());
                let (Some(top), Some(snapshot)) = (top, snapshots.at(n)) else {
                    return Err(gone("snapshot"));
                };
                let view: Arc<dyn Layer> = Arc::new(top.at_snapshot(snapshot)?);
                Flat::whole(chain.below(0).under(view))
            }
        })
    }

    fn snapshots(&self, chain: &Chain) -> Result<Arc<Snapshots>> {
        let mut known = lock(&self.snapshots);
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let image = chain.top().and_then(|top| top.as_qcow2());
        let found = image.map(Qcow2::snapshots).transpose()?.unwrap_or_default();
        Ok(known.insert(Arc::new(Snapshots::new(found))).clone())
    }

    /// The partitions of the disk.
    pub(super) fn partitions(&self, chain: &Chain) -> Result<Arc<[Partition]>> {
        let mut known = lock(&self.partitions);
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let read = |at, buffer: &mut [u8]| chain.read_at(GuestOffset(at), buffer);
        let found = Disk { size: chain.virtual_size(), read: &read }.partitions()?;
        Ok(known.insert(found.into()).clone())
    }
}

fn layers(chain: &Chain) -> u32 {
    // No more than `MAX_DEPTH`.
    chain.layers().len() as u32
}

/// A number as we write it, so that no file has two names.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}

fn gone(what: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the image has no such {what}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_written_in_one_way_only() {
        assert_eq!(
            ["0", "12", "01", "+1", "-0", "", "4294967296"].map(number),
            [Some(0), Some(12), None, None, None, None, None]
        );
    }
}
