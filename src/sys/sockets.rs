//! Sockets of this machine: who is at the other end.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::check;

/// Connects to a socket by its abstract name. Fails with EAGAIN, and does not wait, where too many
/// others wait for it to accept them.
pub fn connect_abstract(name: &[u8]) -> io::Result<UnixStream> {
    // SAFETY: `sockaddr_un` is plain old data; all zeros is a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // An abstract name begins with a NUL byte.
    let room = address.sun_path.get_mut(1..=name.len()).ok_or(io::ErrorKind::InvalidInput)?;
    for (to, from) in room.iter_mut().zip(name) {
        *to = from.cast_signed() as libc::c_char;
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    let descriptor = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let address = (&raw const address).cast();
    // SAFETY: the descriptor is open, and `address` is valid for `length` bytes.
    check(unsafe { libc::connect(socket.as_raw_fd(), address, length as libc::socklen_t) })?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// A process at the other end of a socket, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number; 0 for one that cannot be seen from here.
    pub process: u32,
    /// Its effective user.
    pub user: u32,
}

/// Who has connected, or who listened.
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let (socket, room) = (stream.as_raw_fd(), (&raw mut found).cast());
    // SAFETY: the descriptor is open, and `found` has the room that `length` says.
    check(unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, room, &raw mut length) })?;
    Ok(Peer { process: found.pid.try_into().unwrap_or(0), user: found.uid })
}
