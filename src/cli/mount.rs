//! `rebasefs mount`: check what was typed, mount, and serve: in the background, unless told
//! otherwise.

use std::fs::File;
use std::io::{self, IsTerminal, PipeReader, PipeWriter, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::messages::Time;
use super::mount_options::{self, Words};
use super::options::Opening;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::output;
use crate::layer::Format;
use crate::mount::{Mount, MountOptions, Mounted, Writing};
use crate::sys::{self, Fork};

/// Mount the guest-visible bytes of an image as DIR/disk.raw, with control files in DIR/ctl
///
/// The command returns when the mount can be used; a server goes on in the background until
/// `rebasefs umount DIR`, `umount DIR` or SIGTERM. `mount -t fuse.rebasefs IMAGE DIR` and a line of
/// /etc/fstab do the same.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs mount cow.qcow2 mnt
  sha256sum mnt/disk.raw
  echo new.img > mnt/ctl/backing     # rebase; an empty line flattens
  cat mnt/ctl/status
  rebasefs umount mnt")]
pub(super) struct Arguments {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The directory to mount on
    #[arg(value_name = "DIR")]
    mountpoint: PathBuf,
    /// Format of the image [default: recognised from the file]
    #[arg(short, long, value_name = "FORMAT", value_parser = |name: &str| Format::from_name(name))]
    format: Option<Format>,
    /// Mount options, as for mount(8): allow_other, ro, fsname=NAME and others; for fstab, also format=, log=,
    /// threads=, force_share, guess_formats, writable (--rw), growable (--rw --grow)
    #[arg(short, long = "options", value_name = "OPTION,...")]
    options: Vec<Words>,
    /// Let disk.raw be written: into the image, copy-on-write. It is locked as long as it is mounted
    #[arg(long)]
    rw: bool,
    /// With --rw: let `truncate` enlarge the disk
    #[arg(long, requires = "rw")]
    grow: bool,
    /// Stay in the foreground, messages on standard error
    #[arg(long)]
    foreground: bool,
    /// How many threads serve [default: one a processor, at least 2]
    #[arg(long, value_name = "N", value_parser = mount_options::threads)]
    threads: Option<u16>,
    /// In the background, write messages to this file; SIGHUP opens it anew
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    #[command(flatten)]
    opening: Opening,
}

impl Arguments {
    /// Whether the messages of the server carry the time.
    pub(super) fn time(&self) -> Time {
        match self.foreground {
            true => Time::of_standard_error(),
            // To a file, if to anybody.
            false => Time::Told,
        }
    }
}

pub(super) fn run(mut arguments: Arguments) -> Result<ExitCode> {
    let words = Words::merged(std::mem::take(&mut arguments.options));
    let arguments = Arguments {
        format: arguments.format.or(words.format),
        threads: arguments.threads.or(words.threads),
        log: arguments.log.or(words.log),
        opening: arguments.opening.or(words.opening),
        rw: arguments.rw || words.writing >= Writing::Bytes,
        grow: arguments.grow || words.writing == Writing::BytesAndSize,
        ..arguments
    };
    if words.say_rw && !arguments.rw && is_typed() {
        log::warn!(
            "-o rw is what mount(8) says of every mount, and disk.raw is read-only: add --rw to write to it"
        );
    }
    let log = arguments.log.as_deref().map(Log::open).transpose()?;
    let foreground = arguments.foreground;
    let reads = !arguments.rw;
    let mountpoint = std::path::absolute(&arguments.mountpoint).ok();
    // The mount point can be in use as well.
    let or_force_share = move |error: Error| match reads && error.file() != mountpoint.as_deref() {
        true => super::or_force_share(error),
        false => error,
    };
    let mut mount = checked(arguments, words.mount);
    if let Some(Log(_, path)) = &log {
        mount = mount.log(path);
    }
    if foreground {
        let mounted = mount.start().map_err(or_force_share)?;
        if let Err(e) = tell_service_manager() {
            log::warn!("cannot tell the service manager that the mount stands: {e}");
        }
        // With the terminal goes what was started there.
        let of_terminal =
            || if io::stderr().is_terminal() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        mounted.on_hangup(of_terminal).serve()?;
        return Ok(ExitCode::SUCCESS);
    }
    in_background(|| mount.start().map_err(or_force_share), log)
}

/// Whether a person has typed it, who means what he says: mount(8) calls us by another name or in other words.
fn is_typed() -> bool {
    std::env::args_os()
        .skip(1)
        .find(|word| !word.as_encoded_bytes().starts_with(b"-"))
        .is_some_and(|word| word == "mount")
}

fn checked(arguments: Arguments, options: MountOptions) -> Mount {
    let mount = Mount::new(arguments.image, arguments.mountpoint)
        .format(arguments.format)
        .opener(arguments.opening.opener())
        .options(options)
        .writing(match (arguments.rw, arguments.grow) {
            (false, _) => Writing::Refused,
            (true, false) => Writing::Bytes,
            (true, true) => Writing::BytesAndSize,
        });
    match arguments.threads {
        Some(threads) => mount.threads(threads.into()),
        None => mount,
    }
}

/// A file that messages are added to, with its full path: a server has another current directory.
struct Log(File, PathBuf);

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let cannot = |e| Error::io(e, "cannot open the log").path(path);
        let file = output::append(path).doing(|| "opening the log".to_owned())?;
        Ok(Self(file, std::path::absolute(path).map_err(cannot)?))
    }

    /// Lets messages go to the file that has the name now: another program may have moved the old one away.
    fn reopen(path: &Path) {
        let opened = Self::open(path).and_then(|Self(file, _)| {
            sys::redirect(file.as_fd(), 2).map_err(|e| Error::io(e, "cannot write to the log").path(path))
        });
        match opened {
            Ok(()) => log::info!("SIGHUP: the log was opened anew"),
            Err(e) => log::error!("SIGHUP: {e}"),
        }
    }
}

/// Tells who has started us as a service of `Type=notify` that the mount can be used, see
/// sd_notify(3).
fn tell_service_manager() -> io::Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match name.as_encoded_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(drop)
}

/// Forks; the parent waits for the child to say how the mount went.
fn in_background(start: impl FnOnce() -> Result<Mounted>, log: Option<Log>) -> Result<ExitCode> {
    let (reader, writer) = io::pipe().map_err(|e| Error::io(e, "cannot make a pipe"))?;
    // There is no second thread yet.
    match sys::fork().map_err(|e| Error::io(e, "cannot start the server"))? {
        Fork::Parent => {
            drop(writer);
            hear(reader)
        }
        Fork::Child => {
            drop(reader);
            serve(start, writer, log)
        }
    }
}

/// What the child says: this alone if the mount stands, else its error.
const READY: &str = "\0";

fn hear(mut reader: PipeReader) -> Result<ExitCode> {
    let mut said = String::new();
    reader.read_to_string(&mut said).map_err(|e| Error::io(e, "cannot hear from the server"))?;
    match said.as_str() {
        READY => return Ok(ExitCode::SUCCESS),
        "" => {
            let hint = "was it killed? `rebasefs mount --foreground IMAGE DIRECTORY` shows how it ends";
            return Err(Error::new(ErrorKind::Io, "the server ended without a word").hint(hint));
        }
        error => eprintln!("rebasefs: {error}"),
    }
    Ok(ExitCode::FAILURE)
}

fn serve(
    start: impl FnOnce() -> Result<Mounted>,
    mut parent: PipeWriter,
    log: Option<Log>,
) -> Result<ExitCode> {
    let started = start();
    let said = started.as_ref().map_or_else(ToString::to_string, |_| READY.to_owned());
    if started.is_ok() {
        let detached = detach(log.as_ref().map(|Log(file, _)| file));
        detached.map_err(|e| Error::io(e, "cannot leave the terminal"))?;
    }
    // If the parent was killed meanwhile, there is nobody to tell.
    let _ = parent.write_all(said.as_bytes());
    drop(parent);
    match started {
        Ok(mounted) => {
            let reopen = move || {
                log.iter().for_each(|Log(_, path)| Log::reopen(path));
                ControlFlow::Continue(())
            };
            mounted.on_hangup(reopen).serve().map(|()| ExitCode::SUCCESS)
        }
        Err(_) => Ok(ExitCode::FAILURE),
    }
}

/// Lets go of the terminal and of the current directory. Messages go to `log`, if there is one.
fn detach(log: Option<&File>) -> io::Result<()> {
    // A chroot may have no /dev/null. A directory swallows messages as well: it cannot be written to.
    let null = File::options().read(true).write(true).open("/dev/null").or_else(|_| File::open("/"))?;
    let messages = log.unwrap_or(&null);
    sys::redirect(null.as_fd(), 0)?;
    sys::redirect(null.as_fd(), 1)?;
    sys::redirect(messages.as_fd(), 2)?;
    std::env::set_current_dir("/")
}
