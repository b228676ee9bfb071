//! Names by which images refer to files: QEMU's rules, as far as they lead to files.
//!
//! Pure: decides where a name leads, opens nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::layer::Reference;

/// Where a reference leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: PathBuf,
    /// The format, where the reference says so.
    pub format: Option<String>,
}

/// Resolves what the image at `image` (as typed) says of another file: an absolute path, a path
/// relative to the image's directory, `file:PATH`, or `json:{…}` with a local file. A name with a
/// colon before any slash is taken for a protocol, as QEMU does; `./a:b` is a file.
pub fn resolve(image: &Path, reference: &Reference) -> Result<Location> {
    let name = reference.name.as_bytes();
    let (path, format) = if let Some(json) = name.strip_prefix(b"json:") {
        from_json(json).map_err(|e| e.path(image))?
    } else if let Some(path) = name.strip_prefix(b"file:") {
        // QEMU takes `file:a` for `a`, and it stays relative to the image.
        (PathBuf::from(OsStr::from_bytes(path)), None)
    } else if let Some(protocol) = protocol(name) {
        let what = format!(
            "'{}' is not a local file: protocol '{protocol}' is not supported",
            reference.name.display()
        );
        return Err(Error::unsupported(what)
            .path(image)
            .hint("a file with a colon in its name is written './NAME'"));
    } else {
        (PathBuf::from(&reference.name), None)
    };
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(Location { path: directory.join(path), format: format.or_else(|| reference.format.clone()) })
}

/// The protocol of a name, if it has one.
fn protocol(name: &[u8]) -> Option<String> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| String::from_utf8_lossy(&name[..end]).into_owned())
}

/// `{"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}`, and what QEMU
/// flattens of it (`"file.filename"`). Options that we do not know are refused: they may change
/// what the guest sees.
fn from_json(text: &[u8]) -> Result<(PathBuf, Option<String>)> {
    let not_valid = |why: String| Error::unsupported(format!("backing file 'json:…': {why}"));
    let value: Value = serde_json::from_slice(text).map_err(|e| not_valid(e.to_string()))?;
    let mut found = JsonFile::default();
    found.collect("", &value).map_err(not_valid)?;
    let path = found.filename.ok_or_else(|| not_valid("names no file".to_owned()))?;
    Ok((path, found.format))
}

#[derive(Default)]
struct JsonFile {
    filename: Option<PathBuf>,
    format: Option<String>,
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
            ("driver", Some(name @ ("file" | "host_device"))) if self.format.is_none() => {
                self.format = (name != "file").then(|| "raw".to_owned());
            }
            ("driver", Some(name)) => self.format = Some(name.to_owned()),
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
        assert_eq!(location, Location { path: "/vm/b.img".into(), format: Some("qcow2".into()) });
        assert_eq!(led("/vm/a", r#"json:{"driver":"raw","file.filename":"c"}"#).unwrap(), "/vm/c");
        assert!(led("/vm/a", r#"json:{"driver":"raw","offset":512,"file":{"filename":"c"}}"#).is_err());
        assert!(led("/vm/a", r#"json:{"driver":"nbd","host":"h"}"#).is_err());
    }
}
