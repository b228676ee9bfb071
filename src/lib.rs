//! rebasefs: read a copy-on-write disk image through its backing chain, mount it as a flat file,
//! and give it another backing file without changing a byte that the guest sees.
//!
//! # The picture
//!
//! ```text
//! kernel ── mount ──────────┐
//!                           ├── chain ── layer/{raw, qcow2} ── file ── sys
//! cli ───── rebase ─────────┘
//!         plan → compare → copy → swap → reclaim
//! ```
//!
//! Imports run downwards only: from left to right in the picture, and `mount` and `cli` call
//! `rebase`. Everything is built on one question, *where do these guest bytes come from?*
//! [`Layer::extent_at`] answers it for one image, from metadata alone; [`Chain::extent_at`] walks
//! the list of layers once and says which of them owns the bytes. Reading, `SEEK_HOLE`, `map`,
//! `compare` and the plan of a rebase are short loops over that answer. A chain is a list, and no
//! layer knows what lies below it.
//!
//! | module | one responsibility |
//! |---|---|
//! | `cli` | parse what was typed, call the library, print, exit code; a file a subcommand |
//! | [`mount`](mod@mount) | the mounted view: `disk.raw` and the control files |
//! | [`rebase`] | the engine, and the only list of its phases and durability barriers |
//! | [`chain`] | open a chain (names, formats, loops, policy), ask for extents, read |
//! | [`layer`] | one image, opened: raw or qcow2 |
//! | [`file`](mod@file) | positioned I/O, holes, sync and locks of host files |
//! | [`error`] | one error: what, while doing what, to which file, where; and its errno |
//! | `sys` | system calls that std lacks; the only `unsafe` |
//!
//! # Invariants
//!
//! Every change is read against these.
//!
//! - **I1** A safe rebase never changes a guest-visible byte, at any instant, for any reader; not
//!   of the active disk, and not of any internal snapshot. So the kernel's page cache stays valid
//!   across it.
//! - **I2** The file on disk is valid at every instant, whatever is lost of the writes not yet
//!   synced: data before the L2 entry that points to it, refcount before the pointer. Leaked
//!   clusters are allowed, dangling or doubly used ones never.
//! - **I3** All that was copied is durable (data, refcounts, L2, L1, fdatasync) *before* the header
//!   names the new backing file. The header swap is one write of one sector where the header allows
//!   it (the name is put in place first), then fdatasync; then, and only then, the chain in memory
//!   is replaced.
//! - **I4** Nothing that a live reader or a snapshot may still read is freed: reclaim comes after
//!   the swap is durable and the old chain is gone.
//! - **I5** Old and new backing files are opened for reading only and are bit for bit what they
//!   were.
//! - **I6** What is not understood is refused by name (unknown incompatible bit, reserved bit,
//!   encryption …), never masked.
//!
//! # The API in a few lines
//!
//! An [`Opener`] opens a [`Chain`], which is read with [`Chain::read_at`]; [`rebase::rehearse`] tells
//! what a rebase would do, [`rebase::rebase`] does it and returns the chain on its new backing file; [`Mount`] serves one over FUSE. Rebases that
//! share [`rebase::Differences`] compare their backing files once; [`rebase::Many`] runs them.
//!
//! ```
//! use rebasefs::chain::Opener;
//! use rebasefs::file::{Access, LocalFile};
//! use rebasefs::layer::qcow2::create::{Spec, create};
//! use rebasefs::layer::{Detail, GuestOffset, Reference};
//! use rebasefs::rebase::{Progress, Request, rebase, rehearse};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let place = |name: &str| directory.path().join(name);
//! // Two disks of 1 MiB, and an overlay that stands on the first.
//! std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
//! std::fs::write(place("new.img"), vec![0x22; 1 << 20])?;
//! let named = |name: &str| Reference { name: name.into(), format: Some("raw".into()) };
//! let overlay = place("cow.qcow2");
//! let spec = Spec { size: 1 << 20, backing: Some(named("old.img")), ..Spec::default() };
//! create(&LocalFile::create(&overlay)?, None, &spec)?;
//!
//! // What its guest would see.
//! let opener = Opener::new();
//! let chain = opener.chain(&overlay, None, Access::ReadWrite)?;
//! let mut bytes = [0; 512];
//! chain.read_at(GuestOffset(0x8000), &mut bytes)?;
//! assert_eq!(bytes, [0x11; 512]);
//!
//! // Where that comes from: all of it from layer 1, none from the overlay.
//! let extent = chain.extent_at(GuestOffset(0), 1 << 20, Detail::Holes)?;
//! assert_eq!((extent.depth, extent.extent.length), (Some(1), 1 << 20));
//!
//! // What a rebase would do. Nothing is written.
//! let request = Request { backing: Some(named("new.img")), ..Request::default() };
//! let rehearsal = rehearse(&chain, &opener, &request, &Progress::default())?;
//! assert_eq!(rehearsal.report.copied, 1 << 20);
//!
//! // The rebase, while somebody looks how far it is. He could stop it: `progress.cancel()`.
//! let progress = Progress::default();
//! let (chain, report) = std::thread::scope(|threads| {
//!     let work = threads.spawn(|| rebase(&chain, &opener, &request, &progress));
//!     while !work.is_finished() {
//!         println!("{}: {:.0} %", progress.phase().word(), progress.fraction() * 100.0);
//!         std::thread::sleep(std::time::Duration::from_millis(10));
//!     }
//!     work.join().expect("no panic")
//! })?;
//!
//! // It stands on the second disk now, and its guest sees the same.
//! chain.read_at(GuestOffset(0x8000), &mut bytes)?;
//! assert_eq!(bytes, [0x11; 512]);
//! assert_eq!(chain.layers()[1].file().path(), place("new.img"));
//! assert_eq!(report.copied, 1 << 20);
//! # Ok(())
//! # }
//! ```
//!
//! [`Layer::extent_at`]: layer::Layer::extent_at
//! [`Chain`]: chain::Chain
//! [`Chain::extent_at`]: chain::Chain::extent_at
//! [`Chain::read_at`]: chain::Chain::read_at
//! [`Opener`]: chain::Opener

pub mod chain;
#[doc(hidden)]
pub mod cli;
pub mod error;
pub mod file;
pub mod layer;
pub mod mount;
pub mod rebase;
mod sys;

pub use chain::Chain;
pub use error::{Error, ErrorKind, Result};
pub use layer::{Detail, GuestOffset};
pub use mount::{Mount, mount};
