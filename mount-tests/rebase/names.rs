//! Names of backing files that say more than a path: what is recorded means the same to QEMU, and what it
//! could not open is refused.

use super::{CLUSTER, backing_of};
use crate::mounted::Mounted;
use crate::scratch::{Ended, LoopDevice, Scratch, rebasefs};

/// An overlay on `old`, and what it can be given: files with the same disk as `old`, raw and in qcow2. The
/// raw view of `new.qcow2` is another disk.
fn overlay() -> Scratch {
    let s = Scratch::new();
    for name in ["old", "new.raw"] {
        s.draw_raw(name, CLUSTER, "11 22 11 -- 11 22 11 22");
    }
    s.qemu_img("convert -O qcow2 old new.qcow2");
    s.qemu_img("create -q -f qcow2 -b old -F raw cow.qcow2");
    s.draw("cow.qcow2", CLUSTER, "-- -- 77 -- --");
    s
}

/// `NAME` with the directory in the place of `@` and the device in that of `%`.
fn spelled(s: &Scratch, device: &LoopDevice, name: &str) -> String {
    name.replace('@', s.path("").to_str().unwrap()).replace('%', device.path())
}

const NAMES: [&str; 22] = [
    r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"@new.qcow2"}}"#,
    r#"json:{"driver":"raw","file":{"driver":"file","filename":"@new.raw"}}"#,
    r#"json:{"driver":"file","filename":"@new.raw"}"#,
    r#"json:{"driver":"host_device","filename":"@new.raw"}"#,
    r#"json:{"driver":"host_device","filename":"%"}"#,
    r#"json:{"file":{"driver":"file","filename":"@new.raw"}}"#,
    r#"json:{"file.filename":"@new.raw"}"#,
    r#"json:{"filename":"@new.raw"}"#,
    r#"json:{"driver":"raw","filename":"@new.raw"}"#,
    r#"json:{"driver":"file","file.filename":"@new.raw"}"#,
    r#"json:{"driver":"raw","file":{"driver":"host_device","filename":"@new.raw"}}"#,
    r#"json:{"driver":"raw","file":{"driver":"file","filename":"%"}}"#,
    r#"json:{"driver":"raw","file":{"driver":"host_device","filename":"%"}}"#,
    r#"json:{"driver":"raw","file":{"filename":"%"}}"#,
    r#"json:{"driver":"raw","driver":"qcow2","file.filename":"@new.raw"}"#,
    r#"json:{"driver":"raw","file":{"filename":"@new.qcow2"},"file.filename":"@new.raw"}"#,
    r#"json:{"driver":"raw","file":{"filename":"@new.raw"},"file.filename":"@new.raw"}"#,
    r#"json:{"file.filename":"file:@new.raw"}"#,
    "@new.raw",
    "file:@new.raw",
    "%",
    "@new.qcow2",
];

const FORMATS: [Option<&str>; 5] = [None, Some("raw"), Some("qcow2"), Some("file"), Some("host_device")];

fn run(s: &Scratch, verb: &[&str], format: Option<&str>, name: &str, image: &[&str]) -> Ended {
    let format: Vec<&str> = format.into_iter().flat_map(|format| ["-F", format]).collect();
    s.run_args(rebasefs(), &[verb, &["-b", name], &format, image].concat())
}

/// The bytes that QEMU finds in an image, if it can open it.
fn in_qemu(s: &Scratch, image: &str) -> Result<Vec<u8>, String> {
    let ended = s.run("qemu-img", &format!("convert -U -f qcow2 -O raw {image} out.raw"));
    match ended.code {
        Some(0) => Ok(std::fs::read(s.path("out.raw")).unwrap()),
        _ => Err(ended.stderr),
    }
}

/// Whether QEMU finds these bytes in the image if its header has this name and this format.
fn could_be_recorded(s: &Scratch, format: &str, name: &str, bytes: &[u8]) -> bool {
    std::fs::copy(s.path("cow.qcow2"), s.path("probe.qcow2")).unwrap();
    let arguments = ["rebase", "-u", "-f", "qcow2", "-F", format, "-b", name, "probe.qcow2"];
    s.run_args("qemu-img", &arguments).code == Some(0) && in_qemu(s, "probe.qcow2").as_deref() == Ok(bytes)
}

#[test]
fn qemu_reads_the_same_bytes_by_every_name_that_is_recorded() {
    let s = overlay();
    let device = LoopDevice::attach(&s.path("new.raw"));
    let (image, bytes) = (std::fs::read(s.path("cow.qcow2")).unwrap(), s.guest_bytes("qcow2", "cow.qcow2"));
    let mut recorded = Vec::new();
    for (format, name) in FORMATS.iter().flat_map(|format| NAMES.map(|name| (*format, name))) {
        s.write("cow.qcow2", &image);
        let spelled = spelled(&s, &device, name);
        let ended = run(&s, &["rebase", "-q"], format, &spelled, &["cow.qcow2"]);
        if ended.code == Some(0) {
            assert_eq!(in_qemu(&s, "cow.qcow2").as_deref(), Ok(&bytes[..]), "{format:?} {name}");
            assert_eq!(backing_of(&s, "cow.qcow2").0, Some(spelled), "{format:?} {name}");
            recorded.push((format, name));
            continue;
        }
        assert!(std::fs::read(s.path("cow.qcow2")).unwrap() == image, "{format:?} {name}: was changed");
        // Neither is anything refused that QEMU would read well.
        if let Some(format) = format {
            let may_be = could_be_recorded(&s, format, &spelled, &bytes);
            let is_ambiguous = name.starts_with("json:") && !ended.stderr.contains("cannot open");
            assert!(!may_be || is_ambiguous, "{format} {name}: {}", ended.stderr);
        }
    }
    let of = |wanted: Option<&str>| {
        let numbers = recorded.iter().filter(|(format, _)| *format == wanted);
        numbers.map(|(_, name)| NAMES.iter().position(|other| other == name).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(of(None), [0, 1, 2, 4, 5, 6, 12, 13, 16, 18, 19, 20, 21]);
    // The raw view of a qcow2 file is a disk, too.
    assert_eq!(of(Some("raw")), [1, 5, 6, 12, 13, 16, 18, 19, 20, 21]);
    assert_eq!(of(Some("qcow2")), [0, 21]);
    assert_eq!(of(Some("file")), [2, 7, 18, 19, 21]);
    assert_eq!(of(Some("host_device")), [4, 20]);
}

#[test]
fn a_new_image_gets_no_name_that_qemu_cannot_open() {
    let s = overlay();
    let device = LoopDevice::attach(&s.path("new.raw"));
    for (format, name) in FORMATS.iter().flat_map(|format| NAMES.map(|name| (*format, name))) {
        let name = spelled(&s, &device, name);
        let ended = run(&s, &["create", "-q", "-f", "qcow2"], format, &name, &["made.qcow2"]);
        match ended.code {
            Some(0) => {
                assert!(in_qemu(&s, "made.qcow2").is_ok(), "{format:?} {name}");
                std::fs::remove_file(s.path("made.qcow2")).unwrap();
            }
            _ => assert!(!s.path("made.qcow2").exists(), "{format:?} {name}"),
        }
    }
}

#[test]
fn a_control_file_refuses_what_the_command_line_refuses() {
    let s = overlay();
    let device = LoopDevice::attach(&s.path("new.raw"));
    let image = std::fs::read(s.path("cow.qcow2")).unwrap();
    let mounted = Mounted::new(&s, "cow.qcow2");
    for (file, line, words) in [
        ("backing", r#"json:{"driver":"raw","driver":"raw","file.filename":"@new.raw"}"#, "is there twice"),
        ("backing", r#"json:{"driver":"raw","filename":"@new.raw"}"#, "has no meaning"),
        ("difference", r#"json:{"driver":"host_device","filename":"@new.raw"}"#, "is for devices"),
        (
            "rebase",
            r#"-F raw -b 'json:{"driver":"qcow2","file.filename":"@new.qcow2"}'"#,
            "says driver 'qcow2'",
        ),
        ("rebase", "-F host_device -b @new.raw", "is for devices"),
        ("rebase", "--dry-run -F file -b %", "is for regular files"),
    ] {
        let line = spelled(&s, &device, line);
        std::fs::write(mounted.path("ctl").join(file), format!("{line}\n")).unwrap_err();
        assert!(mounted.status("error").contains(words), "{line}: {}", mounted.says("status"));
        assert_eq!(std::fs::read(s.path("cow.qcow2")).unwrap(), image);
    }
}

#[test]
fn a_mere_change_of_the_name_warns_of_what_qemu_cannot_open() {
    let s = overlay();
    let device = LoopDevice::attach(&s.path("new.raw"));
    for (format, name, words) in [
        ("raw", r#"json:{"driver":"qcow2","file.filename":"@new.qcow2"}"#, "says driver 'qcow2'"),
        ("raw", r#"json:{"driver":"file","filename":"@new.raw"}"#, "says driver 'file'"),
        ("host_device", "@new.raw", "is for devices"),
        ("file", "%", "is for regular files"),
    ] {
        let name = spelled(&s, &device, name);
        let ended = run(&s, &["-v", "rebase", "-u"], Some(format), &name, &["cow.qcow2"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(
            ended.stderr.contains(words) && ended.stderr.contains("recorded all the same"),
            "{}",
            ended.stderr
        );
        assert_eq!(backing_of(&s, "cow.qcow2"), (Some(name.clone()), Some(format.to_owned())));
        let verb = ["create", "-q", "-u", "-f", "qcow2"];
        let ended = run(&s, &verb, Some(format), &name, &["made.qcow2", "512k"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

/// QEMU goes by the format beside the name; who wrote them meant one of two disks.
#[test]
fn an_image_with_a_name_that_contradicts_its_format_is_not_read() {
    let s = overlay();
    let device = LoopDevice::attach(&s.path("new.raw"));
    for (format, name) in [
        ("raw", r#"json:{"driver":"qcow2","file.filename":"@new.qcow2"}"#),
        ("qcow2", r#"json:{"driver":"raw","file.filename":"@new.qcow2"}"#),
        ("raw", r#"json:{"driver":"file","filename":"@new.raw"}"#),
        ("raw", r#"json:{"file":{"filename":"@new.qcow2"},"file.filename":"@new.raw"}"#),
    ] {
        let name = spelled(&s, &device, name);
        s.run_args("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", format, "-b", &name, "cow.qcow2"]);
        assert_eq!(backing_of(&s, "cow.qcow2").0.as_ref(), Some(&name));
        for line in ["map cow.qcow2", "compare cow.qcow2 old", "rebase -b new.raw cow.qcow2"] {
            let ended = s.run(rebasefs(), line);
            assert!(ended.code != Some(0) && ended.stderr.contains("json:"), "{line}: {}", ended.stderr);
        }
        s.rebasefs("rebase -u -b old -F raw cow.qcow2");
        s.rebasefs("map cow.qcow2");
    }
}
