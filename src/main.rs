//! The `rebasefs` program: hands what was typed to the library.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let typed: Vec<OsString> = std::env::args_os().collect();
    rebasefs::cli::run(&typed)
}
