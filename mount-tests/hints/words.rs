//! No hint without a test: each in the sources stands in a table, or a test holds it word by word.

use std::path::{Path, PathBuf};

use super::{Case, TABLES, cases};

/// Hints that come where no line of a table can lead, and the test that has their words.
const HELD: [(&str, &str); 7] = [
    ("start it again: what was copied already is not copied twice", "mount-tests/terminal.rs"),
    ("start it again: what was dropped already is dropped", "mount-tests/interrupted.rs"),
    ("nobody may write to a backing file; when nobody does, start it again", "mount-tests/changed.rs"),
    (
        "nobody may move the files of a chain meanwhile; when nobody does, start it again",
        "mount-tests/meanwhile.rs",
    ),
    ("open it anew, and mount it again if it is mounted", "mount-tests/meanwhile.rs"),
    ("`flatten` is a rebase onto none", "mount-tests/library.rs"),
    ("`rebasefs check -r leaks IMAGE` frees it when the image is not mounted", "src/mount/image.rs"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// The string literals of a source file without its tests and comments, and what stands before each.
fn literals(text: &str) -> Vec<(String, String)> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let code = code.lines().filter(is_code).collect::<Vec<_>>().join("\n");
    // Quotation marks that are no ends of a literal, and backslashes that hide nothing.
    let code = code.replace("'\"'", "").replace("\\\\", "\u{2}").replace("\\\"", "\u{1}");
    let pieces: Vec<&str> = code.split('"').collect();
    assert_eq!(pieces.len() % 2, 1, "a literal without an end: {text}");
    // A backslash at the end of a line joins it with the next.
    let literal = |pair: &[&str]| {
        let joined: Vec<&str> = pair[1]
            .split("\\\n")
            .enumerate()
            .map(|(n, part)| if n == 0 { part } else { part.trim_start() })
            .collect();
        (
            joined.concat().replace('\u{1}', "\"").replace('\u{2}', "\\"),
            pair[0].split_whitespace().collect::<String>(),
        )
    };
    pieces.chunks_exact(2).map(literal).collect()
}

/// Whether text before a literal says that it is a hint.
fn makes_it_a_hint(before: &str) -> bool {
    let calls = ["hint(", "hint(format!(", "lethint=", "consthint:&str="];
    calls.iter().any(|call| before.ends_with(call))
}

/// All hints of the sources, and whatever else a message has in backquotes.
fn hints() -> Vec<(String, PathBuf)> {
    let of_file = |path: PathBuf| {
        let found = literals(&std::fs::read_to_string(&path).unwrap());
        let is_held = |text: &str| HELD.iter().any(|(words, _)| *words == text);
        let is_hint = |(text, before): &(String, String)| {
            // What the compiler says is no message of ours.
            !before.ends_with("must_use=") && text.contains('`') || makes_it_a_hint(before) || is_held(text)
        };
        found.into_iter().filter(is_hint).map(move |(text, _)| (text, path.clone())).collect::<Vec<_>>()
    };
    sources(&root().join("src")).into_iter().flat_map(of_file).collect()
}

/// Whether `said` is what `hint` makes, which may have `{…}` in it.
fn is_of(hint: &str, said: &str) -> bool {
    let mut fixed = hint.split('{').map(|piece| piece.split_once('}').map_or(piece, |(_, after)| after));
    let mut rest = said;
    fixed.all(|piece| match rest.find(piece) {
        Some(at) => {
            rest = &rest[at + piece.len()..];
            true
        }
        None => false,
    })
}

#[test]
fn each_hint_is_tried_or_held() {
    let hints = hints();
    let tables: Vec<Case> = TABLES.iter().flat_map(|table| cases(table)).collect();
    let is_tried = |hint: &str| tables.iter().any(|case| is_of(hint, &case.hint));
    let is_held = |hint: &str| HELD.iter().any(|(words, _)| *words == hint);
    let alone: Vec<_> = hints.iter().filter(|(hint, _)| !is_tried(hint) && !is_held(hint)).collect();
    assert!(alone.is_empty(), "no case in mount-tests/hints/ has these hints: {alone:#?}");
    for (words, test) in HELD {
        assert!(hints.iter().any(|(hint, _)| hint == words), "no error has this hint any more: {words}");
        // A test in the sources stands below what it tests.
        let text = std::fs::read_to_string(root().join(test)).unwrap();
        let tests = text.split("#[cfg(test)]\nmod tests").last().unwrap();
        assert!(tests.contains(words), "{test} does not hold: {words}");
    }
    let is_command = |hint: &&(String, PathBuf)| hint.0.contains('`');
    println!(
        "{} hints, {} of them with something to type; {} cases; {} held by their words elsewhere",
        hints.len(),
        hints.iter().filter(is_command).count(),
        tables.len(),
        HELD.len()
    );
}

/// Whoever reads `-U` within a sentence does not see where it ends.
#[test]
fn options_stand_in_backquotes() {
    for (hint, path) in hints() {
        let prose: String = hint.split('`').step_by(2).collect();
        let has_option = prose.split([' ', '(']).any(|word| word.starts_with('-') && word.len() > 1);
        assert!(!has_option, "{}: {hint}", path.display());
    }
}

#[test]
fn literals_are_found_in_any_form() {
    let text = "fn f() {\n    // \"no\"\n    let hint = \"a `b` \\\n        c\";\n    g('\"').hint(format!(\"say \\\"{x}\\\"\"))\n}";
    let found: Vec<String> = literals(text).into_iter().map(|(text, _)| text).collect();
    assert_eq!(found, ["a `b` c", "say \"{x}\""]);
    assert!(is_of("take it down: `umount {name}`", "take it down: `umount a b`"));
    assert!(!is_of("take it down: `umount {name}`", "take it down"));
}
