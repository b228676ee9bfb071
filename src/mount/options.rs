//! The words after `-o`: which there are, and what they mean to fuser.

use std::ffi::OsStr;
use std::path::Path;
use std::str::FromStr;

use fuser::{Config, MountOption, SessionACL};

use crate::error::{Error, Result};

/// The largest read that the kernel sends, in bytes. It makes several of a larger one, which several threads
/// serve at the same time; and what a thread has read into its buffer is in its processor's cache still when
/// the kernel copies it from there. Buffered writes are sent one after the other: of them it makes as few as
/// it can.
const MAX_READ: u32 = 256 << 10;

/// Mount options, as `mount(8)` and `mount.fuse(8)` have them.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    flags: Vec<MountOption>,
    who: SessionACL,
    source: Option<String>,
    subtype: Option<String>,
}

/// Words without a value.
const FLAGS: [(&str, MountOption); 15] = [
    ("ro", MountOption::RO),
    ("rw", MountOption::RW),
    ("dev", MountOption::Dev),
    ("nodev", MountOption::NoDev),
    ("suid", MountOption::Suid),
    ("nosuid", MountOption::NoSuid),
    ("exec", MountOption::Exec),
    ("noexec", MountOption::NoExec),
    ("atime", MountOption::Atime),
    ("noatime", MountOption::NoAtime),
    ("sync", MountOption::Sync),
    ("async", MountOption::Async),
    ("dirsync", MountOption::DirSync),
    ("auto_unmount", MountOption::AutoUnmount),
    ("default_permissions", MountOption::DefaultPermissions),
];

/// Words of mount(8), systemd and fstab(5) that do not concern a file system, or not one like this:
/// `mount` keeps most of them to itself, other programs that read fstab do not.
const NOT_OURS: [&str; 19] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "relatime",
    "norelatime",
    "strictatime",
    "lazytime",
    "nolazytime",
    "diratime",
    "nodiratime",
    "silent",
    "loud",
];

/// Likewise words that begin so.
const NOT_OURS_EITHER: [&str; 4] = ["x-", "X-", "comment=", "user="];

impl MountOptions {
    /// Adds one word: `allow_other`, `fsname=NAME`, …
    ///
    /// # Errors
    /// Nobody knows the word.
    pub fn add(&mut self, word: &str) -> Result<()> {
        if NOT_OURS.contains(&word) || NOT_OURS_EITHER.iter().any(|start| word.starts_with(start)) {
            return Ok(());
        }
        if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| *name == word) {
            self.flags.push(flag.clone());
            return Ok(());
        }
        match word.split_once('=') {
            None if word == "allow_other" => self.who = SessionACL::All,
            None if word == "allow_root" => self.who = SessionACL::RootAndOwner,
            Some(("fsname", name)) => self.source = Some(name.to_owned()),
            Some(("subtype", name)) => self.subtype = Some(name.to_owned()),
            _ => return Err(unknown(word)),
        }
        Ok(())
    }

    /// All options of several `-o` in one; the last word on a matter counts.
    pub(crate) fn merged(several: Vec<Self>) -> Self {
        several.into_iter().fold(Self::default(), |mut all, next| {
            all.flags.extend(next.flags);
            if next.who != SessionACL::Owner {
                all.who = next.who;
            }
            all.source = next.source.or(all.source);
            all.subtype = next.subtype.or(all.subtype);
            all
        })
    }

    /// What fuser wants to know to mount `image`.
    pub(super) fn config(&self, image: &Path, threads: usize) -> Result<Config> {
        let has = |flag| self.flags.contains(&flag);
        if has(MountOption::AutoUnmount) && self.who == SessionACL::Owner {
            let what = "mount option 'auto_unmount' needs 'allow_other' or 'allow_root' beside it";
            return Err(Error::invalid(what).hint("`-o auto_unmount,allow_other`"));
        }
        let mut options = self.flags.clone();
        if !has(MountOption::DefaultPermissions) {
            options.push(MountOption::DefaultPermissions);
        }
        let source = self.source.clone().unwrap_or_else(|| source_name(image.as_os_str()));
        options.push(MountOption::FSName(source));
        // fuser keeps the subtype that it knows of for fusermount3; the kernel takes it from root as well.
        let subtype = self.subtype.as_deref().unwrap_or("rebasefs");
        options.push(MountOption::CUSTOM(format!("subtype={subtype}")));
        options.push(MountOption::CUSTOM(format!("max_read={MAX_READ}")));
        let mut config = Config::default();
        config.mount_options = options;
        config.acl = self.who;
        config.n_threads = Some(threads);
        config.clone_fd = true;
        Ok(config)
    }
}

impl FromStr for MountOptions {
    type Err = Error;

    /// Words separated by commas.
    fn from_str(list: &str) -> Result<Self> {
        let mut options = Self::default();
        list.split(',').filter(|word| !word.is_empty()).try_for_each(|word| options.add(word))?;
        Ok(options)
    }
}

/// The image's path as the first field of `/proc/mounts`. fusermount3 separates options by
/// commas and takes backslashes for escapes.
fn source_name(image: &OsStr) -> String {
    image.to_string_lossy().replace([',', '\\'], "_")
}

fn unknown(word: &str) -> Error {
    let known: Vec<&str> = FLAGS.iter().map(|(name, _)| *name).collect();
    Error::invalid(format!("unknown mount option '{word}'"))
        .hint(format!("known are allow_other, allow_root, fsname=NAME, subtype=NAME, {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(list: &str) -> Result<Config> {
        list.parse::<MountOptions>()?.config(Path::new("/vm/a,b.qcow2"), 3)
    }

    #[test]
    fn the_usual_words_are_known() {
        let config = config("allow_other,ro,fsname=x,subtype=y,auto_unmount").unwrap();
        assert_eq!((config.acl, config.n_threads, config.clone_fd), (SessionACL::All, Some(3), true));
        for expected in [
            MountOption::RO,
            MountOption::AutoUnmount,
            MountOption::DefaultPermissions,
            MountOption::FSName("x".into()),
            MountOption::CUSTOM("subtype=y".into()),
        ] {
            assert!(config.mount_options.contains(&expected), "{expected:?}");
        }
    }

    #[test]
    fn unknown_words_are_refused_by_name() {
        for word in ["allow_others", "fsname", "umask=022", "ro=1"] {
            let error = config(word).unwrap_err().to_string();
            assert!(error.contains(&format!("unknown mount option '{word}'")), "{error}");
        }
        assert!(config("auto_unmount").unwrap_err().to_string().contains("needs 'allow_other'"));
    }

    #[test]
    fn a_line_of_fstab_is_understood() {
        let options = config("defaults,noauto,user=me,nofail,_netdev,x-systemd.automount,ro").unwrap();
        assert!(options.mount_options.contains(&MountOption::RO));
    }

    #[test]
    fn the_image_names_the_mount() {
        let options = config("").unwrap().mount_options;
        assert!(options.contains(&MountOption::FSName("/vm/a_b.qcow2".into())));
        assert!(options.contains(&MountOption::CUSTOM("subtype=rebasefs".into())));
    }
}
