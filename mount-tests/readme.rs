//! What README.md quotes is what is printed, to the letter.

use std::path::Path;

use crate::mounted::open_dev_fuse;
use crate::scratch::{Scratch, rebasefs};

/// The commands of *A session*, each with what it prints.
fn session() -> Vec<(&'static str, String)> {
    let lines = include_str!("../README.md").lines().skip_while(|line| *line != "## A session").skip(2);
    let mut commands: Vec<(&str, String)> = Vec::new();
    for line in lines.map_while(|line| line.strip_prefix("    ")) {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command, String::new())),
            (None, Some((_, printed))) => printed.extend([line, "\n"]),
            (None, None) => panic!("'{line}' is no command"),
        }
    }
    assert!(!commands.is_empty());
    commands
}

#[test]
fn the_session_can_be_typed() {
    open_dev_fuse();
    let scratch = Scratch::new();
    let programs = Path::new(rebasefs()).parent().unwrap().display();
    let path = format!("PATH={programs}:{}", std::env::var("PATH").unwrap());
    let mut wrong = Vec::new();
    // All of them, since the mount is taken down by one.
    for (command, expected) in session() {
        let ended = scratch.run_args("env", &[&path, "bash", "-c", &format!("exec 2>&1; {command}")]);
        // Bash names the line of a script, and of what a person types it does not.
        let printed = ended.stdout.replace("bash: line 1: ", "bash: ");
        if printed != expected {
            wrong.push(format!("$ {command}\n{printed}instead of\n{expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    scratch.same("base.img", "cow.qcow2");
    scratch.check_clean("cow.qcow2");
}
