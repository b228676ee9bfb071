//! Who keeps a mount from going away, in words. Asks the kernel alone, never the mount: what it
//! serves may hang.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::point::{self, Entry};

/// No more are named.
const MOST: usize = 5;

/// What uses a mount: processes with a file or directory of it, mounts that lie in it, loop devices.
pub(super) fn users(mount: &Entry) -> Vec<String> {
    let inside = point::table(Path::new(point::OWN_TABLE)).unwrap_or_default();
    let inside = inside.iter().filter(|other| other.parent == mount.id);
    let mut found: Vec<String> =
        inside.map(|other| format!("a mount on '{}'", other.mountpoint.display())).collect();
    found.extend(loop_devices(&mount.mountpoint));
    for (number, process) in processes() {
        if found.len() >= MOST {
            break;
        }
        if uses(&process, mount) {
            found.push(in_words(number, &process));
        }
    }
    found
}

/// A process in another mount namespace in which a file system with this device number is mounted, and where.
pub(super) fn elsewhere(device: &str) -> Option<String> {
    let own = fs::read_link("/proc/self/ns/mnt").ok()?;
    let mut seen = BTreeSet::from([own]);
    for (number, process) in processes() {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let table = point::table(&process.join("mountinfo")).unwrap_or_default();
        if let Some(entry) = table.iter().find(|entry| entry.device == device) {
            let (who, place) = (in_words(number, &process), entry.mountpoint.display());
            return Some(format!("{who} has it mounted on '{place}' in a mount namespace of its own"));
        }
    }
    None
}

fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

fn in_words(number: u32, process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    format!("process {number} ({})", name.trim().replace(char::is_control, "?"))
}

fn uses(process: &Path, mount: &Entry) -> bool {
    let is_inside = |link: PathBuf| fs::read_link(link).is_ok_and(|path| path.starts_with(&mount.mountpoint));
    if ["cwd", "root", "exe"].into_iter().any(|link| is_inside(process.join(link))) {
        return true;
    }
    let files = fs::read_dir(process.join("fdinfo")).into_iter().flatten().filter_map(Result::ok);
    files.map(|file| file.path()).any(|file| {
        let about = fs::read_to_string(file).unwrap_or_default();
        id(&about) == Some(mount.id)
    })
}

/// The number of the mount that an open file lies in, by what `/proc/…/fdinfo/…` says.
pub(super) fn id(about: &str) -> Option<u64> {
    about.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

fn loop_devices(mountpoint: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().filter_map(Result::ok);
    let stands_here = |device: &PathBuf| {
        let file = fs::read_to_string(device.join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim_end()).starts_with(mountpoint))
    };
    let names = devices.map(|device| device.path()).filter(stands_here);
    names.filter_map(|device| Some(format!("loop device /dev/{}", device.file_name()?.display()))).collect()
}
