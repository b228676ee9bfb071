//! The names in the mounted tree: inode ↔ node, and the names that are always the same. Knows neither
//! what the files hold nor how parts of an image are named.

use super::parts::{Folder, Part};

/// The number by which the kernel names a node.
///
/// The low half says which node it is: a kind, and a number among its kind. The high half is its
/// *incarnation*. Of a control file that can be written: a writer that waits for its rebase holds the
/// kernel's lock on the inode, and the next who opens the file shall not queue up behind it, but be told at
/// once that it is busy; each opening for writing begins another one. Of a layer: after a rebase there are other bytes behind the same name, and whoever has
/// the file open goes on reading what it opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inode(pub(super) u64);

/// What stands behind an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory(Directory),
    /// The guest-visible bytes. Layer 0 and those below it show the same: the file has two names.
    Disk,
    Control(ControlFile),
    Part(Part),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Directory {
    Root,
    Control,
    Parts(Folder),
}

/// The files in `ctl/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlFile {
    Backing,
    Cancel,
    Chain,
    Difference,
    Info,
    Map,
    Partitions,
    Rebase,
    Status,
}

impl ControlFile {
    pub(super) fn is_writable(self) -> bool {
        matches!(self, Self::Backing | Self::Cancel | Self::Difference | Self::Rebase)
    }
}

/// What can be in the root; partitions are not, if the disk has none.
const ROOT: [(&str, Node); 5] = [
    ("disk.raw", Node::Disk),
    ("ctl", Node::Directory(Directory::Control)),
    ("layers", Node::Directory(Directory::Parts(Folder::Layers))),
    ("partitions", Node::Directory(Directory::Parts(Folder::Partitions))),
    ("snapshots", Node::Directory(Directory::Parts(Folder::Snapshots))),
];

/// How many files are in `ctl/`.
pub(super) const CONTROL_FILES: usize = 9;

/// What is in `ctl/`.
const CONTROL: [(&str, Node); CONTROL_FILES] = [
    ("backing", Node::Control(ControlFile::Backing)),
    ("cancel", Node::Control(ControlFile::Cancel)),
    ("chain", Node::Control(ControlFile::Chain)),
    ("difference", Node::Control(ControlFile::Difference)),
    ("info", Node::Control(ControlFile::Info)),
    ("map", Node::Control(ControlFile::Map)),
    ("partitions", Node::Control(ControlFile::Partitions)),
    ("rebase", Node::Control(ControlFile::Rebase)),
    ("status", Node::Control(ControlFile::Status)),
];

impl Directory {
    /// The names in it that are always the same.
    pub(super) fn names(self) -> &'static [(&'static str, Node)] {
        match self {
            Self::Root => &ROOT,
            Self::Control => &CONTROL,
            Self::Parts(_) => &[],
        }
    }
}

/// Bits of the number among its kind; the kind lies above them.
const NUMBER_BITS: u32 = 24;

impl Inode {
    pub(super) const ROOT: Self = Self(1);
    pub(super) const DISK: Self = Self(2);

    /// What stands behind it, in any incarnation.
    pub(super) fn node(self) -> Option<Node> {
        let low = self.0 as u32;
        let (kind, number) = (low >> NUMBER_BITS, low & ((1 << NUMBER_BITS) - 1));
        match (kind, number) {
            (0, 1) => Some(Node::Directory(Directory::Root)),
            (0, n) => ROOT.get((n as usize).checked_sub(2)?).map(|(_, node)| *node),
            (1, n) => CONTROL.get(n as usize).map(|(_, node)| *node),
            (2, 0) => None,
            (2, n) => Some(Node::Part(Part::Layer(n))),
            (3, n) => Some(Node::Part(Part::Snapshot(n))),
            (4, n) => Some(Node::Part(Part::Partition(n))),
            _ => None,
        }
    }

    pub(super) fn incarnation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Node {
    /// Its inode, in the incarnation given if it has several.
    pub(super) fn inode(self, incarnation: u32) -> Inode {
        let place = |table: &[(&str, Self)]| table.iter().position(|(_, node)| *node == self);
        // All that are not found are in a table.
        let always = || place(&ROOT).map_or(1, |place| place as u32 + 2);
        let (kind, number) = match self {
            Self::Directory(_) | Self::Disk => (0, always()),
            Self::Part(Part::Layer(0)) => return Inode::DISK,
            Self::Control(_) => (1, place(&CONTROL).unwrap_or_default() as u32),
            Self::Part(Part::Layer(n)) => (2, n),
            Self::Part(Part::Snapshot(n)) => (3, n),
            Self::Part(Part::Partition(n)) => (4, n),
        };
        let has_incarnations = match self {
            Self::Control(file) => file.is_writable(),
            _ => matches!(self, Self::Part(Part::Layer(_))),
        };
        let high = u64::from(if has_incarnations { incarnation } else { 0 });
        Inode(high << 32 | u64::from(kind << NUMBER_BITS | number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_has_an_inode_and_leads_back() {
        let parts = [1, 4096].map(Part::Layer).into_iter().chain([0, 65535].map(Part::Snapshot));
        let parts = parts.chain([1, 4096].map(Part::Partition)).map(Node::Part);
        let nodes = ROOT.iter().chain(&CONTROL).map(|(_, node)| *node).chain(parts);
        let nodes = [Node::Directory(Directory::Root)].into_iter().chain(nodes);
        let mut seen = Vec::new();
        for node in nodes {
            let inode = node.inode(7);
            assert_eq!(inode.node(), Some(node));
            assert!(!seen.contains(&inode) && [0, 7].contains(&inode.incarnation()));
            seen.push(inode);
        }
        assert_eq!(Node::Directory(Directory::Root).inode(9), Inode::ROOT);
        assert_eq!((Node::Disk.inode(9), Node::Part(Part::Layer(0)).inode(9)), (Inode::DISK, Inode::DISK));
        let backing = Node::Control(ControlFile::Backing);
        assert_ne!(backing.inode(7), backing.inode(8));
        let status = Node::Control(ControlFile::Status);
        assert_eq!(status.inode(7), status.inode(8));
        assert_ne!(Node::Part(Part::Layer(1)).inode(7), Node::Part(Part::Layer(1)).inode(8));
        assert_eq!(Node::Part(Part::Snapshot(1)).inode(7), Node::Part(Part::Snapshot(1)).inode(8));
    }

    #[test]
    fn what_is_no_inode_leads_nowhere() {
        for number in [0, 99, 1 << NUMBER_BITS | 99, 2 << NUMBER_BITS, u64::MAX, 1 << 31] {
            assert_eq!(Inode(number).node(), None, "{number:#x}");
        }
    }
}
