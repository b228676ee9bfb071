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
//! [`Layer::extent_at`](layer::Layer::extent_at) answers it for one image, from metadata alone;
//! [`Chain::extent_at`] walks the list of layers once and says which of them owns the bytes. Reading,
//! `SEEK_HOLE`, `map`, `compare` and the plan of a rebase are short loops over that answer. A chain is
//! a list, and no layer knows what lies below it.
//!
//! | module | one responsibility |
//! |---|---|
//! | `cli` | parse what was typed, call the library, print, exit code; a file a subcommand |
//! | [`mount`](mod@mount) | the mounted view: `disk.raw` and the control files |
//! | [`rebase`](mod@rebase) | the engine, and the only list of its phases and durability barriers |
//! | [`chain`] | open a chain (names, formats, loops, policy), ask for extents, read |
//! | [`layer`] | one image, opened: raw or qcow2 |
//! | [`file`](mod@file) | positioned I/O, holes, sync and locks of host files |
//! | [`error`] | one error: what, while doing what, to which file, where; and its errno |
//! | `shown` | text that a terminal can be shown: one line, nothing that it obeys |
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
//! # The API
//!
//! Each example here runs on the same disks: `cow.qcow2` has 1 MiB and stands on `old.img`, which is full
//! of `0x11`; `new.img` is the same but for its first half, full of `0x22`.
//!
//! **Open and read.** [`Chain::open`] opens an image with all below it, for reading;
//! [`Opener`](chain::Opener) does so in other ways. [`Chain::read_at`] gives the guest's bytes.
//!
//! ```
//! use rebasefs::{Chain, GuestOffset};
//! # use rebasefs::file::LocalFile;
//! # use rebasefs::layer::qcow2::create::{Spec, create};
//! # use rebasefs::layer::{Format, Reference};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let place = |name: &str| directory.path().join(name);
//! # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
//! # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
//! # let old = Some(Reference::new("old.img", Format::Raw));
//! # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
//! # let cow = place("cow.qcow2");
//! # create(&LocalFile::create(&cow)?, None, &spec)?;
//! let chain = Chain::open(&cow)?;
//! let mut sector = [0; 512];
//! chain.read_at(GuestOffset(64 << 10), &mut sector)?;
//! assert_eq!(sector, [0x11; 512]);
//! println!("{} bytes, {} layers", chain.virtual_size(), chain.layers().len());
//! # Ok(())
//! # }
//! ```
//!
//! **Map.** [`Chain::extents`] says where the bytes of a range come from, and which are zeros, from
//! metadata; [`Chain::map`] says it in the words of `qemu-img map`.
//!
//! ```
//! use rebasefs::{Chain, Detail, GuestOffset};
//! # use rebasefs::file::LocalFile;
//! # use rebasefs::layer::qcow2::create::{Spec, create};
//! # use rebasefs::layer::{Format, Reference};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let place = |name: &str| directory.path().join(name);
//! # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
//! # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
//! # let old = Some(Reference::new("old.img", Format::Raw));
//! # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
//! # let cow = place("cow.qcow2");
//! # create(&LocalFile::create(&cow)?, None, &spec)?;
//! let chain = Chain::open(&cow)?;
//! for extent in chain.extents(.., Detail::Holes).joined() {
//!     let (at, owned) = extent?;
//!     let layer = owned.depth.map(|depth| chain.layers()[depth].file().path());
//!     println!("{at:#x}: {} bytes of {layer:?}", owned.extent.length);
//!     assert_eq!((at, owned.extent.length), (GuestOffset(0), 1 << 20));
//!     assert_eq!(layer, Some(place("old.img").as_path()));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! **Plan.** A [`Rebase`] is put together word by word: which image, onto what, how.
//! [`plan`](rebase::SafeRebase::plan) finds out what it would do, and writes nothing.
//!
//! ```
//! use rebasefs::Rebase;
//! # use rebasefs::file::LocalFile;
//! # use rebasefs::layer::qcow2::create::{Spec, create};
//! # use rebasefs::layer::{Format, Reference};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let place = |name: &str| directory.path().join(name);
//! # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
//! # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
//! # let old = Some(Reference::new("old.img", Format::Raw));
//! # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
//! # let cow = place("cow.qcow2");
//! # create(&LocalFile::create(&cow)?, None, &spec)?;
//! let found = Rebase::new(&cow).onto("new.img").plan()?;
//! for range in &found.ranges {
//!     println!("{:#x}: {} bytes would be copied", range.start, range.length);
//! }
//! assert_eq!(found.report.copied, 512 << 10);
//! # Ok(())
//! # }
//! ```
//!
//! **Rebase, watch, stop.** [`run`](rebase::SafeRebase::run) does it. Another thread may look at its
//! [`Progress`], and cancel it: then the image stands on its old backing file still, and what was copied
//! is not copied again. [`run_watched`](rebase::SafeRebase::run_watched) calls a closure instead.
//!
//! ```
//! use std::time::Duration;
//!
//! use rebasefs::layer::{Format, Reference};
//! use rebasefs::{Progress, Rebase};
//! # use rebasefs::file::LocalFile;
//! # use rebasefs::layer::qcow2::create::{Spec, create};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let place = |name: &str| directory.path().join(name);
//! # std::fs::write(place("old.img"), vec![0x11; 1 << 20])?;
//! # std::fs::write(place("new.img"), [[0x22; 512 << 10], [0x11; 512 << 10]].concat())?;
//! # let old = Some(Reference::new("old.img", Format::Raw));
//! # let spec = Spec { size: 1 << 20, backing: old, ..Spec::default() };
//! # let cow = place("cow.qcow2");
//! # create(&LocalFile::create(&cow)?, None, &spec)?;
//! let rebase = Rebase::new(&cow).onto(Reference::new("new.img", Format::Raw)).verify();
//! let progress = Progress::default();
//! let done = std::thread::scope(|threads| {
//!     let work = threads.spawn(|| rebase.run(&progress));
//!     while !work.is_finished() {
//!         println!("{}: {:.0} %", progress.phase().word(), progress.fraction() * 100.0);
//!         std::thread::sleep(Duration::from_millis(10)); // or, to stop it: progress.cancel()
//!     }
//!     work.join().expect("no panic")
//! })?;
//! assert_eq!(done.report.copied, 512 << 10);
//! # let mut bytes = vec![0; 1 << 20];
//! # done.chain.read_at(rebasefs::GuestOffset(0), &mut bytes)?;
//! # assert!(bytes.iter().all(|byte| *byte == 0x11));
//! # Ok(())
//! # }
//! ```
//!
//! Rebases that share [`Differences`](rebase::Differences) compare the same two backing files once. What
//! changes the guest's bytes has another name: [`record_only`](Rebase::record_only) lets the header name
//! another file, for one that was moved, and looks into neither.
//!
//! **Mount.** [`mount()`] serves the disk as `mnt/disk.raw`, and rebases when it is told to in `mnt/ctl/`;
//! [`Mount`] does so in other ways.
//!
//! ```no_run
//! # fn main() -> rebasefs::Result<()> {
//! let mounted = rebasefs::mount("cow.qcow2", "mnt")?;
//! println!("{} bytes", std::fs::metadata("mnt/disk.raw").map_or(0, |disk| disk.len()));
//! // Until `umount mnt`, or a signal.
//! mounted.serve()
//! # }
//! ```
//!
//! Beside these there are the [layers](layer) of a chain by themselves, qcow2 images to
//! [create](layer::qcow2::create), [check](layer::qcow2::check) and [repair](layer::qcow2::repair), and
//! [`HostFile`](file::HostFile), under which a layer can lie in something else than a file of this
//! machine. Everything that fails says so with an [`Error`]: its [kind](ErrorKind), what was being done,
//! to which file, at which offset, and what to do about it.
//!
//! What may grow is `#[non_exhaustive]`. What is hidden from this documentation serves the program and its
//! tests, and promises nothing.

pub mod chain;
#[doc(hidden)]
pub mod cli;
pub mod error;
pub mod file;
pub mod layer;
pub mod mount;
pub mod rebase;
mod shown;
mod sys;

pub use chain::Chain;
pub use error::{Error, ErrorKind, Result};
pub use layer::{Detail, GuestOffset};
pub use mount::{Mount, mount};
pub use rebase::{Progress, Rebase};
