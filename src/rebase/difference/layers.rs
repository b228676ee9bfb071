//! What a chain consists of: told apart from others while it is open, and recognised again on another
//! day or another machine.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset, Identity, Stamp};
use crate::layer::{Format, Layer};

/// Tells open chains apart: the same files, of the same size when they were opened, in the same formats.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ChainKey(Vec<LayerKey>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct LayerKey {
    files: [Identity; 2],
    format: Format,
    virtual_size: u64,
}

impl ChainKey {
    /// The key of a chain.
    pub fn of(chain: &Chain) -> Self {
        let key = |layer: &Arc<dyn Layer>| LayerKey {
            files: [layer.file().identity(), layer.data_file().identity()],
            format: layer.format(),
            virtual_size: layer.virtual_size(),
        };
        Self(chain.layers().iter().map(key).collect())
    }

    /// The files of the chain, top first.
    pub fn files(&self) -> impl Iterator<Item = Identity> {
        self.0.iter().flat_map(|layer| layer.files)
    }
}

/// Samples of a file that make up its fingerprint: the first, the last, and as many between them.
const SAMPLES: u64 = 64;
/// Bytes of a sample.
const SAMPLE: u64 = 4096;
/// Bytes of the first sample: more than that, for there are the header and the small tables.
const FIRST: u64 = 64 << 10;

/// A layer, as it is recognised again.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedLayer {
    format: String,
    /// The file, and the external data file if there is one.
    files: Vec<SavedFile>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedFile {
    /// For people: on another machine it may have another one.
    path: String,
    size: u64,
    modified_ns: i64,
    changed_ns: i64,
    inode: u64,
    /// SHA-256 of samples, in hexadecimal.
    fingerprint: String,
}

/// A chain as it is now.
///
/// # Errors
/// A file cannot be read, or has no modification time, as block devices have none.
pub(super) fn saved(chain: &Chain) -> Result<Vec<SavedLayer>> {
    let layer = |layer: &Arc<dyn Layer>| {
        let one = Chain::new([layer.clone()]);
        let files = one.files().map(|file| SavedFile::of(&**file)).collect::<Result<_>>()?;
        Ok(SavedLayer { format: layer.format().to_string(), files })
    };
    chain.layers().iter().map(layer).collect()
}

impl SavedFile {
    fn of(file: &dyn HostFile) -> Result<Self> {
        let stamp = file.stamp()?;
        let stamp = if stamp.is_clock() { stamp.without_times() } else { stamp };
        let Stamp { size, modified_ns, changed_ns, inode, .. } = stamp;
        // Some file systems say 1970 always.
        let times = modified_ns.zip(changed_ns).filter(|times| *times != (0, 0));
        let Some((modified_ns, changed_ns)) = times.filter(|_| !file.identity().is_block_device()) else {
            let what = "has no modification time: nothing tells whether it has been written to since";
            let error = Error::unsupported(what).path(file.path());
            return Err(error
                .hint("leave out `--save-difference`: a difference is kept of files alone that have one"));
        };
        let path = std::fs::canonicalize(file.path()).unwrap_or_else(|_| file.path().to_owned());
        let fingerprint = fingerprint(file, size)?;
        Ok(Self {
            path: path.to_string_lossy().into_owned(),
            size,
            modified_ns,
            changed_ns,
            inode,
            fingerprint,
        })
    }
}

/// Whether two chains begin with the same file by its inode.
pub(super) fn have_same_top(one: &[SavedLayer], other: &[SavedLayer]) -> bool {
    let inode = |layers: &[SavedLayer]| Some(layers.first()?.files.first()?.inode);
    inode(one) == inode(other)
}

/// In what a chain that was saved is another one than it is now, if it is.
pub(super) fn mismatch(was: &[SavedLayer], now: &[SavedLayer]) -> Option<String> {
    if was.len() != now.len() {
        return Some(format!("the chain had {} layers and has {} now", was.len(), now.len()));
    }
    was.iter().zip(now).find_map(|(was, now)| mismatch_of_layer(was, now))
}

fn mismatch_of_layer(was: &SavedLayer, now: &SavedLayer) -> Option<String> {
    if was.format != now.format || was.files.len() != now.files.len() {
        let path = now.files.first().map_or("", |file| &file.path);
        return Some(format!("{path} was {} and is {} now", was.format, now.format));
    }
    was.files.iter().zip(&now.files).find_map(|(was, now)| {
        let path =
            if was.path == now.path { now.path.clone() } else { format!("{} (then {})", now.path, was.path) };
        let changed = |what: &str| Some(format!("{path} {what}"));
        if was.inode != now.inode {
            changed("is another file (another inode)")
        } else if was.size != now.size {
            changed(&format!("had {} bytes and has {} now", was.size, now.size))
        } else if was.modified_ns != now.modified_ns {
            changed("has been written to since (another modification time)")
        } else if was.fingerprint != now.fingerprint {
            changed("has other content (another fingerprint)")
        } else if was.changed_ns != now.changed_ns {
            changed("was given another name or mode since, or was written to (another change time)")
        } else {
            None
        }
    })
}

/// A digest of evenly spread samples, so that the cost does not grow with the file.
fn fingerprint(file: &dyn HostFile, size: u64) -> Result<String> {
    let mut digest = Sha256::new();
    let last = size.saturating_sub(SAMPLE);
    let mut buffer = vec![0; FIRST as usize];
    for number in 0..=SAMPLES {
        let at = (u128::from(last) * u128::from(number) / u128::from(SAMPLES)) as u64;
        let length = if number == 0 { FIRST } else { SAMPLE };
        let sample = &mut buffer[..length.min(size - at) as usize];
        file.read_at(HostOffset(at), sample)?;
        digest.update(sample);
    }
    Ok(hexadecimal(&digest.finalize()))
}

/// Bytes as they are written in the file.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
