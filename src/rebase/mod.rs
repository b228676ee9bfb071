//! The rebase engine (skeleton: signatures).

mod progress;

pub use progress::{Phase, Progress};

use crate::chain::{Chain, Opener};
use crate::error::Result;
use crate::layer::Reference;

/// Whether the guest-visible bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Old and new backing file are compared, what differs is copied.
    Safe,
    /// Only the reference changes (`qemu-img rebase -u`).
    Unsafe,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The new backing file; `None` flattens. A missing format is recognised and recorded.
    pub backing: Option<Reference>,
    /// Safe or not.
    pub mode: Mode,
}

/// What a rebase did, in bytes of guest address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What the overlay did not hold.
    pub missing: u64,
    /// Of that: equal by metadata, not read.
    pub equal: u64,
    /// Of that: read and compared.
    pub compared: u64,
    /// Copied into the overlay as data.
    pub copied: u64,
    /// Stored in the overlay as zero clusters.
    pub zeroed: u64,
}

/// Rebases the overlay on top of `chain` (opened for writing) and returns the chain as it is
/// afterwards, with a fresh top layer. In [`Mode::Unsafe`] the chain may be the top alone.
/// On an error the image is what it was, apart from clusters that it holds by itself now.
pub fn rebase(
    chain: &Chain,
    opener: &Opener,
    request: &Request,
    progress: &Progress,
) -> Result<(Chain, Report)> {
    let _ = (chain, opener, request, progress);
    Err(crate::error::Error::unsupported("rebase is not built yet"))
}
