//! Typing mistakes: the suggestion that is printed is what was meant, and works when it is typed.

use crate::control::old_and_new;
use crate::scratch::rebasefs;

/// What was typed, the word in it that is mistyped, and the one that was meant.
const MISTAKES: [(&str, &str, &str); 9] = [
    ("rebsae -b new.raw cow.qcow2", "rebsae", "rebase"),
    ("chekc cow.qcow2", "chekc", "check"),
    ("rebase --bakcing new.raw cow.qcow2", "--bakcing", "--backing"),
    ("rebase --dry-rum -b new.raw cow.qcow2", "--dry-rum", "--dry-run"),
    ("info --backing-chian cow.qcow2", "--backing-chian", "--backing-chain"),
    ("info --output=jsno cow.qcow2", "jsno", "json"),
    ("rebase --progress=jsom -b new.raw cow.qcow2", "jsom", "json"),
    ("check --repiar=all cow.qcow2", "--repiar", "--repair"),
    ("generate completions bsah", "bsah", "bash"),
];

#[test]
fn suggestions_are_what_was_meant() {
    for (typed, mistyped, meant) in MISTAKES {
        let s = old_and_new();
        let ended = s.run(rebasefs(), typed);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{typed}: {}", ended.stderr);
        let first = ended.stderr.lines().next().unwrap();
        assert!(first.starts_with("error: ") && first.contains(mistyped), "{typed}: {}", ended.stderr);
        let tip = ended.stderr.lines().find(|line| line.starts_with("  tip: ")).unwrap_or_default();
        assert!(
            tip.contains(" similar ") && tip.contains(&format!("'{meant}'")),
            "{typed}: {}",
            ended.stderr
        );
        println!("{first}: {tip}");
        s.rebasefs(&typed.replace(mistyped, meant));
    }
}

/// Of what can be one of few words, all are said.
#[test]
fn words_of_which_there_are_few_are_listed() {
    let s = old_and_new();
    for (typed, listed) in [
        ("rebase -F qocw2 -b new.raw cow.qcow2", "(it is `raw` or `qcow2`; "),
        ("info -f qcow3 cow.qcow2", "(it is `raw` or `qcow2`; "),
        ("mount -o format=qcow cow.qcow2 .", "(it is `raw` or `qcow2`; "),
        ("mount -o thread=2 cow.qcow2 .", "(known are allow_other, allow_root, fsname=NAME, "),
        ("mount -o alow_other cow.qcow2 .", "(known are allow_other, allow_root, fsname=NAME, "),
        (
            "rebase --progress=slow -b new.raw cow.qcow2",
            "[possible values: auto, bar, lines, qemu, json, none]",
        ),
        ("create -f qcow2 -o compression_type=zip n.qcow2 1M", "(it is zlib or zstd)"),
        ("create -f qcow2 -o lazy_refcounts=maybe n.qcow2 1M", "(it is on or off)"),
    ] {
        let said = s.rebasefs_fails(1, typed);
        assert!(said.contains(listed), "{typed}: {said}");
    }
    // `compare` ends with 1 for images that differ.
    let said = s.rebasefs_fails(2, "compare --stirct base.raw new.raw");
    assert!(said.contains("tip: a similar argument exists: '--strict'"), "{said}");
}
