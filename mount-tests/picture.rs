//! Pictures: their cells are what `qemu-img map` says, and what a page gets is a document.

use serde_json::Value;

use crate::scratch::{Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// top: 11 zz -- -- 22 c33 -- --; middle: -- -- 44 -- -- 55; base: 66 66 66 -- 66 -- -- 66.
fn chain() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("base.raw", CLUSTER, "66 66 66 -- 66 -- -- 66");
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw middle.qcow2 768k");
    s.draw("middle.qcow2", CLUSTER, "-- -- 44 -- -- 55");
    s.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2 1M");
    s.draw("top.qcow2", CLUSTER, "11 zz -- -- 22 c33 -- -- -- -- -- -- -- 77");
    s
}

/// The symbols that the map of qemu-img gives for cells of a cluster.
fn expected(s: &Scratch, image: &str) -> String {
    let map: Vec<Value> = serde_json::from_str(&s.qemu_img(&format!("map --output=json {image}"))).unwrap();
    let cells = map.iter().flat_map(|entry| {
        let is = |key: &str| entry[key].as_bool().unwrap();
        let symbol = match (is("data") && !is("zero"), is("present")) {
            (true, _) => char::from_digit(entry["depth"].as_u64().unwrap() as u32, 36).unwrap(),
            (false, true) => '-',
            (false, false) => '.',
        };
        std::iter::repeat_n(symbol, entry["length"].as_u64().unwrap() as usize / CLUSTER)
    });
    cells.collect()
}

/// The rows of a picture without their offsets.
fn cells(text: &str) -> String {
    let rows = text.lines().skip(2).map(|line| line.get(10..).unwrap_or_default());
    rows.take_while(|cells| !cells.contains(' ')).collect()
}

#[test]
fn every_cell_is_what_qemu_img_maps() {
    let s = chain();
    let text = s.rebasefs("map --picture top.qcow2");
    assert_eq!(cells(&text), expected(&s, "top.qcow2"), "{text}");
    for (legend, figures) in [
        ("00  ", "256 KiB  25.0 %  0: top.qcow2 (qcow2)"),
        ("11  ", "64 KiB   6.2 %  1: middle.qcow2 (qcow2)"),
        ("22  ", "64 KiB   6.2 %  2: base.raw (raw)"),
    ] {
        assert!(text.lines().any(|line| line.starts_with(legend) && line.ends_with(figures)), "{text}");
    }
    // A part of it, and one layer alone.
    let part = s.rebasefs("map --picture --start-offset 128k --max-length 256k top.qcow2");
    assert_eq!(cells(&part), expected(&s, "top.qcow2")[2..6], "{part}");
    assert_eq!(cells(&s.rebasefs("map --picture -f raw base.raw")).len(), 8 * CLUSTER / 4096);
}

#[test]
fn a_terminal_has_colours_and_its_width_and_nobody_else_has() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 large.qcow2 1T");
    s.qemu_io("qcow2", "large.qcow2", &["write -q 0 64k", "write -q 512G 64k"]);
    let seen = |columns: usize, environment: &str| {
        let inner =
            format!("stty rows 24 cols {columns}; {environment} {} map --picture large.qcow2", rebasefs());
        s.run_args("script", &["-qec", &format!("export TERM=xterm; {inner}"), "/dev/null"]).stdout
    };
    for columns in [40, 80, 200] {
        let text = seen(columns, "NO_COLOR=1");
        assert!(!text.contains('\u{1b}'), "{text:?}");
        let widths: Vec<usize> = text.lines().map(|line| line.trim_end().chars().count()).collect();
        assert!(widths.iter().all(|width| *width <= columns), "{columns}: {text}");
        // All cells of a row, though most of them are empty, and no row is wasted.
        assert!(widths.iter().max().unwrap() + 16 > columns, "{columns}: {text}");
        assert!((12..=24).contains(&text.lines().count()), "{text}");
        assert_eq!(cells(&text).matches('0').count(), 2, "{text}");
        assert!(seen(columns, "").contains("\u{1b}["), "a terminal has colours");
    }
    assert!(!s.rebasefs("map --picture large.qcow2").contains('\u{1b}'));
}

/// The titles of the cells of a document that a real parser has read.
fn titles(s: &Scratch, file: &str) -> Vec<String> {
    s.ok("xmllint", &format!("--noout {file}"));
    let path = "//*[local-name()='rect']/*[local-name()='title']/text()";
    let found = s.run_args("xmllint", &["--xpath", path, file]);
    assert_eq!(found.code, Some(0), "{}", found.stderr);
    found.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn a_page_gets_a_document_whatever_the_files_are_called() {
    let s = chain();
    let name = "a & <b> \"c\" ' \u{1} ü.qcow2";
    std::fs::copy(s.path("top.qcow2"), s.path(name)).unwrap();
    let ended = s.run_args(rebasefs(), &["map", "--svg", "map.svg", name]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    let titles = titles(&s, "map.svg");
    assert_eq!(titles.len(), expected(&s, "top.qcow2").as_bytes().chunk_by(|a, b| a == b).count());
    assert_eq!(titles[2], "0x20000 – 0x30000 (64 KiB): 1: middle.qcow2 (qcow2)");
    assert_eq!(
        s.run_args(rebasefs(), &["map", "--svg", "-", name]).stdout.as_bytes(),
        std::fs::read(s.path("map.svg")).unwrap()
    );
    let missing = s.rebasefs_fails(1, "map --svg nowhere/map.svg top.qcow2");
    assert!(missing.contains("nowhere/map.svg") && missing.contains("writing the picture"), "{missing}");
}

/// old: 11 11 11 -- -- -- 11 11; new: 11 33 11 -- 22 -- 33 33; overlay: -- -- 44 -- -- -- -- --.
#[test]
fn a_dry_run_draws_what_a_rebase_would_do() {
    let s = Scratch::new();
    s.draw_raw("old", CLUSTER, "11 11 11 -- -- -- 11 11");
    s.draw_raw("new", CLUSTER, "11 33 11 -- 22 -- 33 33");
    s.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    s.draw("cow.qcow2", CLUSTER, "-- -- 44");
    s.rebasefs("rebase --dry-run --svg plan.svg -b new -F raw cow.qcow2");
    let kinds: Vec<String> =
        titles(&s, "plan.svg").iter().map(|title| title.split_once("): ").unwrap().1.to_owned()).collect();
    let expected = [
        "compared, and found equal",
        "copied",
        "skipped: held by the overlay",
        "skipped: equal by metadata",
        "becomes zero clusters",
        "skipped: equal by metadata",
        "copied",
    ];
    assert_eq!(kinds, expected);
    assert!(s.rebasefs_fails(1, "rebase --svg plan.svg -b new cow.qcow2").contains("--dry-run"));
    let many = s.rebasefs_fails(1, "rebase --dry-run --svg plan.svg -b new cow.qcow2 cow.qcow2");
    assert!(many.contains("--svg draws one image"), "{many}");
}

/// The plot of `scripts/bench`: ratios of 0.01, 0.1 and 1 stand in equal distances.
#[test]
fn the_benchmark_is_drawn_on_a_logarithmic_scale() {
    let s = Scratch::new();
    s.write(
        "plot.py",
        b"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1])\n\
          from types import SimpleNamespace as Run\n\
          from benchmark import plot, report\n\
          row = lambda name, *r: report.Row(name, [Run(seconds=x) for x in r], [Run(seconds=1)] * len(r))\n\
          rows = [row('a<b>&', 0.01, 0.005, 0.02), row('b', 0.1), row('c', 1), row('d', 1e-12), row('e', 5)]\n\
          print(plot.document(rows, 'a <machine>'))\n",
    );
    let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");
    s.write("plot.svg", s.ok("python3", &format!("plot.py {scripts}")).as_bytes());
    s.ok("xmllint", "--noout plot.svg");
    let found = s.run_args("xmllint", &["--xpath", "//*[local-name()='circle']/@cx", "plot.svg"]);
    let place = |text: &str| text.trim_matches('"').parse::<f64>().unwrap();
    let dots: Vec<f64> =
        found.stdout.split_whitespace().map(|text| place(text.strip_prefix("cx=").unwrap())).collect();
    assert_eq!(dots.len(), 5);
    assert!(((dots[1] - dots[0]) - (dots[2] - dots[1])).abs() < 0.2 && dots[0] < dots[1], "{dots:?}");
    // What lies far below the others stands at the edge of the scale.
    assert!(dots[3] < dots[0] && dots[2] < dots[4], "{dots:?}");
}
