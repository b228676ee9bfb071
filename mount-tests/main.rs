//! Tests against the real QEMU tools and real mounts: one binary, one file an area.
//!
//! A test is drawn as the picture of its clusters and ends with an outside oracle.

mod check;
mod scratch;
