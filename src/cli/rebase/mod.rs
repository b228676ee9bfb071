//! `rebasefs rebase`: the engine without a mount, with qemu-img's options. One image here, `many` of
//! them beside it; what is printed is in `report`.

mod many;
mod picture;
mod report;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use report::Done;

use super::options::{Opening, Output, Refused};
use super::print;
use super::progress::Showing;
use super::stop::{self, Stop};
use crate::chain::{Chain, Opener, or_rebase_mounted};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, CacheMode, output};
use crate::layer::Format;
use crate::rebase::{Mode, Options, Progress, Rebased, Rehearsal, Request, rebase_alone, rehearse};

/// Give an image another backing file and keep every guest-visible byte
///
/// Old and new backing file are compared, what differs is copied into the image, then the header
/// names the new one. If it is stopped at any moment (Ctrl-C), the image is whole; start it again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rebasefs rebase -b new.img -F raw cow.qcow2     another backing file
  rebasefs rebase -b \"\" cow.qcow2               no backing file any more (flatten)
  rebasefs rebase -u -b /new/place/base.img -F raw cow.qcow2     the same file has moved
  rebasefs rebase -b new.img *.qcow2              many images, old and new backing file compared once
  find /vm -name '*.qcow2' -print0 | rebasefs rebase -b new.img --from-file - -0")]
pub(super) struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", value_parser = Format::from_name)]
    format: Option<Format>,
    /// Cache mode of the image: writeback, writethrough, none, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE", value_parser = CacheMode::from_name, default_value = "writeback")]
    cache: CacheMode,
    /// How to print what happened
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    #[command(flatten)]
    showing: Showing,
    /// With --dry-run, draw for a page what would be copied, compared and skipped, into FILE
    #[arg(long, value_name = "FILE", requires = "dry_run")]
    svg: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    refused: Refused,
    /// The image to rebase, or several: then old and new backing file are compared once for all of them
    #[arg(value_name = "IMAGE", required_unless_present = "from_file")]
    images: Vec<PathBuf>,
    // Last: its heading is for all that follows.
    #[command(flatten)]
    many: many::Several,
}

impl Arguments {
    /// The same for a rebase onto no backing file.
    pub(super) fn flattening(mut self) -> Result<Self, clap::Error> {
        let options = &self.options;
        if options.backing.is_some() || options.backing_format.is_some() || options.is_unsafe {
            let what = "flatten leaves no backing file: it takes neither -b nor -F nor -u\n";
            return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, what));
        }
        self.options.backing = Some(OsString::new());
        Ok(self)
    }

    /// Whether `-q` was typed.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let (options, request) = (&arguments.options, arguments.options.request()?);
    if arguments.cache == CacheMode::Unsafe {
        log::warn!("cache mode unsafe: if the machine stops before all is on disk, the image is lost");
    }
    let opener = arguments.opening.opener().caching(arguments.cache, options.backing_cache);
    let progress = Arc::new(Progress::default());
    let stop = Stop::watch(progress.clone())?;
    match &arguments.images[..] {
        [image] if !arguments.many.are_given() => {
            run_one(arguments, &opener, &request, image, &progress, &stop)
        }
        _ if arguments.svg.is_some() => Err(Error::invalid("--svg draws one image")
            .hint("name one image, and neither `--from-file` nor a file of differences")),
        _ => many::run(arguments, &opener, request, &progress, &stop),
    }
}

fn run_one(
    arguments: &Arguments,
    opener: &Opener,
    request: &Request,
    image: &Path,
    progress: &Progress,
    stop: &Stop,
) -> Result<ExitCode> {
    let work = || work_on(arguments, opener, request, image, progress);
    let done = match arguments.quiet {
        true => work(),
        false => arguments.showing.during(|| progress.standing(), work),
    };
    let done = match (done, stop.signal()) {
        (Err(error), Some(signal)) if error.kind() == ErrorKind::Cancelled => {
            let stopped = report::stopped(signal, progress, arguments.options.dry_run);
            print::complain(&format!("rebasefs: {stopped}: {error}"));
            report::print_failed(arguments, image, &error);
            return Ok(stop::exit_code(signal).into());
        }
        (done, signal) => {
            let done = done.inspect_err(|error| report::print_failed(arguments, image, error))?;
            if let Some(signal) = signal.filter(|_| !arguments.quiet) {
                print::complain(&format!("rebasefs: {} came too late: it is done", stop::name(signal)));
            }
            done
        }
    };
    if !arguments.quiet && request.mode == Mode::Safe {
        report::print(arguments, image, &done)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does with one image what was asked for.
fn work_on(
    arguments: &Arguments,
    opener: &Opener,
    request: &Request,
    image: &Path,
    progress: &Progress,
) -> Result<Done> {
    work_on_file(arguments, opener, request, image, progress).map_err(|error| or_rebase_mounted(error, image))
}

fn work_on_file(
    arguments: &Arguments,
    opener: &Opener,
    request: &Request,
    image: &Path,
    progress: &Progress,
) -> Result<Done> {
    let (began, options) = (Instant::now(), &arguments.options);
    let access = if options.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let chain = request.open(opener, image, arguments.format, access)?;
    if options.dry_run {
        let picture =
            arguments.svg.as_deref().map(|file| beside(file, &chain, opener, request)).transpose()?;
        let found = rehearse(&chain, opener, request, progress)?;
        if let Some(output) = &picture {
            let backing = request.backing.as_ref().map(|backing| Path::new(&backing.name));
            picture::write_svg(&found, &chain, backing, output)?;
        }
        return Ok(Done { found, took: began.elapsed(), sizes: None });
    }
    let before = report::size_on_disk(&chain)?;
    let Rebased { chain, report } = rebase_alone(&chain, opener, request, progress)?;
    let found = Rehearsal { report, ..Rehearsal::default() };
    Ok(Done { found, took: began.elapsed(), sizes: Some((before, report::size_on_disk(&chain)?)) })
}

/// A file that may be written: it is in neither the old nor the new chain.
fn beside<'a>(
    file: &'a Path,
    chain: &Chain,
    opener: &Opener,
    request: &Request,
) -> Result<output::Output<'a>> {
    let new = chain.top().and_then(|top| opener.chain_below(&**top.file(), request.backing.as_ref()).ok());
    // A new chain that cannot be opened is reported by who rebases.
    let new = new.unwrap_or_default();
    output::Output::or_standard(file, chain.files().chain(new.files()).map(|file| file.identity()))
        .doing(|| "writing the picture".to_owned())
}
