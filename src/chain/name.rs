//! Names by which images refer to files: QEMU's rules, as far as they lead to files.
//!
//! Pure: decides where a name leads, opens nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::block_options::BlockOptions;
use crate::error::{Error, Result};
use crate::layer::{Format, Reference};

/// Where a reference leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file, as it is called: by the path of the image that names it.
    pub path: PathBuf,
    /// The file, as it is to be opened: from the directory of the image that names it. Of a file that a
    /// person names, from the current directory.
    pub name: PathBuf,
    /// The file if QEMU is right, which reads some relative names from the current directory and
    /// not from that of the image; `None` where both rules agree.
    pub from_current_directory: Option<PathBuf>,
    /// The format, where the reference says so.
    pub format: Option<String>,
}

impl Location {
    /// The file that a person named.
    pub fn typed(path: &Path, format: Option<Format>) -> Self {
        let format = format.map(|format| format.to_string());
        Self { path: path.to_owned(), name: path.to_owned(), from_current_directory: None, format }
    }
}

/// Resolves what the image at `image` (as typed) says of another file: an absolute path, a path
/// relative to the image's directory, `file:PATH`, or `json:{…}` with a local file. A name with a
/// colon before any slash is taken for a protocol, as QEMU does; `./a:b` is a file.
///
/// # Errors
/// The name leads to no local file, or says something else than the format recorded beside it.
pub fn resolve(image: &Path, reference: &Reference) -> Result<Location> {
    let name = reference.name.as_bytes();
    let Local { path, driver, .. } = local(name, reference.format.as_deref()).map_err(|e| e.path(image))?;
    // Seen with QEMU 10: a name with any prefix counts as absolute and is left as it is.
    let has_prefix = path.as_os_str().as_bytes() != name;
    let format = reference.format.clone().or(driver);
    Ok(Location { format, ..beside(image, path, has_prefix) })
}

/// The full name of the backing file that the image at `image` (as typed) names, as QEMU shows it: a path
/// by that of the image, any other name as it is.
pub(super) fn full(image: &Path, reference: &Reference) -> String {
    let name = reference.name.as_bytes();
    let path = match protocol(name) {
        None if !name.starts_with(b"file:") => {
            beside(image, Path::new(&reference.name).to_owned(), false).path
        }
        _ => reference.name.clone().into(),
    };
    path.to_string_lossy().into_owned()
}

/// Resolves what the image at `image` (as typed) says of its external data file. QEMU takes it
/// from the current directory.
///
/// # Errors
/// The name leads to no local file, or to one that is not read as it is.
pub fn resolve_data_file(image: &Path, reference: &Reference) -> Result<Location> {
    let Local { path, driver, .. } = local(reference.name.as_bytes(), None).map_err(|e| e.path(image))?;
    match driver.as_deref() {
        None | Some("raw" | FILE | HOST_DEVICE) => {}
        Some(driver) => {
            let what = format!("its external data file is to be read by driver '{driver}'");
            return Err(Error::unsupported(what).path(image));
        }
    }
    Ok(Location { format: reference.format.clone(), ..beside(image, path, true) })
}

/// The format to be recorded with a name where nobody has given one: the driver that the name asks for,
/// or else that of the layer which was found there.
pub(crate) fn format_to_record(reference: &Reference, found: Format) -> String {
    let asked = local(reference.name.as_bytes(), None).ok().and_then(|local| local.driver);
    asked.unwrap_or_else(|| found.to_string())
}

/// Refuses a backing file, opened, that QEMU could not open by this name and this format: its drivers
/// `file` and `host_device` take regular files only, and devices only.
///
/// # Errors
/// The name contradicts the format, or asks for a driver that does not take such a file.
pub(crate) fn refuse_what_qemu_cannot_open(reference: &Reference, is_device: bool) -> Result<()> {
    let format = reference.format.as_deref();
    let Local { protocol, has_file_prefix, .. } = local(reference.name.as_bytes(), format)?;
    let what = match (protocol.as_deref(), is_device) {
        (Some(FILE), true) => "driver 'file' is for regular files, and this is a device".to_owned(),
        (Some(HOST_DEVICE), false) => "driver 'host_device' is for devices, and this is a file".to_owned(),
        (Some(HOST_DEVICE), _) if has_file_prefix => {
            "driver 'host_device' takes 'file:' for a part of the name".to_owned()
        }
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("'{}': {what}: QEMU could not open the image", reference.name.display()))
        .hint(PLAINLY))
}

/// `path` in the directory of `image`; or in the current one, if QEMU looks there.
fn beside(image: &Path, path: PathBuf, qemu_looks_elsewhere: bool) -> Location {
    let directory = image.parent().unwrap_or(Path::new(""));
    let here = directory.join(&path);
    let differs = qemu_looks_elsewhere && here != path;
    let from_current_directory = differs.then(|| path.clone());
    Location { path: here, name: path, from_current_directory, format: None }
}

/// QEMU's drivers for local files, whose bytes they give as they are.
const FILE: &str = "file";
const HOST_DEVICE: &str = "host_device";

/// A stored name that leads to a local file.
pub(super) struct Local {
    pub(super) path: PathBuf,
    /// The driver that the name itself asks for.
    pub(super) driver: Option<String>,
    /// The driver by which QEMU opens the file itself, where it does not choose one.
    pub(super) protocol: Option<String>,
    /// Whether it is written `file:PATH`.
    pub(super) has_file_prefix: bool,
}

/// What a name says that an image stores with this format.
fn local(name: &[u8], format: Option<&str>) -> Result<Local> {
    if let Some(json) = name.strip_prefix(b"json:") {
        return BlockOptions::parse(json)
            .and_then(|options| options.local(format))
            .map_err(|(kind, why)| Error::new(kind, format!("backing file 'json:…': {why}")).hint(PLAINLY));
    }
    if let Some(protocol) = protocol(name) {
        let name = OsStr::from_bytes(name).display();
        let what = format!("'{name}' is not a local file: protocol '{protocol}' is not supported");
        return Err(Error::unsupported(what).hint("a file with a colon in its name is written `./NAME`"));
    }
    let path = name.strip_prefix(b"file:");
    Ok(Local {
        path: OsStr::from_bytes(path.unwrap_or(name)).into(),
        driver: None,
        protocol: format.filter(|format| is_protocol(format)).map(str::to_owned),
        has_file_prefix: path.is_some(),
    })
}

const PLAINLY: &str = "name the file itself, and its format: `-b FILE -F FORMAT`";

pub(super) fn is_protocol(driver: &str) -> bool {
    matches!(driver, FILE | HOST_DEVICE)
}

/// The protocol of a name, if it has one that is not `file`.
fn protocol(name: &[u8]) -> Option<String> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    let protocol = &name[..end];
    (name[end] == b':' && protocol != b"file").then(|| String::from_utf8_lossy(protocol).into_owned())
}

/// Whether `path` lies inside `directory`, by name.
pub fn is_inside(path: &Path, directory: &Path) -> bool {
    path.starts_with(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led(image: &str, name: &str) -> Result<String> {
        let reference = Reference { name: name.into(), format: None };
        resolve(Path::new(image), &reference).map(|l| l.path.display().to_string())
    }

    #[test]
    fn names_lead_where_qemu_lets_them_lead() {
        assert_eq!(led("/vm/a.qcow2", "b.img").unwrap(), "/vm/b.img");
        assert_eq!(led("a.qcow2", "b.img").unwrap(), "b.img");
        assert_eq!(led("vm/a.qcow2", "../b.img").unwrap(), "vm/../b.img");
        assert_eq!(led("/vm/a.qcow2", "/b.img").unwrap(), "/b.img");
        assert_eq!(led("/vm/a.qcow2", "file:b.img").unwrap(), "/vm/b.img");
        assert_eq!(led("/vm/a.qcow2", "./b:1.qcow2").unwrap(), "/vm/./b:1.qcow2");
        assert_eq!(led("/vm/a.qcow2", "d/b:1.qcow2").unwrap(), "/vm/d/b:1.qcow2");
        assert!(led("/vm/a.qcow2", "b:1.qcow2").unwrap_err().to_string().contains("protocol 'b'"));
        assert!(led("/vm/a.qcow2", "nbd://host/export").is_err());
    }

    #[test]
    fn json_names_lead_to_local_files_only() {
        let name = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"b.img"}}"#;
        let reference = Reference { name: name.into(), format: None };
        let location = resolve(Path::new("/vm/a.qcow2"), &reference).unwrap();
        assert_eq!(location.path, Path::new("/vm/b.img"));
        assert_eq!(location.from_current_directory.as_deref(), Some(Path::new("b.img")));
        assert_eq!(location.format.as_deref(), Some("qcow2"));
        assert_eq!(led("/vm/a", r#"json:{"driver":"raw","file.filename":"c"}"#).unwrap(), "/vm/c");
        assert!(led("/vm/a", r#"json:{"driver":"raw","offset":512,"file":{"filename":"c"}}"#).is_err());
        assert!(led("/vm/a", r#"json:{"driver":"nbd","host":"h"}"#).is_err());
    }
}
