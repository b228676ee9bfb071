//! What `stat` shows of the files in the tree, and how long the kernel may believe it.

use std::time::{Duration, SystemTime};

use super::flat::Allocated;
use super::times::Moved;
use super::tree::Inode;

/// How long the kernel may go on believing what does not change, or of which it will be told.
pub(super) const FOREVER: Duration = Duration::from_secs(24 * 3600);

/// What `stat` shows of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) inode: Inode,
    pub(super) is_directory: bool,
    pub(super) size: u64,
    /// In units of 512 bytes.
    pub(super) blocks: u64,
    pub(super) permissions: u16,
    pub(super) links: u32,
    /// When what it shows may have changed last.
    pub(super) moved: Moved,
    /// When somebody says that it was modified, if somebody has and it still holds.
    pub(super) dated: Option<SystemTime>,
    /// How long the attributes hold.
    pub(super) valid: Duration,
    /// How long the name leads to this inode.
    pub(super) name_valid: Duration,
}

impl Attributes {
    /// Those of a directory.
    pub(super) fn of_directory(inode: Inode) -> Self {
        Self {
            inode,
            is_directory: true,
            size: 0,
            blocks: 0,
            permissions: 0o555,
            // As btrfs has it: nobody counts what lies in it.
            links: 1,
            moved: Moved::default(),
            dated: None,
            valid: FOREVER,
            name_valid: FOREVER,
        }
    }

    /// Those of a file with guest bytes that is for reading.
    pub(super) fn of_data(inode: Inode, size: u64, allocated: Allocated) -> Self {
        let (bytes, valid) = match allocated {
            Allocated::Exactly(bytes) => (bytes, FOREVER),
            Allocated::AtMost(bytes) => (bytes, Duration::ZERO),
        };
        Self {
            inode,
            is_directory: false,
            size,
            blocks: bytes.div_ceil(512),
            permissions: 0o444,
            links: 1,
            moved: Moved::default(),
            dated: None,
            valid,
            // After a rebase it may lead to another one.
            name_valid: Duration::ZERO,
        }
    }
}
