//! Tests against the real QEMU tools and real mounts: one binary, one file an area.
//!
//! A test is drawn as the picture of its clusters and ends with an outside oracle.

// A test that cannot go on panics, in its helpers too.
#![allow(clippy::unwrap_used)]

mod changed;
mod check;
mod compare;
mod control;
mod crash;
mod create;
mod errno;
mod failing;
mod hints;
mod hostile;
mod info;
mod interrupted;
mod kill;
mod library;
mod locks;
mod many;
mod map;
mod meanwhile;
mod memory_file;
mod mount;
mod mounted;
mod output;
mod partitions;
mod picture;
mod progress;
mod random_chain;
mod read_only;
mod reading;
mod readme;
mod real_input;
mod rebase;
mod repair;
mod room;
mod scratch;
mod shown;
mod system;
mod tables;
mod terminal;
mod traced;
mod tree;
mod typing;
mod umount;
mod walked;
mod writing;
