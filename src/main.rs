//! The `rebasefs` program: parses the command line, runs the command, prints its error.

use std::process::ExitCode;

use clap::Parser;
use rebasefs::cli::Cli;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp(None)
        .init();
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rebasefs: {error}");
            ExitCode::FAILURE
        }
    }
}
