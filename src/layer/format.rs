//! Disk image formats: their names, and how to recognise them.

use std::fmt;

use crate::error::{Error, Result};
use crate::file::{HostFile, HostOffset};

/// An image format that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

impl Format {
    /// The format of that name. Old images store the protocol where the format belongs.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(Error::unsupported(format!("format '{name}' is not supported"))
                .hint("rebasefs reads raw and qcow2; convert it with `qemu-img convert -O qcow2`")),
        }
    }

    /// Recognises the format from the first bytes of a file; what has no known magic is raw.
    ///
    /// The answer is a guess: whoever writes a raw disk can make it look like anything.
    pub fn recognise(file: &dyn HostFile) -> Result<Self> {
        let mut start = [0; 32];
        file.read_at(HostOffset(0), &mut start)?;
        if start.starts_with(b"QFI\xfb") && u32::from_be_bytes([start[4], start[5], start[6], start[7]]) >= 2
        {
            return Ok(Self::Qcow2);
        }
        match FOREIGN.iter().find(|(_, magic)| start.starts_with(magic)) {
            None => Ok(Self::Raw),
            Some((name, _)) => {
                let what = format!("looks like format {name}, which is not supported");
                let hint = "if it is a raw disk, say so with the format option (`-f raw`, `-F raw`)";
                Err(Error::unsupported(what).path(file.path()).hint(hint))
            }
        }
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
