//! Each hint of an error is something that works: the tables in `hints/` provoke an error as a user
//! does, take what can be typed out of the hint that is printed, and do what it says.
//!
//! A case is a few lines in bash, in a directory with the images of [`old_and_new`]:
//!
//! | line | what it is |
//! |---|---|
//! | `# …` | a remark |
//! | `$ …` | makes what is in the way |
//! | `! …` | what is refused; the message is on the standard error (of a server, it begins with the time), or in `mnt/ctl/status` |
//! | `( …` | the hint at its end, word by word; `$PWD` is the directory |
//! | `= FILE new.raw` | what a word in capitals stands for |
//! | `> …` | what the hint leads to: `{1}`, `{2}` are what it has in backquotes, `{!}` is what was refused, `{-1}` the same without this option |

mod words;

use std::path::{Path, PathBuf};

use crate::control::old_and_new;
use crate::mounted::open_dev_fuse;
use crate::scratch::{Ended, Scratch, rebasefs};

const TABLES: [&str; 4] = [
    include_str!("hints/command_line.txt"),
    include_str!("hints/images.txt"),
    include_str!("hints/mounting.txt"),
    include_str!("hints/control.txt"),
];

#[derive(Debug, Default)]
struct Case {
    given: String,
    typed: String,
    hint: String,
    names: Vec<(String, String)>,
    then: String,
}

/// The cases of a table, which empty lines divide.
fn cases(table: &str) -> impl Iterator<Item = Case> {
    let texts = table.split("\n\n").filter(|text| text.lines().any(|line| !line.starts_with('#')));
    texts.map(|text| {
        let mut case = Case::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (kind, rest) = line.split_at_checked(2).unwrap_or_else(|| panic!("no case: {text}"));
            match kind {
                "# " => {}
                "$ " => case.given += &format!("{rest}\n"),
                "! " => case.typed = rest.to_owned(),
                "( " => case.hint = rest.to_owned(),
                "= " => case.names.extend(rest.split_once(' ').map(|(word, is)| (word.into(), is.into()))),
                "> " => case.then += &format!("{rest}\n"),
                _ => panic!("no line of a case: {line}"),
            }
        }
        assert!(!case.typed.is_empty() && !case.hint.is_empty() && !case.then.is_empty(), "no case: {text}");
        case
    })
}

/// What a text has in backquotes.
fn typeable(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

impl Case {
    /// What is typed when one follows this hint.
    fn following(&self, hint: &str) -> String {
        let mut script = self.then.replace("{!}", &self.typed);
        for (place, found) in typeable(hint).into_iter().enumerate() {
            let (insert, leave_out) = (format!("{{{}}}", place + 1), format!("{{-{}}}", place + 1));
            let is_used = script.contains(&insert) || script.contains(&leave_out);
            assert!(is_used, "nobody tries `{found}` of ({hint})");
            let is_left_out = |word: &&str| *word == found || word.starts_with(&format!("{found}="));
            let words: Vec<&str> = self.typed.split(' ').filter(|word| !is_left_out(word)).collect();
            let named = self.names.iter().fold(found.to_owned(), |text, (word, is)| text.replace(word, is));
            script = script.replace(&insert, &named).replace(&leave_out, &words.join(" "));
        }
        script
    }

    /// The message, or what is wrong with it.
    fn try_it(&self) -> Result<String, String> {
        let place = Place::new(old_and_new());
        place.does(&self.given)?;
        let refused = place.bash(&self.typed);
        let status = std::fs::read_to_string(place.path("mnt/ctl/status")).unwrap_or_default();
        let said = refused.stderr + &status;
        if refused.code == Some(0) {
            return Err(format!("was not refused: {said}{}", refused.stdout));
        }
        let directory = place.path("");
        let hint = self.hint.replace("$PWD", directory.to_str().unwrap().trim_end_matches('/'));
        let is_it = |line: &&str| line.ends_with(&format!(" ({hint})"));
        let message = said.lines().find(is_it).ok_or_else(|| format!("has another hint: {said}"))?;
        let begins = ["rebasefs: ", "error: ", "refused: ", "["].iter().any(|form| message.starts_with(form));
        // Of many images, the name comes first.
        if !begins && !message.contains(".qcow2: failed: ") {
            return Err(format!("is not in the form of errors: {message}"));
        }
        place.does(&self.following(&hint))?;
        Ok(message.to_owned())
    }
}

/// Where bash does what a user would. Takes down afterwards what was mounted and attached there.
pub struct Place(Scratch);

impl Place {
    pub fn new(scratch: Scratch) -> Self {
        Self(scratch)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// Runs a script, which knows rebasefs by its name.
    pub fn bash(&self, script: &str) -> Ended {
        let program = Path::new(rebasefs()).parent().unwrap().display();
        let script = format!("PATH={program}:$PATH:/usr/sbin:/sbin; set -eo pipefail\n{script}");
        self.0.run_args("bash", &["-c", &script])
    }

    /// The same, and it must succeed.
    pub fn does(&self, script: &str) -> Result<(), String> {
        match self.bash(script) {
            Ended { code: Some(0), .. } => Ok(()),
            Ended { code, stdout, stderr } => Err(format!("{script}ended with {code:?}: {stdout}{stderr}")),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Lists that do not write a space otherwise, as the raw ones of findmnt do.
        let mounts = "findmnt -lno TARGET | grep \"^$PWD/\"";
        let devices = "losetup -nlO NAME,BACK-FILE | grep \" $PWD/\"";
        let left = format!(
            "{mounts} | tac | xargs -rd '\\n' umount -l; {devices} | cut -d ' ' -f 1 | xargs -r losetup -d
             for _ in {{1..2400}}; do {mounts} || {devices} || exit 0; sleep 0.05; done; exit 1"
        );
        let Ended { code, stdout, stderr } = self.0.run_args("bash", &["-c", &left]);
        assert!(code == Some(0) || std::thread::panicking(), "is left: {stdout}{stderr}");
    }
}

fn try_all(table: &str) {
    open_dev_fuse();
    let mut failed = Vec::new();
    for case in cases(table) {
        match case.try_it() {
            Ok(message) => println!("{message}"),
            Err(why) => failed.push(format!("{}\n{why}", case.typed)),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn hints_of_the_command_line_work() {
    try_all(TABLES[0]);
}

#[test]
fn hints_about_images_work() {
    try_all(TABLES[1]);
}

#[test]
fn hints_about_mounts_work() {
    try_all(TABLES[2]);
}

#[test]
fn hints_of_control_files_work() {
    try_all(TABLES[3]);
}
