//! Opening a chain: a few files that name each other in every way, some of them damaged, some no
//! files at all.
#![no_main]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rebasefs::chain::info::ImageInfo;
use rebasefs::chain::{Guess, Opener};
use rebasefs::file::{Access, HostFile, HostOffset, LocalFile};
use rebasefs::layer::qcow2::create::{Spec, create};
use rebasefs::layer::{Detail, GuestOffset, Reference};

#[derive(Arbitrary, Debug)]
struct Input {
    files: [File; 4],
    guesses: bool,
    locks: bool,
    backing: Named,
}

#[derive(Arbitrary, Debug)]
enum File {
    Qcow2 {
        size: u16,
        cluster_bits: u8,
        backing: Option<Named>,
        data_file: Option<u8>,
        damage: Vec<(u16, u8)>,
    },
    Bytes(Vec<u8>),
    Link(u8),
    Symlink(u8),
    Directory,
    Fifo,
    Nothing,
}

#[derive(Arbitrary, Debug)]
struct Named {
    file: u8,
    prefix: u8,
    format: u8,
    suffix: [u8; 3],
    /// Which members a `json:` name has, and their values.
    json: Vec<(u8, u8)>,
}

impl Named {
    /// Options in either spelling, often said twice.
    fn json(&self, file: &str) -> String {
        const DRIVERS: [&str; 4] = ["raw", "qcow2", "file", "host_device"];
        let driver = |n: u8| DRIVERS[usize::from(n) % DRIVERS.len()];
        let members = self.json.iter().take(8).map(|(which, what)| match which % 9 {
            0 => format!(r#""driver":"{}""#, driver(*what)),
            1 => format!(r#""file":{{"driver":"{}","filename":"{file}"}}"#, driver(*what)),
            2 => format!(r#""file.driver":"{}""#, driver(*what)),
            3 => format!(r#""file.filename":"{}""#, name(*what)),
            4 => format!(r#""file":{{"filename":"{}"}}"#, name(*what)),
            5 => format!(r#""filename":"{}""#, name(*what)),
            6 => format!(r#""file":{{"a":{{"{what}":{what}}}}}"#),
            7 => format!(r#""driver":{what}"#),
            _ => String::from_utf8_lossy(&self.suffix).into_owned(),
        });
        format!("json:{{{}}}", members.collect::<Vec<_>>().join(","))
    }

    fn reference(&self) -> Reference {
        let file = name(self.file);
        let mut name = match self.prefix % 10 {
            0 => format!("./{file}"),
            1 => format!("file:{file}"),
            2 | 3 => self.json(&file),
            4 => format!("nbd:{file}"),
            5 => format!("json:{file}"),
            _ => file,
        };
        if self.prefix > 200 {
            name.push_str(&String::from_utf8_lossy(&self.suffix).replace('/', ":"));
        }
        let formats = [None, Some("raw"), Some("qcow2"), Some("vmdk"), Some("")];
        let format = formats[usize::from(self.format) % formats.len()].map(str::to_owned);
        Reference { name: name.into(), format }
    }
}

/// To be linked to: making one takes a process.
static FIFO: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("rebasefs-fuzz-fifo-{}", std::process::id()));
    let made = Command::new("mkfifo").arg(&path).status().expect("starting mkfifo");
    assert!(made.success());
    path
});

fn name(number: u8) -> String {
    format!("f{}", number % 4)
}

impl File {
    fn make(&self, path: &Path) -> Option<()> {
        match self {
            Self::Qcow2 { size, cluster_bits, backing, data_file, damage } => {
                let spec = Spec {
                    size: u64::from(*size) << 9,
                    cluster_bits: 9 + u32::from(cluster_bits % 8),
                    backing: backing.as_ref().map(Named::reference),
                    data_file: data_file.map(|file| name(file).into()),
                    ..Spec::default()
                };
                let file = LocalFile::create(path).ok()?;
                let data_file = LocalFile::create(&path.with_extension("data")).ok()?;
                create(&file, spec.data_file.as_ref().map(|_| &data_file as &dyn HostFile), &spec).ok()?;
                for (at, byte) in damage {
                    file.write_at(HostOffset(u64::from(at % 2048)), &[*byte]).ok()?;
                }
            }
            Self::Bytes(bytes) => std::fs::write(path, bytes).ok()?,
            Self::Link(to) => std::fs::hard_link(path.with_file_name(name(*to)), path).ok()?,
            Self::Symlink(to) => std::os::unix::fs::symlink(name(*to), path).ok()?,
            Self::Directory => std::fs::create_dir(path).ok()?,
            Self::Fifo => std::fs::hard_link(&*FIFO, path).ok()?,
            Self::Nothing => {}
        }
        Some(())
    }
}

fuzz_target!(|input: Input| {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (number, file) in (0..).zip(&input.files) {
        let _ = file.make(&directory.path().join(name(number)));
    }
    let opener = Opener::new().guess(if input.guesses { Guess::Anything } else { Guess::Harmless });
    let opener = if input.locks { opener } else { opener.force_share() };
    let first = directory.path().join(name(0));
    let Ok(chain) = opener.chain(&first, None, Access::ReadOnly) else { return };
    assert!(chain.layers().len() <= input.files.len(), "a file twice in one chain");
    for layer in chain.layers() {
        let _ = ImageInfo::of(&**layer);
    }
    let size = chain.virtual_size();
    let _ = chain.read_at(GuestOffset(0), &mut vec![0; size.min(65536) as usize]);
    if size > 0
        && let Ok(owned) = chain.extent_at(GuestOffset(0), size, Detail::Holes)
    {
        assert!((1..=size).contains(&owned.extent.length));
    }
    let _ = chain.map(0, size).take(200).last();
    let _ = opener.backing_chain(&first, Some(&input.backing.reference()));
});
