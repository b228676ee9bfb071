//! The internal snapshots of the overlay and the file names that they get: safe and unique, whatever
//! the image calls them. Pure.

use std::collections::HashMap;
use std::fmt::Write;

use crate::layer::qcow2::Snapshot;

/// Bytes of a name and of an id, so that there is room for both and for what file names end with: they
/// have at most 255.
const MAX_NAME: usize = 200;
const MAX_ID: usize = 40;

/// The table of snapshots, with a name for each.
#[derive(Debug)]
pub(super) struct Snapshots {
    table: Vec<Snapshot>,
    names: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Snapshots {
    pub(super) fn new(table: Vec<Snapshot>) -> Self {
        let mut names = Vec::with_capacity(table.len());
        let mut numbers = HashMap::with_capacity(table.len());
        for (number, snapshot) in (0..).zip(&table) {
            let plain = safe(&snapshot.name, MAX_NAME);
            let with_id = format!("{plain}~{}", safe(&snapshot.id, MAX_ID));
            // Neither name nor id has a tilde: what has two is nobody else's.
            let with_place = format!("{plain}~~{number}");
            let is_free = |name: &String| !name.is_empty() && !numbers.contains_key(name);
            let name = [plain, with_id].into_iter().find(is_free).unwrap_or(with_place);
            numbers.insert(name.clone(), number);
            names.push(name);
        }
        Self { table, names, numbers }
    }

    /// The snapshot at this place in the table.
    pub(super) fn at(&self, number: u32) -> Option<&Snapshot> {
        self.table.get(number as usize)
    }

    /// The place of the snapshot that has this name here.
    pub(super) fn named(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// The names, in the order of the table.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }
}

/// The name without what a file name cannot have, or a terminal should not be shown: that, and the
/// signs that mean something here, as `%` and two hexadecimal digits a byte. Long ones are cut off.
fn safe(name: &str, most: usize) -> String {
    let mut safe = String::new();
    for c in name.chars() {
        let before = safe.len();
        match c {
            c if c.is_control() || "/%~".contains(c) => {
                let mut bytes = [0; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    // Writing to a string cannot fail.
                    let _ = write!(safe, "%{byte:02X}");
                }
            }
            c => safe.push(c),
        }
        if safe.len() > most {
            safe.truncate(before);
            break;
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(table: &[(&str, &str)]) -> Vec<String> {
        let snapshot = |&(id, name): &(&str, &str)| Snapshot {
            l1_offset: 0,
            l1_entries: 0,
            id: id.into(),
            name: name.into(),
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: 0,
            icount: None,
        };
        let snapshots = Snapshots::new(table.iter().map(snapshot).collect());
        for (number, name) in (0..).zip(&snapshots.names) {
            assert_eq!(snapshots.named(name), Some(number));
            assert!(
                !name.is_empty() && name.len() + 4 <= 255 && !name.contains(['/', '\0', '\n']),
                "{name:?}"
            );
        }
        snapshots.names
    }

    #[test]
    fn harmless_names_are_kept_and_others_are_written_with_percent_signs() {
        assert_eq!(
            names(&[("1", "vor dem Update"), ("2", "größer"), ("3", "..")]),
            ["vor dem Update", "größer", ".."]
        );
        assert_eq!(
            names(&[("1", "../../etc/passwd"), ("2", "a\0b\n"), ("3", "50% ~x"), ("4", "\u{85}")]),
            ["..%2F..%2Fetc%2Fpasswd", "a%00b%0A", "50%25 %7Ex", "%C2%85"]
        );
    }

    #[test]
    fn names_that_are_taken_or_empty_get_the_id_and_at_last_the_place() {
        assert_eq!(
            names(&[("1", "a"), ("2", "a"), ("2", "a"), ("3", ""), ("", "")]),
            ["a", "a~2", "a~~2", "~3", "~"]
        );
        assert_eq!(names(&[("1", "a~2"), ("2", "a"), ("2", "a")]), ["a%7E2", "a", "a~2"]);
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        let long = "ü".repeat(150);
        let slashes = "/".repeat(65535);
        let names =
            names(&[("1", &long), ("2", &long), (&slashes, &slashes), ("3", &slashes), (&slashes, &slashes)]);
        assert_eq!(names[0], "ü".repeat(100));
        assert_eq!(names[1], format!("{}~2", "ü".repeat(100)));
        assert_eq!(names[2], "%2F".repeat(66));
    }
}
