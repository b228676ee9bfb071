//! Placeholder: the front page comes with the whole.

pub mod chain;
pub mod cli;
pub mod error;
pub mod file;
pub mod layer;
pub mod mount;
pub mod rebase;
mod sys;

pub use error::{Error, ErrorKind, Result};
