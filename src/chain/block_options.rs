//! Block device options as QEMU writes them in a name: `json:{"driver": "qcow2", "file": {…}}`, nested
//! or flattened (`"file.filename"`).
//!
//! Pure. What is said twice must agree, and what QEMU would not take is refused: a name that two programs
//! read in two ways leads to two disks. Options that we do not know are refused, too: they may change
//! what the guest sees.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::name::{Local, is_protocol};
use crate::error::ErrorKind;

/// The kind of an error, and what is wrong.
type Refusal = (ErrorKind, String);

/// What a `json:` name says, as far as it is understood.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BlockOptions {
    driver: Option<String>,
    filename: Option<String>,
    file_driver: Option<String>,
    file_filename: Option<String>,
}

impl BlockOptions {
    /// Reads the text behind `json:`.
    pub(super) fn parse(text: &[u8]) -> Result<Self, Refusal> {
        let text = std::str::from_utf8(text).map_err(|e| unsupported(e.to_string()))?;
        let mut said = BTreeMap::new();
        collect("", text, &mut said)?;
        let mut options = Self::default();
        for (key, value) in said {
            let place = match key.as_str() {
                "driver" => &mut options.driver,
                "filename" => &mut options.filename,
                "file.driver" => &mut options.file_driver,
                "file.filename" => &mut options.file_filename,
                _ => return Err(unsupported(format!("'{key}': {value} is not supported"))),
            };
            let Ok(text) = serde_json::from_str(value) else {
                return Err(unsupported(format!("'{key}': {value} is not supported")));
            };
            *place = Some(text);
        }
        match options.file_driver.as_deref() {
            Some(driver) if !is_protocol(driver) => {
                Err(unsupported(format!("'file.driver': '{driver}' is not supported")))
            }
            _ => Ok(options),
        }
    }

    /// The local file that it leads to, in an image that stores this format with it. QEMU goes by that
    /// format, whatever the name says, and then looks for the file where that driver wants it named.
    pub(super) fn local(self, format: Option<&str>) -> Result<Local, Refusal> {
        if let (Some(driver), Some(format)) = (&self.driver, format)
            && driver != format
        {
            let what = format!("says driver '{driver}', and the format beside it is '{format}'");
            return Err((ErrorKind::InvalidArgument, what));
        }
        let driver = self.driver.as_deref().or(format);
        let (key, name, protocol) = match driver.filter(|driver| is_protocol(driver)) {
            Some(driver) => {
                refuse_misplaced(driver, "file.filename", &self.file_filename)?;
                refuse_misplaced(driver, "file.driver", &self.file_driver)?;
                ("filename", self.filename, Some(driver.to_owned()))
            }
            None => {
                refuse_misplaced(driver.unwrap_or("that"), "filename", &self.filename)?;
                ("file.filename", self.file_filename, self.file_driver)
            }
        };
        let name = name.ok_or_else(|| unsupported(format!("names no file (as '{key}')")))?;
        Ok(Local { path: name.into(), driver: self.driver, protocol, has_file_prefix: false })
    }
}

fn refuse_misplaced(driver: &str, key: &str, value: &Option<String>) -> Result<(), Refusal> {
    match value {
        None => Ok(()),
        Some(value) => {
            let what = format!("'{key}': '{value}' has no meaning for driver '{driver}'");
            Err((ErrorKind::InvalidArgument, what))
        }
    }
}

/// The members of an object and of those in it, under their flattened names.
fn collect<'a>(prefix: &str, text: &'a str, said: &mut BTreeMap<String, &'a str>) -> Result<(), Refusal> {
    let Members(members) = serde_json::from_str(text).map_err(|e| unsupported(e.to_string()))?;
    for (number, (name, value)) in members.iter().enumerate() {
        if members[..number].iter().any(|(other, _)| other == name) {
            return Err((ErrorKind::InvalidArgument, format!("'{prefix}{name}' is there twice")));
        }
        let (key, value) = (format!("{prefix}{name}"), value.get());
        if value.starts_with('{') {
            collect(&format!("{key}."), value, said)?;
        } else if let Some(other) = said.insert(key.clone(), value)
            && other != value
        {
            let what = format!("'{key}' is {other} in one place and {value} in another");
            return Err((ErrorKind::InvalidArgument, what));
        }
    }
    Ok(())
}

fn unsupported(why: String) -> Refusal {
    (ErrorKind::Unsupported, why)
}

/// The members of one object in the order in which they are written. A map would keep the last of two.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a name leads in an image with this format, and by which drivers; or what is wrong with it.
    fn led(format: Option<&str>, text: &str) -> Result<(String, Option<String>), String> {
        let local = BlockOptions::parse(text.as_bytes()).and_then(|options| options.local(format));
        local.map(|local| (local.path.display().to_string(), local.protocol)).map_err(|(_, why)| why)
    }

    #[test]
    fn both_spellings_are_one() {
        for text in [
            r#"{"driver":"raw","file":{"driver":"file","filename":"b"}}"#,
            r#"{"file.driver":"file","driver":"raw","file.filename":"b"}"#,
            r#"{"driver":"raw","file":{"filename":"b"},"file.driver":"file","file.filename":"b"}"#,
        ] {
            assert_eq!(led(Some("raw"), text), Ok(("b".into(), Some("file".into()))), "{text}");
        }
    }

    #[test]
    fn what_is_said_twice_agrees_or_is_refused() {
        for (format, text) in [
            (None, r#"{"driver":"raw","driver":"raw","file.filename":"b"}"#),
            (None, r#"{"driver":"raw","file.filename":"b","file":{"filename":"c"}}"#),
            (None, r#"{"driver":"raw","file":{"filename":"b","filename":"c"}}"#),
            (Some("raw"), r#"{"driver":"qcow2","file.filename":"b"}"#),
            (Some("qcow2"), r#"{"driver":"raw","file.filename":"b"}"#),
            (Some("raw"), r#"{"driver":"file","filename":"b"}"#),
            (Some("file"), r#"{"driver":"raw","file.filename":"b"}"#),
            (Some("file"), r#"{"driver":"host_device","filename":"b"}"#),
        ] {
            assert!(led(format, text).is_err(), "{format:?} {text}");
        }
    }

    #[test]
    fn a_file_is_named_where_its_driver_looks_for_it() {
        let file = |name: &str| Ok((name.to_owned(), Some("file".to_owned())));
        assert_eq!(led(Some("file"), r#"{"driver":"file","filename":"b"}"#), file("b"));
        assert_eq!(led(None, r#"{"driver":"file","filename":"b"}"#), file("b"));
        assert_eq!(led(Some("file"), r#"{"filename":"b"}"#), file("b"));
        assert_eq!(led(Some("raw"), r#"{"file.filename":"b"}"#), Ok(("b".into(), None)));
        for (format, text) in [
            (None, r#"{"filename":"b"}"#),
            (Some("raw"), r#"{"driver":"raw","filename":"b"}"#),
            (Some("raw"), r#"{"file.filename":"b","filename":"b"}"#),
            (None, r#"{"driver":"file","file.filename":"b"}"#),
            (Some("host_device"), r#"{"driver":"host_device","filename":"b","file.driver":"file"}"#),
            (None, r#"{"driver":"raw"}"#),
            (None, r#"{"driver":"raw","file":"node"}"#),
            (None, r#"{"driver":"raw","file":{"driver":"raw","file":{"filename":"b"}}}"#),
            (None, r#"{"driver":7,"file.filename":"b"}"#),
            (None, r#"{"file.filename":null}"#),
            (None, r#"["file.filename"]"#),
            (None, r#"{"file.filename":"b"} x"#),
        ] {
            assert!(led(format, text).is_err(), "{format:?} {text}");
        }
    }

    #[test]
    fn no_depth_of_objects_is_too_much() {
        let text = format!("{}1{}", r#"{"a":"#.repeat(600), "}".repeat(600));
        assert!(led(None, &text).is_err());
    }
}
