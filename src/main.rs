//! The `rebasefs` program: hands what was typed to the library.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp(None)
        .init();
    let typed: Vec<OsString> = std::env::args_os().collect();
    rebasefs::cli::run(&typed)
}
