//! The program as a helper of mount(8): what `mount`, `/etc/fstab` and mount units call becomes the
//! words of `rebasefs mount`. Changes words only; clap checks them.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The names under which mount(8) looks for a helper.
const NAMES: [&str; 2] = ["mount.fuse.rebasefs", "mount.rebasefs"];

/// What a helper is called to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Called {
    /// These words, as if a person had typed them.
    Typed(Vec<OsString>),
    /// To do all but mount (`mount --fake`).
    ForShow,
}

/// Looks at what was typed, the program's name first. `is_command` tells a subcommand.
pub(super) fn called(typed: &[OsString], is_command: impl Fn(&OsStr) -> bool) -> Called {
    let name = typed.first().and_then(|name| Path::new(name).file_name()).unwrap_or_default();
    if NAMES.iter().any(|helper| name == *helper) {
        return by_mount(&typed[1..]);
    }
    match typed {
        // mount.fuse3 (`mount -t fuse rebasefs#IMAGE DIR`): `rebasefs IMAGE DIR -o OPTION,…`.
        [_, image, directory, o, options]
            if o == "-o" && Path::new(directory).is_absolute() && !is_command(image) =>
        {
            mount([o, options, &"--".into(), image, directory])
        }
        _ => Called::Typed(typed.to_vec()),
    }
}

/// `mount.TYPE IMAGE DIR [-sfnv] [-N NAMESPACE] [-o OPTION,…] [-t TYPE]`, see mount(8), *External
/// helpers*. What is none of these is for `rebasefs mount` to judge.
fn by_mount(words: &[OsString]) -> Called {
    let (mut options, mut places): (Vec<OsString>, Vec<OsString>) = (Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("-t") => drop(words.next()),
            Some("-o") => options.extend([word.clone()].into_iter().chain(words.next().cloned())),
            Some(flags) if is_flags(flags) => {
                if flags.contains('f') {
                    return Called::ForShow;
                }
                if flags.contains('v') {
                    options.push("-v".into());
                }
            }
            Some(other) if other.starts_with('-') => options.push(word.clone()),
            _ => places.push(word.clone()),
        }
    }
    mount(options.iter().chain([&"--".into()]).chain(&places))
}

/// `-n` (no mtab) and `-s` (sloppy) ask for nothing here.
fn is_flags(word: &str) -> bool {
    word.strip_prefix('-').is_some_and(|flags| !flags.is_empty() && flags.chars().all(|c| "sfnv".contains(c)))
}

fn mount<'a>(words: impl IntoIterator<Item = &'a OsString>) -> Called {
    let start = ["rebasefs", "mount"].map(OsString::from);
    Called::Typed(start.into_iter().chain(words.into_iter().cloned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn becomes(line: &str) -> Called {
        called(&words(line), |word| word == "mount" || word == "info")
    }

    #[test]
    fn the_calls_of_mount_become_ours() {
        let typed = |line| Called::Typed(words(line));
        let helper = "/usr/sbin/mount.fuse.rebasefs /vm/c.qcow2 /mnt";
        assert_eq!(
            becomes(&format!("{helper} -o rw,x")),
            typed("rebasefs mount -o rw,x -- /vm/c.qcow2 /mnt")
        );
        assert_eq!(
            becomes(&format!("{helper} -nsv -o ro -t fuse.rebasefs")),
            typed("rebasefs mount -v -o ro -- /vm/c.qcow2 /mnt")
        );
        assert_eq!(becomes(&format!("{helper} -f")), Called::ForShow);
        assert_eq!(becomes("rebasefs c.qcow2 /mnt -o ro"), typed("rebasefs mount -o ro -- c.qcow2 /mnt"));
    }

    #[test]
    fn what_people_type_stays() {
        for line in
            ["rebasefs", "rebasefs info c.qcow2", "rebasefs mount /a -o ro", "rebasefs mout a b -o ro"]
        {
            assert_eq!(becomes(line), Called::Typed(words(line)), "{line}");
        }
    }
}
