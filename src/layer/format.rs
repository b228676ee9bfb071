//! Disk image formats: their names, and how to recognise them.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

/// An image format that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk, and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// Formats that QEMU would recognise and we do not read, with the magic bytes they begin with.
/// Taken for raw, they would show their headers to the guest.
const FOREIGN: &[(&str, &[u8])] = &[
    ("qcow (version 1)", b"QFI\xfb\0\0\0\x01"),
    ("qed", b"QED\0"),
    ("vmdk", b"KDMV"),
    ("vmdk", b"COWD"),
    ("vmdk", b"# Disk DescriptorFile"),
    ("vhdx", b"vhdxfile"),
    ("vpc", b"conectix"),
    ("luks", b"LUKS\xba\xbe"),
    ("parallels", b"WithoutFreeSpace"),
    ("parallels", b"WithouFreSpacExt"),
    ("bochs", b"Bochs Virtual HD Image"),
];

/// What the ends of file names promise: the end, and the format in our words.
const NAMED: &[(&str, &str)] = &[
    ("qcow2", "qcow2"),
    ("qcow3", "qcow2"),
    // Many a qcow2 image has the old name.
    ("qcow", "qcow2"),
    ("raw", "raw"),
    ("qed", "qed"),
    ("vmdk", "vmdk"),
    ("vdi", "vdi"),
    ("vhdx", "vhdx"),
    ("vhd", "vpc"),
    ("vpc", "vpc"),
    ("luks", "luks"),
    ("hdd", "parallels"),
    ("hds", "parallels"),
];

/// QEMU's names of image formats that we do not read.
const QEMU_ALONE: [&str; 11] =
    ["bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

/// The one that hides its magic bytes further in: VirtualBox's, at offset 64.
const VDI: (usize, &[u8]) = (64, b"\x7f\x10\xda\xbe");

impl Format {
    /// The names of all of them.
    pub(crate) const NAMES: [&str; 2] = ["raw", "qcow2"];

    /// The format of that name. Old images store the protocol where the format belongs.
    ///
    /// # Errors
    /// We do not read that format.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(Error::unsupported(format!("format '{name}' is not supported")).hint(
                "it is `raw` or `qcow2`; others are converted with `qemu-img convert -O qcow2 FILE NEW`",
            )),
        }
    }

    /// Whether QEMU has a format of that name, be it one that we read or not: such a name can be recorded.
    pub(crate) fn is_named(name: &str) -> bool {
        Self::from_name(name).is_ok() || QEMU_ALONE.contains(&name)
    }

    /// Recognises the format from the first bytes of a file; what has no known magic is raw.
    ///
    /// The answer is a guess: whoever writes a raw disk can make it look like anything.
    ///
    /// # Errors
    /// The file cannot be read, or looks like a format that we do not read.
    pub fn recognise(file: &dyn HostFile) -> Result<Self> {
        let mut start = [0; 68];
        file.read_at(HostOffset(0), &mut start)?;
        if start.starts_with(b"QFI\xfb") && u32::from_be_bytes([start[4], start[5], start[6], start[7]]) >= 2
        {
            return Ok(Self::Qcow2);
        }
        let foreign = FOREIGN.iter().find(|(_, magic)| start.starts_with(magic)).map(|(name, _)| *name);
        match foreign.or_else(|| start[VDI.0..].starts_with(VDI.1).then_some("vdi")) {
            None => Ok(Self::Raw),
            Some(name) => {
                let what = format!("looks like format {name}, which is not supported");
                let hint = "convert it with `qemu-img convert -O qcow2 FILE NEW`; if it is a raw disk all the same, say `-f raw`, of a backing file `-F raw`";
                Err(Error::unsupported(what).path(file.path()).hint(hint))
            }
        }
    }

    /// Refuses a format that was recognised from the content of a file where its name promises another: the
    /// one or the other is not what somebody thinks it is, and a guest would be shown a header, or not be
    /// shown what it holds. A name that promises nothing (`.img`) agrees with all.
    ///
    /// # Errors
    /// They do not agree ([`ErrorKind::Unsupported`](crate::error::ErrorKind::Unsupported)).
    pub(crate) fn refuse_other_name(self, path: &Path) -> Result<()> {
        let end = path.extension().unwrap_or_default().to_ascii_lowercase();
        let promised = NAMED.iter().find(|(name, _)| end == *name).map(|(_, format)| *format);
        let own = self.to_string();
        let Some(promised) = promised.filter(|promised| *promised != own) else { return Ok(()) };
        let what = format!("by its name it is {promised}, but by its content {own}");
        let hint = match self {
            Self::Raw => "if it is a raw disk all the same, say `-f raw`, of a backing file `-F raw`",
            Self::Qcow2 => "if it is qcow2 all the same, say `-f qcow2`, of a backing file `-F qcow2`",
        };
        Err(Error::unsupported(what).path(path).hint(hint))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Access, CacheMode, LocalFile};

    fn recognised(start: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, start).unwrap();
        let file = LocalFile::open(&path, Access::ReadOnly, CacheMode::default()).unwrap();
        Format::recognise(&file).map_or_else(|e| e.to_string(), |format| format.to_string())
    }

    #[test]
    fn formats_are_recognised_by_their_first_bytes_and_foreign_ones_refused() {
        assert_eq!(recognised(b""), "raw");
        assert_eq!(recognised(b"QFI"), "raw");
        assert_eq!(recognised(b"QFI\xfb\0\0\0\x03"), "qcow2");
        assert!(recognised(b"QFI\xfb\0\0\0\x01").contains("qcow (version 1)"));
        assert!(recognised(b"KDMV").contains("vmdk"));
        assert!(recognised(b"LUKS\xba\xbe\0\x01").contains("luks"));
        assert!(recognised(&[&[b' '; 64], &b"\x7f\x10\xda\xbe"[..]].concat()).contains("vdi"));
    }
    #[test]
    fn a_name_that_promises_another_format_is_refused() {
        let refused = |format: Format, name: &str| format.refuse_other_name(Path::new(name)).is_err();
        for name in ["a.qcow2", "a.QCOW2", "d.raw/a.qcow", "a.vmdk", "a.vdi", "a.vhdx", "a.vhd", "a.qed"] {
            assert!(refused(Format::Raw, name), "{name}");
        }
        for name in ["a", "a.img", "a.raw", ".qcow2", "a.qcow2.bak", "qcow2", "d.qcow2/a", "a.iso", ""] {
            assert!(!refused(Format::Raw, name), "{name}");
        }
        assert!(["a.raw", "a.vmdk", "a.vdi"].iter().all(|name| refused(Format::Qcow2, name)));
        assert!(["a.qcow2", "a.qcow", "a.img", "a"].iter().all(|name| !refused(Format::Qcow2, name)));
    }
}
