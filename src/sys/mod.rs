//! Every system call that std lacks, as safe functions: the only `unsafe` and the only `libc::` of
//! the crate. No policy: what the kernel answers is handed on as it is.
#![allow(unsafe_code)]

mod extents;
mod files;
mod locks;
mod mounts;
mod process;
mod sockets;

use std::io;

pub use extents::*;
pub use files::*;
pub use locks::*;
pub use mounts::*;
pub use process::*;
pub use sockets::*;

/// The errno values that the rest of the crate names.
pub mod errno {
    pub use libc::{
        EACCES, EAGAIN, EBUSY, EDQUOT, EFBIG, EINTR, EINVAL, EIO, EISDIR, ELOOP, EMFILE, ENAMETOOLONG,
        ENODEV, ENOENT, ENOSPC, ENOTCONN, ENXIO, EOPNOTSUPP, EPERM, EROFS, ETXTBSY, EUCLEAN,
    };
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn signed(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
