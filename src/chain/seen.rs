//! What a chain that is being opened has above the next layer, and what that must not stand on: no disk
//! stands on itself, be it through a name, a device, a file system or another mount.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use super::ground::Ground;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{HostFile, Identity};

/// What a chain that is being opened has above the next layer.
#[derive(Default)]
pub(super) struct Seen {
    /// Each file in the order of the chain, and its depth; that of the overlay is not known.
    files: Vec<Identity>,
    depths: HashMap<Identity, Option<usize>>,
    /// Whether the chain is going to stand under an overlay.
    has_overlay: bool,
    /// What the first of the files stands on.
    ground: Option<Ground>,
    /// What those on a file system, or on a device, stand on, and how many of the files are known not to be
    /// among that.
    grounds: HashMap<Identity, (Ground, usize)>,
    is_mount_told: bool,
}

/// What was found below a file.
enum Circle {
    None,
    /// Another mount of ours, but no circle.
    Mount,
    /// Our own.
    OwnMount,
    /// What is above it in the chain.
    OnTop,
    /// It is below the image itself.
    Below,
}

impl Seen {
    /// Below an overlay that stands on this.
    pub fn under(overlay: Identity, ground: Ground) -> Self {
        let depths = HashMap::from([(overlay, None)]);
        Self { files: vec![overlay], depths, ..Self::at(ground) }
    }

    /// Below an overlay that will be made on this.
    pub fn at(ground: Ground) -> Self {
        Self { has_overlay: true, ground: Some(ground), ..Self::default() }
    }

    pub fn known(&self, file: Identity) -> Option<Option<usize>> {
        self.depths.get(&file).copied()
    }

    pub fn add(&mut self, file: Identity, depth: usize) -> Result<()> {
        if self.ground.is_none() {
            self.ground = Some(Ground::of(file)?);
        }
        self.files.push(file);
        self.depths.insert(file, Some(depth));
        Ok(())
    }

    fn look_below(&mut self, file: Identity, own_mount: Option<u64>) -> Result<Circle> {
        if self.ground.as_ref().is_some_and(|ground| ground.has(file)) {
            return Ok(Circle::Below);
        }
        // All files of a file system stand on the same.
        let key = if file.is_block_device() { file } else { Identity { inode: 0, ..file } };
        let (ground, clear) = match self.grounds.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert((Ground::of(file)?, 0)),
        };
        if own_mount.is_some_and(|device| ground.has_file_system(device)) {
            return Ok(Circle::OwnMount);
        }
        let mut above = self.files[*clear..].iter();
        if ground.has(file) || above.any(|above| ground.has(*above)) {
            return Ok(Circle::OnTop);
        }
        *clear = self.files.len();
        Ok(if ground.has_mount() { Circle::Mount } else { Circle::None })
    }

    /// Refuses a file below which, by loop devices, file systems or other mounts, lies what it is going to
    /// stand under. Nothing of it has been read yet: that could wait for ourselves.
    pub fn refuse_circles(
        &mut self,
        file: &dyn HostFile,
        depth: usize,
        own_mount: Option<u64>,
    ) -> Result<()> {
        let circle = match self.look_below(file.identity(), own_mount).path(file.path())? {
            Circle::None => return Ok(()),
            Circle::Mount => {
                if (depth > 0 || self.has_overlay) && !std::mem::replace(&mut self.is_mount_told, true) {
                    log::warn!(
                        "{}: lies in another mount of rebasefs, or stands on it: it can be read as long as \
                         that is mounted",
                        file.path().display()
                    );
                }
                return Ok(());
            }
            Circle::OwnMount => "stands on this mount, through a device or another mount",
            Circle::OnTop => {
                "stands on what is above it in the chain, through a device, a file system or another mount"
            }
            Circle::Below => "is what the image itself lies on, through a device, a file system or a mount",
        };
        Err(a_loop(file.path(), format!("{circle}: the disk would stand on itself")))
    }
}

pub(super) fn a_loop(path: &Path, what: String) -> Error {
    let hint = "another file is needed: `rebasefs info --backing-chain FILE` shows the chain of one";
    Error::new(ErrorKind::Loop, what).path(path).hint(hint)
}
