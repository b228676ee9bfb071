//! A terminal on which a rebase shows its bar: what is said meanwhile stands above it, and Ctrl-C stops it.
//!
//! The terminal is real (`script` makes a pseudo-terminal); what it is sent is drawn on a screen here.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::interrupted::{held, large};
use crate::scratch::{Scratch, rebasefs};
use crate::traced::injecting;

const CLUSTER: usize = 65536;
const COLUMNS: usize = 180;

/// What a terminal shows: as much of it as bars and messages use.
#[derive(Default)]
struct Screen {
    lines: Vec<Vec<char>>,
    line: usize,
    column: usize,
    /// All its states: each time a line was about to be cleared.
    states: Vec<Vec<String>>,
}

impl Screen {
    fn showing(sent: &str) -> Self {
        let mut screen = Self::default();
        let mut rest = sent.chars();
        while let Some(character) = rest.next() {
            match character {
                '\r' => screen.column = 0,
                '\n' => screen.line += 1,
                '\u{1b}' => {
                    let end = rest.as_str().find(|c: char| c.is_ascii_alphabetic()).unwrap();
                    let sequence: String = rest.by_ref().take(end + 1).collect();
                    screen.obey(&sequence);
                }
                _ => screen.put(character),
            }
        }
        screen.note();
        screen
    }

    /// A control sequence: `[2K` clears the line, `[1A` goes up, `[32m` is a colour.
    fn obey(&mut self, sequence: &str) {
        let (number, letter) = sequence[1..].split_at(sequence.len() - 2);
        match letter {
            "K" => {
                self.note();
                self.row().clear();
            }
            "A" => self.line -= number.parse().unwrap_or(1),
            "m" => {}
            _ => panic!("a screen of ours does not know {sequence:?}"),
        }
    }

    fn row(&mut self) -> &mut Vec<char> {
        let line = self.line;
        self.lines.resize_with(self.lines.len().max(line + 1), Vec::new);
        &mut self.lines[line]
    }

    fn put(&mut self, character: char) {
        if self.column == COLUMNS {
            (self.line, self.column) = (self.line + 1, 0);
        }
        let column = self.column;
        let row = self.row();
        row.resize(row.len().max(column + 1), ' ');
        row[column] = character;
        self.column += 1;
    }

    fn note(&mut self) {
        let state: Vec<String> = self.lines.iter().map(|line| line.iter().collect()).collect();
        if self.states.last() != Some(&state) {
            self.states.push(state);
        }
    }

    fn last(&self) -> Vec<&str> {
        let last = self.states.last().unwrap();
        last.iter().map(|line| line.trim_end()).filter(|line| !line.is_empty()).collect()
    }
}

/// Runs rebasefs on a terminal, each such call of which takes so many milliseconds longer. When the
/// terminal has been sent `awaited`, these keys are typed. The exit code, and all that was sent.
fn on_a_terminal(s: &Scratch, line: &str, delay: (&str, u32), keys: Option<(&str, &str)>) -> (i32, String) {
    let trace = injecting(delay.0, &format!("delay_enter={}ms", delay.1)).join(" ");
    let shell = format!("stty rows 40 cols {COLUMNS}; exec strace {trace} {} {line}", rebasefs());
    let mut script = Command::new("env")
        .args(["--default-signal=INT", "script", "-qefc", &shell, "/dev/null"])
        .env("TERM", "xterm")
        .env("LC_ALL", "C.UTF-8")
        .env("SHELL", "/bin/sh")
        .env_remove("NO_COLOR")
        .current_dir(s.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script is needed; scripts/test installs it");
    let (mut input, mut output) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
    let (mut sent, mut buffer, mut keys) = (Vec::new(), [0; 4096], keys);
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        sent.extend_from_slice(&buffer[..length]);
        if let Some((_, typed)) =
            keys.take_if(|(awaited, _)| String::from_utf8_lossy(&sent).contains(*awaited))
        {
            input.write_all(typed.as_bytes()).unwrap();
        }
    }
    (script.wait().unwrap().code().unwrap(), String::from_utf8(sent).unwrap())
}

/// Three overlays that were not closed properly, on 2 MiB each of which the new backing file has otherwise.
fn three_overlays() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("old", CLUSTER, &"11 ".repeat(32));
    s.qemu_img("create -q -f qcow2 new 2M");
    for name in ["a", "b", "c"] {
        s.qemu_img(&format!("create -q -f qcow2 -b old -F raw {name}"));
        // The lowest of the incompatible features: dirty.
        s.poke(name, 79, &[1]);
    }
    s
}

#[test]
fn messages_stand_above_the_bar_whole_and_it_goes_on_below_them() {
    let s = three_overlays();
    let (code, sent) =
        on_a_terminal(&s, "-v rebase --jobs 1 -b new -F raw a b c", ("pread64,pwrite64", 10), None);
    assert_eq!(code, 0, "{sent}");
    let screen = Screen::showing(&sent);
    for name in ["a", "b", "c"] {
        let told = format!(
            "] {name}: was not closed properly; repaired 0 leaked clusters and 0 errors of its refcounts"
        );
        let is_message = |line: &String| line.trim_end().ends_with(&told);
        let is_bar = |line: &String| line.contains(" % ") && line.contains('━');
        let above = |state: &&Vec<String>| {
            let message = state.iter().position(is_message);
            message.is_some_and(|message| state[message + 1..].iter().any(is_bar))
        };
        let bars: Vec<_> = screen.states.iter().filter(above).collect();
        assert!(bars.len() >= 2, "{name}: no bar goes on below its message: {:#?}", screen.states);
        // Nothing that was written once is lost or overwritten.
        assert_eq!(
            screen.last().iter().filter(|line| line.ends_with(&told)).count(),
            1,
            "{:#?}",
            screen.last()
        );
    }
    let last = screen.last();
    assert!(!last.iter().any(|line| line.contains('━')), "a bar is left: {last:#?}");
    assert!(
        last.iter().any(|line| line.contains("WARN") && line.ends_with("the guest will see its header")),
        "{last:#?}"
    );
    for coloured in ["\u{1b}[32mINFO", "\u{1b}[33mWARN"] {
        assert!(sent.contains(coloured), "{coloured:?} in {sent:?}");
    }
}

#[test]
fn messages_have_no_colours_where_nobody_wants_them() {
    for (variables, is_coloured) in [
        ("", true),
        ("NO_COLOR=1", false),
        ("RUST_LOG_STYLE=never", false),
        ("NO_COLOR=1 RUST_LOG_STYLE=always", true),
    ] {
        let s = three_overlays();
        let line = format!("TERM=xterm {variables} {} -v rebase -b new -F raw a", rebasefs());
        let sent = s.run_args("script", &["-qec", &format!("env {line}"), "/dev/null"]).stdout;
        assert!(sent.contains("INFO") && sent.contains("WARN"), "{sent}");
        assert_eq!(sent.contains("\u{1b}[32m"), is_coloured, "{variables}: {sent:?}");
        let s = three_overlays();
        let piped = s.run_args("env", &[&["-S", line.as_str()].concat()]).stderr;
        assert!(piped.contains("INFO") && piped.contains("WARN"), "{piped}");
        assert_eq!(piped.contains('\u{1b}'), variables.contains("always"), "{variables}: {piped:?}");
    }
}

#[test]
fn ctrl_c_takes_the_bar_away_and_says_what_is_safe_and_how_to_go_on() {
    let s = large();
    let line = "rebase -b new.raw -F raw cow.qcow2";
    let (code, sent) = on_a_terminal(&s, line, ("pwrite64", 20), Some(("MiB of 16 MiB", "\u{3}")));
    assert_eq!(code, 130, "{sent}");
    let screen = Screen::showing(&sent);
    let said = screen.last().concat();
    assert!(!said.contains('━'), "a bar is left: {said}");
    let kept = held(&s);
    assert!(kept > 0 && kept < 16 << 20, "{kept} bytes kept: {said}");
    let begins = said.find("rebasefs: SIGINT after ").unwrap_or_else(|| panic!("{said}"));
    assert!(said[begins..].contains(" of 16 MiB, ") && said.contains(" copied and kept: "), "{said}");
    let safe = "the image still stands on its old backing file (start it again: what was copied already is not copied twice)";
    assert!(said.contains(safe), "{said}");
    s.check_clean("cow.qcow2");
    s.same("cow.qcow2", "base.raw");
    s.rebasefs(line);
    s.same("cow.qcow2", "base.raw");
    assert!(s.qemu_img("info cow.qcow2").contains("backing file: new.raw"));
}

#[test]
fn ctrl_c_before_anything_is_copied_leaves_neither_bar_nor_doubt() {
    let s = large();
    let line = "rebase -b new.raw -F raw cow.qcow2";
    let (code, sent) = on_a_terminal(&s, line, ("pread64", 600), Some(("looking at metadata", "\u{3}")));
    assert_eq!(code, 130, "{sent}");
    let screen = Screen::showing(&sent);
    let said = screen.last().concat();
    let safe = "rebasefs: SIGINT before anything was copied: nothing stands on a new backing file yet (start it again)";
    assert!(said.contains(safe) && !said.contains('━'), "{said:?}");
    assert_eq!(held(&s), 0);
    s.rebasefs(line);
}
