//! The tree for those who walk over all of it: `cp -a`, `rsync -a`, `tar`, `grep -r`, and programs that believe
//! sizes. Control files are as long as what they say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::control::old_and_new;
use crate::mounted::Mounted;
use crate::scratch::Scratch;

/// A mount with layers, snapshots and partitions, in which a dry run and a comparison have been made.
fn mounted(s: &Scratch) -> Mounted {
    let mut table = [0; 66];
    table[4] = 0x83;
    table[8] = 1;
    table[12] = 255;
    table[64..].copy_from_slice(&[0x55, 0xaa]);
    s.write("table", &table);
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -s table 446 66"]);
    s.qemu_img("snapshot -c before cow.qcow2");
    let mounted = Mounted::new(s, "cow.qcow2");
    std::fs::write(mounted.path("ctl/rebase"), "--dry-run -b new.raw\n").unwrap();
    std::fs::write(mounted.path("ctl/difference"), "new.raw\n").unwrap();
    mounted
}

/// The files below a directory and what is in them, but for what is another thing each time.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            let below = files(&entry.path()).into_iter();
            found.extend(below.map(|(path, bytes)| (format!("{name}/{path}"), bytes)));
        } else {
            found.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    found
}

#[test]
fn every_tool_copies_the_whole_tree() {
    let s = old_and_new();
    let mounted = mounted(&s);
    let expected = files(&mounted.path(""));
    assert_eq!(expected["ctl/backing"], b"base.raw\n");
    assert!(expected["ctl/cancel"].is_empty() && expected.contains_key("partitions/1.raw"));
    assert!(expected.contains_key("snapshots/before.raw") && expected.contains_key("layers/1.raw"));
    for file in ["chain", "difference", "info", "map", "partitions", "rebase", "status"] {
        assert!(expected[&format!("ctl/{file}")].len() > 20, "{file}");
    }
    let python = "import shutil; shutil.copytree('cow.qcow2.mnt', 'copy')";
    for (program, arguments) in [
        ("cp", vec!["-a", "cow.qcow2.mnt", "copy"]),
        ("rsync", vec!["-a", "cow.qcow2.mnt/", "copy"]),
        ("bash", vec!["-c", "mkdir copy && tar -C cow.qcow2.mnt -c . | tar -C copy -x"]),
        ("python3", vec!["-c", python]),
    ] {
        let ended = s.run_args(program, &arguments);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{program} {arguments:?}");
        let copied = files(&s.path("copy"));
        assert_eq!(copied.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{program}");
        for (name, bytes) in &copied {
            assert!(*bytes == expected[name], "{program}: {name}: {}", String::from_utf8_lossy(bytes));
        }
        s.ok("chmod", "-R u+w copy");
        s.ok("rm", "-r copy");
    }
    // What nothing changed is not copied again.
    s.ok("rsync", "-a cow.qcow2.mnt/ copy");
    let copied = s.ok("rsync", "-ai cow.qcow2.mnt/ copy");
    assert_eq!(copied, "", "rsync has something to do");
}

#[test]
fn who_believes_the_size_of_a_control_file_reads_all_of_it() {
    let s = old_and_new();
    let mounted = mounted(&s);
    let sendfile = "
import os, sys
source = os.open(sys.argv[1], os.O_RDONLY)
target = os.open('copy', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
while os.sendfile(target, source, None, 1 << 20): pass";
    for file in ["backing", "cancel", "chain", "difference", "info", "map", "partitions", "rebase", "status"]
    {
        let path = mounted.path("ctl").join(file);
        let expected = mounted.says(file);
        let name = path.display().to_string();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), expected.len() as u64, "{file}");
        let ended = s.run_args("python3", &["-c", sendfile, &name]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{file}");
        assert_eq!(std::fs::read_to_string(s.path("copy")).unwrap(), expected, "{file}");
        assert_eq!(s.ok("cat", &name), expected);
        assert_eq!(s.ok("wc", &format!("-c {name}")), format!("{} {name}\n", expected.len()));
        let (first, last) = (expected.len().min(7), expected.len().saturating_sub(7));
        assert_eq!(s.ok("head", &format!("-c 7 {name}")), expected[..first]);
        assert_eq!(s.ok("tail", &format!("-c 7 {name}")), expected[last..]);
        let mut file = File::open(&path).unwrap();
        let mut twice = String::new();
        file.read_to_string(&mut twice).unwrap();
        assert_eq!(file.metadata().unwrap().len(), twice.len() as u64);
    }
    let found = s.ok("grep", "-rl raw cow.qcow2.mnt/ctl");
    let mut found: Vec<&str> = found.lines().filter_map(|line| line.rsplit('/').next()).collect();
    found.sort_unstable();
    assert_eq!(found, ["backing", "chain", "difference", "info", "status"]);
    let ended = s.run("grep", "-rq no-such-word cow.qcow2.mnt");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(1), ""));
}

/// What was told with a size a moment ago is no excuse for what is old.
#[test]
fn a_state_is_never_older_than_the_last_command() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    let status = File::open(mounted.path("ctl/status")).unwrap();
    let state = || {
        let mut bytes = [0; 4096];
        let length = status.read_at(&mut bytes, 0).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    for (line, word) in [("new.raw", "done"), ("missing.raw", "failed"), ("base.raw", "done")] {
        let _ = status.metadata().unwrap();
        let _ = mounted.rebase(line);
        assert!(state().starts_with(&format!("state: {word}\n")), "{}", state());
        assert_eq!(status.metadata().unwrap().len(), state().len() as u64);
    }
}

/// The kernel lets a second writer wait for the first otherwise, who waits for his rebase.
#[test]
fn a_file_that_is_written_has_another_inode_for_the_next() {
    let s = old_and_new();
    let mounted = Mounted::new(&s, "cow.qcow2");
    let inode = || std::fs::metadata(mounted.path("ctl/backing")).unwrap().ino();
    let (first, _reader) = (inode(), File::open(mounted.path("ctl/backing")).unwrap());
    assert_eq!(inode(), first);
    let writer = File::options().write(true).open(mounted.path("ctl/backing")).unwrap();
    assert_eq!(writer.metadata().unwrap().ino(), first);
    assert_ne!(inode(), first);
    assert_eq!(std::fs::read_to_string(mounted.path("ctl/backing")).unwrap(), "base.raw\n");
}

/// A file server keeps handles while the kernel forgets what they stand for.
#[test]
fn handles_lead_to_their_files_after_the_kernel_has_forgotten_them() {
    let s = old_and_new();
    let _mounted = mounted(&s);
    let program = "
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
class Handle(ctypes.Structure):
    _fields_ = [('bytes', ctypes.c_uint), ('type', ctypes.c_int), ('handle', ctypes.c_char * 128)]
def check(result, what):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
    return result
def handle(path):
    found, mount = Handle(128), ctypes.c_int()
    check(libc.name_to_handle_at(-100, path.encode(), ctypes.byref(found), ctypes.byref(mount), 0), path)
    return found
def content(fd):
    with os.fdopen(fd, 'rb') as file: return file.read()
root = 'cow.qcow2.mnt'
paths = [os.path.join(place, name) for place, _, names in os.walk(root) for name in names]
assert len(paths) > 12
kept = [(path, handle(path), content(os.open(path, os.O_RDONLY))) for path in paths]
places = [(place, handle(place)) for place, _, _ in os.walk(root)]
with open('/proc/sys/vm/drop_caches', 'w') as drop: drop.write('2')
mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
for path, found, expected in kept:
    fd = check(libc.open_by_handle_at(mount, ctypes.byref(found), os.O_RDONLY), path)
    assert content(fd) == expected, path
with open('/proc/sys/vm/drop_caches', 'w') as drop: drop.write('2')
for place, found in places:
    fd = check(libc.open_by_handle_at(mount, ctypes.byref(found), os.O_RDONLY | os.O_DIRECTORY), place)
    assert sorted(os.listdir(fd)) == sorted(os.listdir(place)), place
    os.close(fd)
";
    let ended = s.run_args("python3", &["-c", program]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

/// Not "100 % used": what takes space is data, the rest is holes.
#[test]
fn df_shows_what_is_data() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 cow.qcow2 8M");
    s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x11 0 2M"]);
    let mounted = Mounted::with(&s, "cow.qcow2", "--rw");
    let df = || s.ok("df", "-B1 --output=size,used,avail cow.qcow2.mnt");
    let figures =
        |df: &str| df.lines().nth(1).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(figures(&df()), ["8388608", "2097152", "6291456"]);
    let disk = File::options().write(true).open(mounted.path("disk.raw")).unwrap();
    disk.write_all_at(&vec![1; 65536], 4 << 20).unwrap();
    assert_eq!(figures(&df()), ["8388608", "2162688", "6225920"]);
}
