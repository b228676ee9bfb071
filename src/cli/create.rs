//! `rebasefs create`: a new, empty image.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::format_options::FormatOptions;
use super::options::Refused;
use super::print::print;
use crate::chain::{Opener, format_to_record, refuse_what_qemu_cannot_open, resolve};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{Access, HostFile, Identity, LocalFile, output};
use crate::layer::qcow2::create::{Preallocation, Spec, create, write_zeros};
use crate::layer::{Format, Reference};
use crate::shown::{self, Shown};

const USAGE: &str = "`rebasefs create -f FORMAT FILE SIZE`";

/// Make a new, empty image
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  rebasefs create -f qcow2 disk.qcow2 20G
  rebasefs create -f qcow2 -b base.img cow.qcow2
  rebasefs create -f qcow2 -o cluster_size=2M,extended_l2=on disk.qcow2 1T")]
pub(super) struct Arguments {
    /// Format of the new image: raw, qcow2
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Options of the format, `-o help` to list them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Backing file, as it is to stand in the header: relative to the new image's directory
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,
    /// Format of the backing file; recognised from the file if left out, and recorded
    #[arg(short = 'F', visible_short_alias = 'B', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not open the backing file; SIZE and -F are needed then
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Accepted for scripts: that a backing file is in use elsewhere is no obstacle
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    refused: Refused,
    /// The new image; what is there is overwritten
    #[arg(value_name = "FILE", required_unless_present = "options")]
    file: Option<PathBuf>,
    /// Virtual size, with a suffix if need be: 512, 64k, 1.5G; that of the backing file if left out
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    arguments.refused.check()?;
    let format = Format::from_name(&arguments.format)?;
    if arguments.options.iter().any(|option| matches!(option.as_str(), "help" | "?")) {
        print(&FormatOptions::help(format))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(file) = &arguments.file else {
        return Err(Error::invalid("create needs the name of the new image").hint(USAGE));
    };
    arguments.create(format, file).doing(|| format!("creating {}", file.shown()))?;
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    /// Whether `-q` was typed.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }

    fn create(&self, format: Format, file: &Path) -> Result<()> {
        let mut options = self.options(format)?;
        let in_play = match options.backing() {
            Some(backing) => self.look_at_backing(file, &backing, &mut options)?,
            None => Vec::new(),
        };
        let Some(bytes) = options.size()? else {
            return Err(Error::invalid("the new image needs a size").hint(USAGE));
        };
        options.set("size", bytes.to_string());
        options.refuse_unreadable()?;
        if !self.quiet {
            let echo = options.echo();
            print(&format!("Formatting '{}', fmt={format}{}\n", file.shown(), shown::line(&echo)))?;
        }
        let wanted = match format {
            Format::Raw => Wanted::Raw(bytes.next_multiple_of(512), options.preallocation()?),
            Format::Qcow2 => Wanted::Qcow2(Box::new(options.spec()?)),
        };
        wanted.validate()?;
        let has_copies = !options.is_on("nocow")?;
        wanted.make(file, has_copies, &in_play)
    }

    /// All options, wherever they were typed.
    fn options(&self, format: Format) -> Result<FormatOptions> {
        let mut options = FormatOptions::parse(format, &self.options)?;
        let backing = self.backing.as_ref().map(|name| name.to_string_lossy().into_owned());
        let elsewhere = [
            ("size", "SIZE", &self.size),
            ("backing_file", "-b", &backing),
            ("backing_fmt", "-F", &self.backing_format),
        ];
        for (name, typed, value) in elsewhere {
            let Some(value) = value else { continue };
            if options.find(name).is_some() {
                return Err(Error::invalid(format!("{name} is given twice: with -o and as {typed}")));
            }
            if format == Format::Raw && name != "size" {
                return Err(Error::invalid("a raw image cannot have a backing file")
                    .hint("create it with `-f qcow2`"));
            }
            options.set(name, value.clone());
        }
        options.name_backing(self.backing.clone());
        match options.find("backing_fmt") {
            Some(_) if options.backing().is_none() => {
                let error = Error::invalid("the format of a backing file is given, but no backing file");
                Err(error.hint("name it with `-b FILE`"))
            }
            Some(name) => Format::from_name(name).map(|_| options),
            None => Ok(options),
        }
    }

    /// Takes from the backing file what was not given: its format, its size. Returns the files of its chain.
    fn look_at_backing(
        &self,
        file: &Path,
        backing: &Reference,
        options: &mut FormatOptions,
    ) -> Result<Vec<Identity>> {
        if self.backing_unsafe {
            if let Err(error) = resolve(file, backing) {
                log::warn!("{error}: its name is recorded all the same");
            }
            return match backing.format {
                Some(_) => Ok(in_play(file, backing)),
                None => Err(Error::invalid("with -u, the format of the backing file is needed")
                    .hint("it is not opened; give its format with `-F FORMAT`")),
            };
        }
        // Only its header is read: a machine may run on it, for which this is the step before a snapshot.
        let chain = Opener::new().force_share().backing_chain(file, Some(backing))?;
        if let Some(top) = chain.top() {
            let format = backing.format.clone().unwrap_or_else(|| format_to_record(backing, top.format()));
            let recorded = Reference { format: Some(format.clone()), ..backing.clone() };
            refuse_what_qemu_cannot_open(&recorded, top.file().identity().is_block_device())?;
            options.set("backing_fmt", format);
        }
        if options.find("size").is_none() {
            options.set("size", chain.virtual_size().to_string());
        }
        Ok(chain.files().map(|file| file.identity()).collect())
    }
}

/// The files of a chain that need not exist: as many as can be found. The new image may be one of them.
fn in_play(image: &Path, backing: &Reference) -> Vec<Identity> {
    let Ok(named) = resolve(image, backing) else { return Vec::new() };
    let opened = Opener::new().force_share().chain(&named.path, None, Access::ReadOnly);
    let chain = opened.inspect_err(|e| log::debug!("not opened: {e}")).unwrap_or_default();
    chain.files().map(|file| file.identity()).chain(Identity::of(&named.path)).collect()
}

/// What is to be made.
enum Wanted {
    Raw(u64, Preallocation),
    Qcow2(Box<Spec>),
}

impl Wanted {
    fn validate(&self) -> Result<()> {
        match self {
            Self::Raw(..) => Ok(()),
            Self::Qcow2(spec) => spec.validate(),
        }
    }

    /// Makes it, unless it or its data file is one of those `in_play`.
    fn make(&self, path: &Path, has_copies: bool, in_play: &[Identity]) -> Result<()> {
        let data_path = match self {
            Self::Qcow2(spec) => spec.data_file.as_deref().map(|name| data_path(path, name)).transpose()?,
            Self::Raw(..) => None,
        };
        let mut made = Made::default();
        let file = made.claim(path, in_play)?;
        let data_file = data_path.as_deref().map(|path| made.claim(path, in_play)).transpose()?;
        // Nobody has either of them, and neither is anything else.
        for file in [Some(&file), data_file.as_ref()].into_iter().flatten() {
            made.empty(file)?;
        }
        if !has_copies {
            file.stop_copies();
        }
        match self {
            Self::Raw(bytes, preallocation) => make_raw(&file, *bytes, *preallocation)?,
            Self::Qcow2(spec) => create(&file, data_file.as_ref().map(|file| file as &dyn HostFile), spec)?,
        }
        made.paths.clear();
        Ok(())
    }
}

/// Files that are no images yet, and are removed if they do not become any.
#[derive(Default)]
struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Creates a file, or opens it as it is.
    fn claim(&mut self, path: &Path, in_play: &[Identity]) -> Result<LocalFile> {
        let is_new = path.symlink_metadata().is_err();
        if let Ok(there) = Identity::of(path) {
            output::refuse_in_play(there, in_play.iter().copied()).path(path)?;
        }
        let file = LocalFile::claim(path)?;
        if is_new {
            self.paths.push(path.to_owned());
        }
        Ok(file)
    }

    /// What was there is there no more.
    fn empty(&mut self, file: &LocalFile) -> Result<()> {
        file.empty()?;
        if !file.identity().is_block_device() && !self.paths.iter().any(|path| path == file.path()) {
            self.paths.push(file.path().to_owned());
        }
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            // That it cannot be removed is the smaller of two failures.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn make_raw(file: &LocalFile, bytes: u64, preallocation: Preallocation) -> Result<()> {
    if file.identity().is_block_device() {
        return match file.size() >= bytes {
            true => Ok(()),
            false => {
                let what = format!("the device has {} bytes, not {bytes}", file.size());
                Err(Error::new(ErrorKind::NoSpace, what).path(file.path()))
            }
        };
    }
    file.set_size(bytes)?;
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => file.allocate(crate::file::HostOffset(0), bytes)?,
        Preallocation::Full => write_zeros(file, 0, bytes)?,
    }
    file.sync()
}

/// Where the external data file lies. QEMU looks for a relative name in the current directory, and
/// rebasefs beside the image: a name that would lead to two places is refused.
fn data_path(image: &Path, name: &OsStr) -> Result<PathBuf> {
    let reference = Reference { name: name.to_owned(), format: None };
    let path = resolve(image, &reference)?.path;
    let directory = image.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let same = Identity::of(directory).ok() == Identity::of(Path::new(".")).ok();
    if Path::new(name).is_relative() && !same {
        let what = format!("the name of the data file, '{}', is relative", name.shown());
        let hint = "QEMU would look for it in the current directory; write it with its full path";
        return Err(Error::invalid(what).hint(hint));
    }
    let is_image = match (Identity::of(&path), Identity::of(image)) {
        (Ok(data), Ok(image)) => data == image,
        _ => path == image,
    };
    match is_image {
        true => Err(Error::invalid("the data file cannot be the image itself").path(path)),
        false => Ok(path),
    }
}
