//! Taking a mount down from another process: the kernel lets go of it, then its server stops what
//! runs and ends. Who has unmounted may use the image at once, and does not find it locked still.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use super::point::{self, Entry};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Process, errno};

/// Who waits longer than this for a server wants to know what for.
const SOON: Duration = Duration::from_secs(2);

/// How a mount is taken down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Manner {
    /// Only if nobody uses it; returns when the server has ended.
    #[default]
    Wait,
    /// Nobody finds it any more; who uses it goes on. Its server ends with the last of them, and is
    /// not waited for.
    Lazy,
}

/// Unmounts what rebasefs has mounted on `mountpoint`: root any mount, others their own. A mount
/// whose server has died is cleaned up. The program that serves a mount takes it down with
/// [`Mounted::unmount`](super::Mounted::unmount).
///
/// # Errors
/// No mount of rebasefs is there, somebody uses it, or it is another user's.
pub fn unmount(mountpoint: &Path, manner: Manner) -> Result<()> {
    let real = real(mountpoint)?;
    let found = point::entries(&real).pop().filter(Entry::is_fuse);
    let status = found.as_ref().map(|entry| status(&real, entry));
    // fusermount3 records the subtype; where root mounts by himself, the kernel knows `fuse` alone.
    let is_ours = match (&found, &status) {
        (Some(entry), _) if entry.kind == "fuse.rebasefs" => true,
        (_, Some(Ok(status))) => number(status).is_some(),
        (_, Some(Err(e))) => e.raw_os_error() == Some(errno::ENOTCONN),
        _ => false,
    };
    if !is_ours {
        let error = Error::invalid("rebasefs has mounted nothing here").path(mountpoint);
        return Err(error.hint("`findmnt -t fuse,fuse.rebasefs` lists its mounts"));
    }
    let server = match (manner, status) {
        (Manner::Wait, Some(Ok(status))) => server(&status),
        _ => None,
    };
    let_go(&real, manner, mountpoint)?;
    match server {
        Some((number, process)) => wait(number, &process, mountpoint),
        None => Ok(()),
    }
}

const INSTALL: &str = "install umount (package mount) for root, fusermount3 (fuse3) for others";

/// The path as the kernel's table has it. A dead mount cannot be looked at, the directory that it
/// lies in can.
fn real(mountpoint: &Path) -> Result<PathBuf> {
    mountpoint.canonicalize().or_else(|error| {
        let parent = point::absolute(mountpoint)?.parent().map(Path::canonicalize);
        match (parent, mountpoint.file_name()) {
            (Some(Ok(parent)), Some(name)) if error.kind() != io::ErrorKind::NotFound => {
                Ok(parent.join(name))
            }
            _ => Err(Error::io(error, "cannot find the mount").path(mountpoint)),
        }
    })
}

/// Has the kernel let go of a mount. Only root may do so by himself; fusermount3 lets others unmount what
/// is theirs.
fn let_go(real: &Path, manner: Manner, mountpoint: &Path) -> Result<()> {
    let is_root = sys::effective_ids().0 == 0;
    let mut output = run(if is_root { "umount" } else { "fusermount3" }, real, manner);
    // Where a root directory has no /etc/mtab, as debootstrap makes it, fusermount3 mounts but does not
    // unmount; umount, which also knows whose mount it is, does.
    if output.as_ref().is_ok_and(|output| String::from_utf8_lossy(&output.stderr).contains("mtab")) {
        output = run("umount", real, manner);
    }
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(refused(&String::from_utf8_lossy(&output.stderr), mountpoint)),
        // Where there is no umount either, as in a chroot for this program alone, none is needed.
        Err(e) if is_root && e.kind() == io::ErrorKind::NotFound => {
            let unmounted = match manner {
                Manner::Wait => sys::unmount(real),
                Manner::Lazy => sys::detach_mount(real),
            };
            unmounted.map_err(|e| refused(&e.to_string(), mountpoint))
        }
        Err(e) => Err(Error::io(e, "cannot run the program that unmounts").hint(INSTALL)),
    }
}

fn run(program: &str, real: &Path, manner: Manner) -> io::Result<Output> {
    let options: &[&str] = match (program, manner) {
        ("umount", Manner::Wait) => &[],
        ("umount", Manner::Lazy) => &["-l"],
        (_, Manner::Wait) => &["-u"],
        (_, Manner::Lazy) => &["-u", "-z"],
    };
    Command::new(program).args(options).arg("--").arg(real).output()
}

fn refused(said: &str, mountpoint: &Path) -> Error {
    let said = said.trim();
    let kind = if said.contains("busy") { ErrorKind::Busy } else { ErrorKind::PermissionDenied };
    let error = Error::new(kind, format!("cannot unmount: {said}")).path(mountpoint);
    let name = point::in_shell(mountpoint);
    match kind {
        ErrorKind::Busy => error.hint(format!(
            "`fuser -vm {name}` shows who uses it; `rebasefs umount --lazy {name}` lets them finish"
        )),
        _ => error,
    }
}

/// What `ctl/status` says.
fn status(real: &Path, entry: &Entry) -> io::Result<String> {
    let file = real.join("ctl/status");
    match std::fs::read_to_string(&file) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => read_as_owner(&file, entry),
        status => status,
    }
}

/// The process that serves, by what `ctl/status` says.
fn number(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("server: ")?.parse().ok())
}

/// The server of a mount. One in another container has another number here, and is none.
fn server(status: &str) -> Option<(u32, Process)> {
    // One does not wait for oneself.
    let number = number(status).filter(|number| *number != std::process::id())?;
    let process = Process::open(number).inspect_err(|e| log::info!("process {number}: {e}")).ok()?;
    let command = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
    let is_rebasefs = command.windows(8).any(|word| word == b"rebasefs");
    is_rebasefs.then_some((number, process))
}

/// Without `allow_other` even root sees nothing in the mount of somebody else; as him he does.
fn read_as_owner(file: &Path, entry: &Entry) -> io::Result<String> {
    let id = |key| entry.option(key).and_then(|id| id.parse().ok()).ok_or(io::ErrorKind::InvalidData);
    let mut cat = Command::new("cat");
    cat.arg("--").arg(file).uid(id("user_id")?).gid(id("group_id")?);
    let mut child = cat.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut text = String::new();
    let read = child.stdout.take().map(|mut output| output.read_to_string(&mut text));
    child.wait()?;
    read.unwrap_or(Ok(0)).map(|_| text)
}

fn wait(number: u32, process: &Process, mountpoint: &Path) -> Result<()> {
    let doing = |e| Error::io(e, format!("cannot wait for the server, process {number}")).path(mountpoint);
    if process.ends_within(SOON).map_err(doing)? {
        return Ok(());
    }
    log::warn!(
        "{}: unmounted; waiting for its server (process {number}) to finish what it does",
        mountpoint.display()
    );
    while !process.ends_within(Duration::from_secs(60)).map_err(doing)? {}
    Ok(())
}
