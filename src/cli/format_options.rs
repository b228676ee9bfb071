//! The `-o` options of `rebasefs create`: which there are, how they are written, what they mean.
//!
//! Pure. Names, values and their order in the echoed line are qemu-img's.

use std::ffi::OsString;
use std::fmt::Write;

use super::size;
use crate::error::{Error, Result};
use crate::layer::qcow2::Compression;
use crate::layer::qcow2::create::{Preallocation, Spec};
use crate::layer::{Format, Reference};

/// An option: its name, what it is if not given (empty: not echoed), what it does.
struct Known(&'static str, &'static str, &'static str);

/// In the order in which they are echoed.
const QCOW2: &[Known] = &[
    Known("cluster_size", "65536", "Bytes of a cluster, a power of two from 512 to 2M"),
    Known("extended_l2", "off", "Subclusters: L2 entries of 16 bytes"),
    Known("preallocation", "", "Set aside beforehand: off, metadata, falloc, full"),
    Known("compression_type", "zlib", "Compression of compressed clusters: zlib, zstd"),
    Known("size", "", "Virtual size"),
    Known("compat", "", "Version: 0.10 or v2, 1.1 or v3"),
    Known("backing_file", "", "Name of the backing file"),
    Known("backing_fmt", "", "Format of the backing file"),
    Known("data_file", "", "Name of an external data file"),
    Known("data_file_raw", "", "The external data file is a raw image by itself"),
    Known("lazy_refcounts", "off", "Refcounts may be written late"),
    Known("refcount_bits", "16", "Bits of a refcount, a power of two up to 64"),
    Known("nocow", "", "Write in place where the file system would copy (Btrfs)"),
];
const RAW: &[Known] = &[
    Known("size", "", "Virtual size"),
    Known("preallocation", "", "Set aside beforehand: off, falloc, full"),
    Known("nocow", "", "Write in place where the file system would copy (Btrfs)"),
];
const SWITCHES: &[&str] = &["extended_l2", "data_file_raw", "lazy_refcounts", "nocow"];

/// The options of one format, as given.
#[derive(Debug)]
pub(super) struct FormatOptions {
    format: Format,
    given: Vec<(String, String)>,
    /// The name of the backing file, where it was typed by itself: it need not be text.
    backing: Option<OsString>,
}

impl FormatOptions {
    /// Splits `name=value,…` (a comma in a value is written twice). The last of a name counts.
    pub(super) fn parse(format: Format, texts: &[String]) -> Result<Self> {
        let mut options = Self { format, given: Vec::new(), backing: None };
        for item in texts.iter().flat_map(|text| split(text)) {
            let (name, value) = item.split_once('=').unwrap_or((&item, "on"));
            options.refuse(name)?;
            options.set(name, value.to_owned());
        }
        Ok(options)
    }

    fn known(&self) -> &'static [Known] {
        match self.format {
            Format::Raw => RAW,
            Format::Qcow2 => QCOW2,
        }
    }

    fn refuse(&self, name: &str) -> Result<()> {
        if name.starts_with("encrypt") {
            let error = Error::unsupported(format!("option '{name}': encryption is not supported"));
            return Err(error.hint("encrypt the file system below, or use qemu-img"));
        }
        if !self.known().iter().any(|known| known.0 == name) {
            let error = Error::invalid(format!("format {} has no option '{name}'", self.format));
            return Err(error.hint("`-o help` lists the options"));
        }
        Ok(())
    }

    /// Gives an option a value, in place of the one it had.
    pub(super) fn set(&mut self, name: &str, value: String) {
        self.given.retain(|(given, _)| given != name);
        self.given.push((name.to_owned(), value));
    }

    /// The value given.
    pub(super) fn find(&self, name: &str) -> Option<&str> {
        self.given.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// Takes the name of the backing file as it was typed.
    pub(super) fn name_backing(&mut self, name: Option<OsString>) {
        self.backing = name;
    }

    /// Refuses values that are no sizes, numbers or switches, whatever they mean.
    pub(super) fn refuse_unreadable(&self) -> Result<()> {
        if let Some(text) = self.find("cluster_size") {
            size::parse(text, "cluster size")?;
        }
        if let Some(text) = self.find("refcount_bits")
            && text.parse::<u64>().is_err()
        {
            return Err(not_one_of("refcount_bits", text, "a power of two up to 64"));
        }
        SWITCHES.iter().try_for_each(|name| self.is_on(name).map(drop))
    }

    pub(super) fn is_on(&self, name: &str) -> Result<bool> {
        self.find(name).map_or(Ok(false), |value| switch(name, value))
    }

    /// The backing file, where one is given.
    pub(super) fn backing(&self) -> Option<Reference> {
        let name = self.find("backing_file").filter(|name| !name.is_empty())?;
        let format = self.find("backing_fmt").map(str::to_owned);
        Some(Reference { name: self.backing.clone().unwrap_or_else(|| OsString::from(name)), format })
    }

    /// The size in bytes, where one is given.
    pub(super) fn size(&self) -> Result<Option<u64>> {
        self.find("size").map(|text| size::parse(text, "image size")).transpose()
    }

    /// What is to be set aside.
    pub(super) fn preallocation(&self) -> Result<Preallocation> {
        let modes = match self.format {
            Format::Raw => "off, falloc or full",
            Format::Qcow2 => "off, metadata, falloc or full",
        };
        match (self.find("preallocation"), self.format) {
            (None | Some("off"), _) => Ok(Preallocation::Off),
            (Some("metadata"), Format::Qcow2) => Ok(Preallocation::Metadata),
            (Some("falloc"), _) => Ok(Preallocation::Falloc),
            (Some("full"), _) => Ok(Preallocation::Full),
            (Some(other), _) => Err(not_one_of("preallocation", other, modes)),
        }
    }

    /// The image that is meant; the size must be known by now.
    pub(super) fn spec(&self) -> Result<Spec> {
        let bytes = size::parse(self.find("cluster_size").unwrap_or("64k"), "cluster size")?;
        if !bytes.is_power_of_two() || !(512..=2 << 20).contains(&bytes) {
            let bytes = bytes.to_string();
            return Err(not_one_of("cluster_size", &bytes, "a power of two between 512 and 2048k"));
        }
        let width = self.find("refcount_bits").unwrap_or("16");
        let bits = width.parse().ok().filter(|bits: &u32| bits.is_power_of_two() && *bits <= 64);
        let bits = bits.ok_or_else(|| not_one_of("refcount_bits", width, "a power of two up to 64"))?;
        Ok(Spec {
            version: match self.find("compat") {
                None | Some("1.1" | "v3") => 3,
                Some("0.10" | "v2") => 2,
                Some(other) => return Err(not_one_of("compat", other, "0.10, 1.1, v2 or v3")),
            },
            cluster_bits: bytes.trailing_zeros(),
            // As QEMU rounds it.
            size: self.size()?.unwrap_or(0).next_multiple_of(512),
            has_subclusters: self.is_on("extended_l2")?,
            refcount_order: bits.trailing_zeros(),
            has_lazy_refcounts: self.is_on("lazy_refcounts")?,
            compression: match self.find("compression_type") {
                None | Some("zlib") => Compression::Zlib,
                Some("zstd") => Compression::Zstd,
                Some(other) => return Err(not_one_of("compression_type", other, "zlib or zstd")),
            },
            backing: self.backing(),
            data_file: self.find("data_file").map(OsString::from),
            is_data_file_raw: self.is_on("data_file_raw")?,
            preallocation: self.preallocation()?,
        })
    }

    /// `name=value …`, as qemu-img echoes it.
    pub(super) fn echo(&self) -> String {
        let mut text = String::new();
        for Known(name, default, _) in self.known() {
            let value = match self.find(name) {
                None if default.is_empty() => continue,
                None => (*default).to_owned(),
                Some(value) => canonical(name, value),
            };
            // Writing to a string cannot fail.
            let _ = write!(text, " {name}={}", value.replace(',', ",,"));
        }
        text
    }

    /// The list that `-o help` shows.
    pub(super) fn help(format: Format) -> String {
        let known = Self { format, given: Vec::new(), backing: None }.known();
        let lines = known.iter().map(|Known(name, _, what)| format!("  {name:<20} - {what}\n"));
        format!("Supported options:\n{}", lines.collect::<String>())
    }
}

fn split(text: &str) -> Vec<String> {
    const COMMA: &str = "\0";
    let items = text.replace(",,", COMMA);
    items.split(',').filter(|item| !item.is_empty()).map(|item| item.replace(COMMA, ",")).collect()
}

fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        other => Err(not_one_of(name, other, "on or off")),
    }
}

fn canonical(name: &str, value: &str) -> String {
    match (name, switch(name, value)) {
        ("cluster_size" | "size", _) => {
            size::parse(value, name).map_or_else(|_| value.to_owned(), |bytes| bytes.to_string())
        }
        (name, Ok(is_on)) if SWITCHES.contains(&name) => if is_on { "on" } else { "off" }.to_owned(),
        _ => value.to_owned(),
    }
}

fn not_one_of(name: &str, value: &str, right: &str) -> Error {
    Error::invalid(format!("option '{name}' cannot be '{value}'")).hint(format!("it is {right}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<FormatOptions> {
        FormatOptions::parse(Format::Qcow2, &[text.to_owned()])
    }

    #[test]
    fn commas_are_written_twice_and_the_last_one_counts() {
        let options = parse("data_file=a,,b=c,lazy_refcounts,cluster_size=4k,cluster_size=8k").unwrap();
        let spec = options.spec().unwrap();
        assert_eq!(spec.data_file, Some("a,b=c".into()));
        assert!(spec.has_lazy_refcounts);
        assert_eq!(spec.cluster_bits, 13);
        assert!(options.echo().contains(" cluster_size=8192 "), "{}", options.echo());
        assert!(options.echo().contains(" data_file=a,,b=c "), "{}", options.echo());
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in ["encryption=on", "encrypt.format=luks", "frobnicate=1"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(text.split('=').next().unwrap()), "{error}");
        }
        for text in
            ["cluster_size=1000", "refcount_bits=3", "compat=2", "lazy_refcounts=maybe", "preallocation=x"]
        {
            let error = parse(text).unwrap().spec().unwrap_err().to_string();
            assert!(error.contains(text.split('=').next().unwrap()), "{error}");
        }
    }
}
