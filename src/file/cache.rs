//! Cache modes: whether the kernel keeps pages, and when writes become durable. QEMU's names.

use crate::error::{Error, Result};
use crate::sys;

/// How a file is cached (`-t`, `-T`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Through the page cache; durable at a sync.
    #[default]
    Writeback,
    /// Through the page cache; every write is durable when it returns.
    Writethrough,
    /// Past the page cache (O_DIRECT); durable at a sync.
    None,
    /// Past the page cache; every write is durable when it returns.
    Directsync,
    /// Through the page cache; a sync does nothing: a crash of the machine may cost the image.
    Unsafe,
}

impl CacheMode {
    /// The names of all of them, as QEMU has them.
    pub(crate) const NAMES: [&str; 5] = ["writeback", "writethrough", "none", "directsync", "unsafe"];

    /// The mode of that name.
    ///
    /// # Errors
    /// QEMU has no such mode.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            "none" | "off" => Ok(Self::None),
            "directsync" => Ok(Self::Directsync),
            "unsafe" => Ok(Self::Unsafe),
            _ => Err(Error::invalid(format!("there is no cache mode '{name}'"))
                .hint("it is `writeback`, `writethrough`, `none`, `directsync` or `unsafe`")),
        }
    }

    /// Whether the page cache is left out.
    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a sync does what it says.
    pub(super) fn syncs(self) -> bool {
        self != Self::Unsafe
    }

    /// Flags for `open(2)`.
    pub(super) fn open_flags(self) -> i32 {
        match self {
            Self::Writeback | Self::Unsafe => 0,
            Self::Writethrough => sys::O_DSYNC,
            Self::None => sys::O_DIRECT,
            Self::Directsync => sys::O_DIRECT | sys::O_DSYNC,
        }
    }
}
