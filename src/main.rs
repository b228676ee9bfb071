//! The `rebasefs` program: hands what was typed to the library.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    // fuser warns that it could not unmount what `umount` has unmounted already.
    let filter = env_logger::Env::default().default_filter_or("warn,fuser::session=error");
    env_logger::Builder::from_env(filter).format_timestamp(None).init();
    let typed: Vec<OsString> = std::env::args_os().collect();
    rebasefs::cli::run(&typed)
}
