//! Names by which images refer to files: QEMU's rules, as far as they lead to files.
//!
//! Pure: decides where a name leads, opens nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

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
pub fn resolve(image: &Path, reference: &Reference) -> Result<Location> {
    let name = reference.name.as_bytes();
    let (path, format) = local_path(name).map_err(|e| e.path(image))?;
    // Seen with QEMU 10: a name with any prefix counts as absolute and is left as it is.
    let has_prefix = path.as_os_str().as_bytes() != name;
    let format = match format {
        JsonFormat::Named(name) => Some(name),
        JsonFormat::Unsaid => reference.format.clone(),
        JsonFormat::Protocol => reference.format.clone().or_else(|| Some(Format::Raw.to_string())),
    };
    Ok(Location { format, ..beside(image, path, has_prefix) })
}

/// Resolves what the image at `image` (as typed) says of its external data file. QEMU takes it
/// from the current directory.
pub fn resolve_data_file(image: &Path, reference: &Reference) -> Result<Location> {
    let (path, _) = local_path(reference.name.as_bytes()).map_err(|e| e.path(image))?;
    Ok(Location { format: reference.format.clone(), ..beside(image, path, true) })
}

/// `path` in the directory of `image`; or in the current one, if QEMU looks there.
fn beside(image: &Path, path: PathBuf, qemu_looks_elsewhere: bool) -> Location {
    let directory = image.parent().unwrap_or(Path::new(""));
    let here = directory.join(&path);
    let differs = qemu_looks_elsewhere && here != path;
    let from_current_directory = differs.then(|| path.clone());
    Location { path: here, name: path, from_current_directory, format: None }
}

/// The path that a stored name stands for.
fn local_path(name: &[u8]) -> Result<(PathBuf, JsonFormat)> {
    if let Some(json) = name.strip_prefix(b"json:") {
        from_json(json)
    } else if let Some(path) = name.strip_prefix(b"file:") {
        Ok((PathBuf::from(OsStr::from_bytes(path)), JsonFormat::Unsaid))
    } else if let Some(protocol) = protocol(name) {
        let name = OsStr::from_bytes(name).display();
        let what = format!("'{name}' is not a local file: protocol '{protocol}' is not supported");
        Err(Error::unsupported(what).hint("a file with a colon in its name is written `./NAME`"))
    } else {
        Ok((PathBuf::from(OsStr::from_bytes(name)), JsonFormat::Unsaid))
    }
}

/// The protocol of a name, if it has one.
fn protocol(name: &[u8]) -> Option<String> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| String::from_utf8_lossy(&name[..end]).into_owned())
}

/// `{"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}`, and what QEMU
/// flattens of it (`"file.filename"`). Options that we do not know are refused: they may change
/// what the guest sees.
fn from_json(text: &[u8]) -> Result<(PathBuf, JsonFormat)> {
    let not_valid = |why: String| Error::unsupported(format!("backing file 'json:…': {why}"));
    let value: Value = serde_json::from_slice(text).map_err(|e| not_valid(e.to_string()))?;
    let mut found = JsonFile::default();
    found.collect("", &value).map_err(not_valid)?;
    let path = found.filename.ok_or_else(|| not_valid("names no file".to_owned()))?;
    Ok((path, found.format))
}

/// What a name says of the format.
#[derive(Default)]
enum JsonFormat {
    /// Nothing.
    #[default]
    Unsaid,
    /// The bytes of a file as they are, unless the image that names it knows better.
    Protocol,
    /// This one.
    Named(String),
}

#[derive(Default)]
struct JsonFile {
    filename: Option<PathBuf>,
    format: JsonFormat,
}

impl JsonFile {
    fn collect(&mut self, key: &str, value: &Value) -> std::result::Result<(), String> {
        if let Value::Object(members) = value {
            return members.iter().try_for_each(|(name, value)| {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                self.collect(&key, value)
            });
        }
        match (key, value.as_str()) {
            ("file.filename" | "filename", Some(name)) => self.filename = Some(name.into()),
            ("driver", Some("file" | "host_device")) => self.format = JsonFormat::Protocol,
            ("driver", Some(name)) => self.format = JsonFormat::Named(name.to_owned()),
            ("file.driver", Some("file" | "host_device")) => {}
            _ => return Err(format!("'{key}': {value} is not supported")),
        }
        Ok(())
    }
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
