//! The command line: what was typed, checked, handed to the library, printed. One file a
//! subcommand.

mod check;
mod compare;
mod create;
mod flatten;
mod format_options;
mod generate;
mod helper;
mod info;
mod map;
mod messages;
mod mount;
mod mount_options;
mod options;
mod picture;
mod print;
mod progress;
mod rebase;
mod size;
mod stop;
mod umount;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{Error, ErrorKind, Result};
use crate::shown::Shown;
use crate::sys;
use helper::Called;
use messages::{Time, Unverified};

/// Mount a copy-on-write disk image as a flat file, and rebase it safely while it is mounted.
#[derive(Debug, Parser)]
#[command(name = "rebasefs", version, about, subcommand_required = true)]
struct Cli {
    /// Tell more: -v what is done, -vv why (as RUST_LOG=info, RUST_LOG=debug)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::Arguments),
    #[command(visible_alias = "unmount")]
    Umount(umount::Arguments),
    Rebase(rebase::Arguments),
    Flatten(flatten::Arguments),
    Info(info::Arguments),
    Map(map::Arguments),
    Compare(compare::Arguments),
    Check(check::Arguments),
    Create(create::Arguments),
    Generate(generate::Arguments),
}

/// Does what was typed (the program's name first). The exit codes are those of qemu-img's command
/// of the same name. Called as `mount.fuse.rebasefs`, it is a helper of mount(8).
pub fn run(typed: &[OsString]) -> ExitCode {
    let is_command = |word: &OsStr| Cli::command().find_subcommand(word).is_some();
    match helper::called(typed, is_command) {
        Called::Typed(words) => run_typed(&words),
        Called::ForShow => ExitCode::SUCCESS,
    }
}

fn run_typed(typed: &[OsString]) -> ExitCode {
    let command = match Cli::try_parse_from(typed) {
        Ok(cli) => {
            let (is_quiet, time) = (cli.command.is_quiet(), cli.command.time());
            messages::start(cli.verbose, is_quiet, time, cli.command.unverified());
            cli.command
        }
        Err(e) => {
            let e = shown_error(typed).unwrap_or(e);
            // Where it cannot be printed there is nobody to tell.
            let _ = e.print();
            return if e.use_stderr() { failure(typed) } else { ExitCode::SUCCESS };
        }
    };
    command.run().unwrap_or_else(|error| {
        print::complain(&format!("rebasefs: {error}"));
        failure(typed)
    })
}

/// What is wrong with what was typed, in words that a terminal can be shown: with names escaped, since
/// clap repeats them as they are.
fn shown_error(typed: &[OsString]) -> Option<clap::Error> {
    Cli::try_parse_from(typed.iter().map(|word| word.shown().to_string())).err()
}

/// What a failure ends with: 1, but 2 for `compare`, where 1 means "they differ".
fn failure(typed: &[OsString]) -> ExitCode {
    let is_compare = typed.get(1).is_some_and(|command| command == "compare");
    ExitCode::from(if is_compare { 2 } else { 1 })
}

/// Who only reads may do so beside somebody who writes, if he wants to.
fn or_force_share(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Busy => error.or_hint("or read it all the same with `-U`; what is read may be torn"),
        _ => error,
    }
}

impl Command {
    /// Whether messages carry the time. Only a server's do: the others are done soon.
    fn time(&self) -> Time {
        match self {
            Self::Mount(arguments) => arguments.time(),
            _ => Time::Untold,
        }
    }

    /// Whether warnings of what could not be verified are printed. What a server says is for people.
    fn unverified(&self) -> Unverified {
        match self {
            Self::Mount(_) => Unverified::Told,
            _ => Unverified::on_a_terminal(),
        }
    }

    /// Whether `-q` keeps back what is no error: warnings, too.
    fn is_quiet(&self) -> bool {
        match self {
            Self::Rebase(arguments) => arguments.is_quiet(),
            Self::Flatten(arguments) => arguments.is_quiet(),
            Self::Compare(arguments) => arguments.is_quiet(),
            Self::Check(arguments) => arguments.is_quiet(),
            Self::Create(arguments) => arguments.is_quiet(),
            _ => false,
        }
    }

    fn run(self) -> Result<ExitCode> {
        // A chain of 1000 layers is 1000 open files, and 1024 is a common limit.
        if let Err(e) = sys::raise_open_file_limit() {
            log::debug!("cannot raise the limit of open files: {e}");
        }
        if let Err(e) = sys::ignore_file_size_signal() {
            log::debug!("a write beyond the file-size limit will end the program: {e}");
        }
        match self {
            Self::Mount(arguments) => mount::run(arguments),
            Self::Rebase(arguments) => rebase::run(&arguments),
            Self::Flatten(arguments) => flatten::run(&arguments),
            Self::Info(arguments) => info::run(&arguments).map_err(or_force_share),
            Self::Map(arguments) => map::run(&arguments).map_err(or_force_share),
            Self::Compare(arguments) => compare::run(&arguments).map_err(or_force_share),
            Self::Check(arguments) if arguments.repairs() => check::run(&arguments),
            Self::Check(arguments) => check::run(&arguments).map_err(or_force_share),
            Self::Create(arguments) => create::run(&arguments),
            Self::Umount(arguments) => umount::run(&arguments),
            Self::Generate(arguments) => generate::run(arguments, Cli::command()),
        }
    }
}
