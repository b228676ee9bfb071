//! `rebasefs umount`: take a mount down and wait for its server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::error::Result;
use crate::mount::{Manner, unmount};

/// Unmount DIR, and wait until its server has let go of the image
///
/// Root can unmount all, other users what they have mounted (with fusermount3). What `umount DIR`
/// does not do: wait, at most two minutes. When this command has succeeded, the image is free for whoever
/// wants to write to it, and what was written to the disk is durable. A rebase that runs is stopped cleanly.
/// A mount whose server has died is cleaned up; of a bind mount only that is taken down.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs umount mnt && qemu-img check cow.qcow2")]
pub(super) struct Arguments {
    /// The directory that an image is mounted on
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,
    /// Unmount although it is in use: it is out of sight at once, and ends with its last user
    #[arg(short, long)]
    lazy: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let manner = if arguments.lazy { Manner::Lazy } else { Manner::Wait };
    unmount(&arguments.mountpoint, manner)?;
    Ok(ExitCode::SUCCESS)
}
