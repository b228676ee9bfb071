//! The names in the mounted tree: inode ↔ name ↔ node. A table, known in full when the mount
//! begins; knows nothing of what the files hold.

use std::ffi::{OsStr, OsString};

/// The number by which the kernel names a node.
///
/// The low half is the place in the table. The high half is the *incarnation* of a control file:
/// a writer that waits for its rebase holds the kernel's lock on the inode, and the next who
/// opens the file shall not queue up behind it, but be told at once that it is busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inode(pub(super) u64);

/// What stands behind an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory,
    /// The guest-visible bytes.
    Disk,
    Control(ControlFile),
}

/// The files in `ctl/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlFile {
    Backing,
    Cancel,
    Chain,
    Rebase,
    Status,
}

impl ControlFile {
    pub(super) fn is_writable(self) -> bool {
        matches!(self, Self::Backing | Self::Cancel | Self::Rebase)
    }

    pub(super) fn is_readable(self) -> bool {
        !matches!(self, Self::Cancel)
    }
}

#[derive(Debug)]
struct Entry {
    parent: u32,
    name: OsString,
    node: Node,
}

/// The table of names.
#[derive(Debug)]
pub(super) struct Tree {
    /// The entry at index n has inode n + 1, so that the root is 1, as FUSE demands.
    entries: Vec<Entry>,
}

impl Inode {
    pub(super) const ROOT: Self = Self(1);
    pub(super) const DISK: Self = Self(2);

    fn new(index: u32, incarnation: u32) -> Self {
        Self(u64::from(incarnation) << 32 | u64::from(index + 1))
    }

    /// Index in the table; beyond its end for what is no inode at all.
    fn index(self) -> usize {
        (self.0 as u32).wrapping_sub(1) as usize
    }
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut tree = Self { entries: Vec::new() };
        let root = tree.add(0, "/", Node::Directory);
        tree.add(root, "disk.raw", Node::Disk);
        let control = tree.add(root, "ctl", Node::Directory);
        for (name, file) in [
            ("backing", ControlFile::Backing),
            ("cancel", ControlFile::Cancel),
            ("chain", ControlFile::Chain),
            ("rebase", ControlFile::Rebase),
            ("status", ControlFile::Status),
        ] {
            tree.add(control, name, Node::Control(file));
        }
        tree
    }

    fn add(&mut self, parent: u32, name: &str, node: Node) -> u32 {
        self.entries.push(Entry { parent, name: name.into(), node });
        self.entries.len() as u32 - 1
    }

    /// What stands behind `inode`, in any incarnation.
    pub(super) fn node(&self, inode: Inode) -> Option<Node> {
        self.entries.get(inode.index()).map(|entry| entry.node)
    }

    /// The child of a directory; a control file in the incarnation given.
    pub(super) fn child(&self, parent: Inode, name: &OsStr, incarnation: u32) -> Option<Inode> {
        let (index, entry) = self.within(parent).find(|(_, entry)| entry.name == name)?;
        let incarnation = if matches!(entry.node, Node::Control(_)) { incarnation } else { 0 };
        Some(Inode::new(index, incarnation))
    }

    /// The children of a directory.
    pub(super) fn children(&self, parent: Inode) -> impl Iterator<Item = (Inode, &OsStr)> {
        self.within(parent).map(|(index, entry)| (Inode::new(index, 0), entry.name.as_os_str()))
    }

    /// The directory that holds `inode`; the root holds itself.
    pub(super) fn parent(&self, inode: Inode) -> Inode {
        let entry = self.entries.get(inode.index());
        entry.map_or(Inode::ROOT, |entry| Inode::new(entry.parent, 0))
    }

    /// How many directories lie in a directory.
    pub(super) fn subdirectories(&self, parent: Inode) -> u32 {
        self.within(parent).filter(|(_, entry)| entry.node == Node::Directory).count() as u32
    }

    fn within(&self, parent: Inode) -> impl Iterator<Item = (u32, &Entry)> {
        let root_is_in_itself = 1;
        let numbered = (0..).zip(&self.entries).skip(root_is_in_itself);
        numbered.filter(move |(_, entry)| entry.parent as usize == parent.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_to_its_node_and_back() {
        let tree = Tree::new();
        let names: Vec<_> = tree.children(Inode::ROOT).map(|(_, name)| name.to_owned()).collect();
        assert_eq!(names, ["disk.raw", "ctl"]);
        assert_eq!(tree.node(Inode::DISK), Some(Node::Disk));
        let control = tree.child(Inode::ROOT, "ctl".as_ref(), 7).unwrap();
        assert_eq!(tree.parent(control), Inode::ROOT);
        let backing = tree.child(control, "backing".as_ref(), 7).unwrap();
        assert_eq!(tree.node(backing), Some(Node::Control(ControlFile::Backing)));
        assert_eq!(tree.parent(backing), control);
        assert_ne!(tree.child(control, "backing".as_ref(), 8), Some(backing));
        assert_eq!(tree.child(control, "missing".as_ref(), 0), None);
        assert_eq!((tree.subdirectories(Inode::ROOT), tree.subdirectories(control)), (1, 0));
    }

    #[test]
    fn what_is_no_inode_leads_nowhere() {
        let tree = Tree::new();
        assert_eq!(tree.node(Inode(0)), None);
        assert_eq!(tree.node(Inode(u64::MAX)), None);
        assert_eq!(tree.children(Inode(2)).count(), 0);
    }
}
