//! README's table of error numbers, line by line, as a user meets it: what bash prints after a write to
//! a control file, and the words in `ctl/status`.

use crate::control::old_and_new;
use crate::hints::Place;
use crate::mounted::open_dev_fuse;
use crate::scratch::Ended;

const MOUNT: &str = "mkdir mnt; rebasefs mount cow.qcow2 mnt";
const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups";

/// QEMU has an image open, whose options follow, until the case was tried; and the wait until it has.
const HOLD: &str = "(echo read 0 512; until test -e tried || ! test -e \"$PWD\"; do sleep 0.05; done) 2> later | stdbuf -oL qemu-io > held 2>&1";
const HELD: &str = "until grep -q 'read 512/512' held; do sleep 0.05; done";

/// Prints the words.
const TOLD: &str = "sed -n 's/^error: //p; s/^refused: //p' mnt/ctl/status 2> /dev/null";

/// An error number; what makes the mount `mnt` and what is in the way; what is written where; the words
/// in `ctl/status`. The constants above stand for what they are.
type Case = (&'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("ENOENT", "MOUNT", "echo missing.raw > mnt/ctl/backing", "missing.raw: cannot open"),
    ("ENOENT", "qemu-img create -q -u -f qcow2 -b gone.raw -F raw new.qcow2 512k; MOUNT",
        "echo new.qcow2 > mnt/ctl/backing", "gone.raw: cannot open"),
    ("EACCES", "chmod 777 .; chmod 666 cow.qcow2; chmod 600 new.raw; mkdir -m 777 mnt; NOBODY rebasefs mount cow.qcow2 mnt",
        "NOBODY bash -c \"echo new.raw > mnt/ctl/backing || { TOLD; exit 1; }\"", "new.raw: cannot open for reading: Permission denied"),
    ("EACCES", "qemu-img create -q -f qcow2 -b base.raw -F raw middle.qcow2; qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 new.qcow2; LC_ALL=C sed -i 's/\\xe2y[*]\\xca/none/' new.qcow2; MOUNT",
        "echo new.qcow2 > mnt/ctl/backing", "the image above does not say its format; it looks like qcow2 and names a further file, 'base.raw'"),
    ("EISDIR", "mkdir new; MOUNT", "echo new > mnt/ctl/backing", "new: is a directory, not a disk image"),
    ("EINVAL", "mkfifo new; MOUNT", "echo new > mnt/ctl/backing", "new: is neither a regular file nor a block device"),
    ("EINVAL", "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"new\")'; MOUNT",
        "echo new > mnt/ctl/backing", "new: is neither a regular file nor a block device"),
    ("EINVAL", "MOUNT", "echo /dev/null > mnt/ctl/backing", "/dev/null: is neither a regular file nor a block device"),
    ("EINVAL", "MOUNT", "printf 'new\\0.raw\\n' > mnt/ctl/backing", "the name contains a NUL byte"),
    ("EINVAL", "MOUNT", "printf 'new.raw\\r\\n' > mnt/ctl/backing", "the name ends with a carriage return"),
    ("EINVAL", "MOUNT", "printf 'n%.0s' {1..4097} > mnt/ctl/backing", "a command has at most 4096 bytes"),
    ("EINVAL", "MOUNT", "echo --bakcing new.raw > mnt/ctl/rebase", "unexpected argument '--bakcing' found (a similar argument exists: '--backing')"),
    ("ELOOP", "MOUNT", "echo cow.qcow2 > mnt/ctl/backing", "cow.qcow2: is the overlay itself: the chain would be a loop"),
    ("ELOOP", "qemu-img create -q -f qcow2 -b cow.qcow2 -F qcow2 new.qcow2; MOUNT",
        "echo new.qcow2 > mnt/ctl/backing", "while opening layer 1 of the chain (named by "),
    ("ELOOP", "MOUNT", "echo mnt/disk.raw > mnt/ctl/backing", "mnt/disk.raw: lies inside this mount"),
    ("EBUSY", "MOUNT; HOLD -r -f qcow2 cow.qcow2 & HELD",
        "echo new.raw > mnt/ctl/backing", "cow.qcow2: is in use by another process"),
    ("EBUSY", "MOUNT; HOLD -f raw new.raw & HELD",
        "echo new.raw > mnt/ctl/backing", "new.raw: is open for writing in another process"),
    ("EBUSY", "mkdir mnt; rebasefs mount -U cow.qcow2 mnt; rebasefs rebase -q -b new.raw cow.qcow2",
        "echo base.raw > mnt/ctl/backing", "cow.qcow2: another process has written to it: it names 'new.raw' (raw) as its backing file now"),
    ("EBUSY", "MOUNT; cp cow.qcow2 copy; mv copy cow.qcow2", "echo new.raw > mnt/ctl/backing", "cow.qcow2: its path leads to another file by now"),
    // A server that is stopped has the new backing file: the rebase waits for it.
    ("EBUSY", "mkdir slow; qemu-img convert -f raw -O qcow2 new.raw slow.qcow2; rebasefs mount slow.qcow2 slow; MOUNT
        server=$(sed -n 's/^server: //p' slow/ctl/status); kill -STOP $server; (until test -e tried || ! test -e \"$PWD\"; do sleep 0.05; done; kill -CONT $server) > later 2>&1 &
        (echo $PWD/slow/disk.raw > mnt/ctl/backing) > first 2>&1 & until grep -q '^state: running' mnt/ctl/status; do sleep 0.02; done",
        "echo new.raw > mnt/ctl/backing", "busy: rebase onto"),
    // The first write to the overlay takes long enough for somebody to write to the backing file.
    ("EBUSY", "MOUNT; strace -f -qq -o traced -e trace=pwrite64 -e inject=pwrite64:delay_enter=1s -p $(sed -n 's/^server: //p' mnt/ctl/status) > attached 2>&1 &
        until grep -q 'TracerPid:.[1-9]' /proc/$(sed -n 's/^server: //p' mnt/ctl/status)/status; do sleep 0.05; done
        (until grep -q '^phase: copy' mnt/ctl/status; do :; done; touch -d '+1 hour' new.raw) > touched 2>&1 &",
        "echo new.raw > mnt/ctl/backing", "): has changed while it was being compared"),
    ("EUCLEAN", "printf 'QFI\\xfb\\0\\0\\0\\3%01000d' 0 > new.qcow2; MOUNT", "echo new.qcow2 > mnt/ctl/backing", "new.qcow2: "),
    ("EOPNOTSUPP", "qemu-img convert -O vmdk new.raw new.vmdk; MOUNT", "echo new.vmdk > mnt/ctl/backing", "new.vmdk: looks like format vmdk, which is not supported"),
    ("EOPNOTSUPP", "MOUNT", "echo nbd://localhost/new > mnt/ctl/backing", "protocol 'nbd' is not supported"),
    ("EOPNOTSUPP", "qemu-img create -q -f qcow2 --object secret,id=key,data=x -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 new.qcow2 512k; MOUNT",
        "echo new.qcow2 > mnt/ctl/backing", "new.qcow2: encryption (LUKS) is not supported"),
    ("EOPNOTSUPP", "qemu-img create -q -f qcow2 new.qcow2 512k; printf '\\x80' | dd of=new.qcow2 bs=1 seek=72 conv=notrunc status=none; MOUNT",
        "echo new.qcow2 > mnt/ctl/backing", "new.qcow2: incompatible feature not supported: unnamed (bit 63)"),
    ("EOPNOTSUPP", "mkdir mnt; rebasefs mount base.raw mnt", "echo new.raw > mnt/ctl/backing", "only qcow2 can be rebased"),
    ("ENAMETOOLONG", "touch $(printf 'n%.0s' {1..200}); MOUNT", "echo $(printf './%.0s' {1..420})$(printf 'n%.0s' {1..200}) > mnt/ctl/backing",
        "the name has 1040 bytes, 1023 are possible"),
    ("ENAMETOOLONG", "MOUNT", "printf '%01030d\\n' 0 > mnt/ctl/backing", "File name too long"),
    ("ENOSPC", "truncate -s 4M disk; mkfs.ext4 -q -O ^has_journal -m 0 disk; mkdir vm mnt; mount -o loop disk vm; cp cow.qcow2 vm
        qemu-img rebase -u -F raw -b $PWD/base.raw vm/cow.qcow2; cat /dev/zero > vm/filler || true; rebasefs mount vm/cow.qcow2 mnt",
        "echo $PWD/new.raw > mnt/ctl/backing", "cow.qcow2: cannot write"),
    ("ENOSPC", "qemu-img create -q -f qcow2 -o cluster_size=512 -b base.raw -F raw tiny.qcow2; mkdir mnt; rebasefs mount tiny.qcow2 mnt",
        "echo $(printf './%.0s' {1..300})new.raw > mnt/ctl/backing", "the header cluster of 512 bytes has no room for a name of 607 bytes"),
    ("EROFS", "mkdir ro mnt; mount --bind -o ro . ro; rebasefs mount ro/cow.qcow2 mnt", "echo new.raw > mnt/ctl/backing",
        "the image could be opened for reading only"),
    ("EINTR", "mkdir slow; qemu-img convert -f raw -O qcow2 new.raw slow.qcow2; rebasefs mount slow.qcow2 slow; MOUNT
        server=$(sed -n 's/^server: //p' slow/ctl/status); kill -STOP $server
        (until grep -q '^state: running' mnt/ctl/status; do sleep 0.02; done; echo > mnt/ctl/cancel; kill -CONT $server) > later 2>&1 &",
        "echo $PWD/slow/disk.raw > mnt/ctl/backing", "the rebase was stopped; the image still stands on its old backing file"),
    ("EIO", "MOUNT; truncate -s 64k base.raw", "echo new.raw > mnt/ctl/backing", "cut short"),
];

/// The lines of the table in README: error number and what the shell says.
fn promised() -> Vec<(&'static str, &'static str)> {
    let lines = include_str!("../README.md").lines().filter(|line| line.starts_with("| `E"));
    let cells = |line: &'static str| line.split('|').map(str::trim).collect::<Vec<_>>();
    lines.map(cells).map(|cells| (cells[1].trim_matches('`'), cells[2])).collect()
}

#[test]
fn each_line_of_the_table_of_error_numbers_is_what_a_user_meets() {
    open_dev_fuse();
    let promised = promised();
    assert_eq!(promised.len(), 13);
    for (errno, _) in &promised {
        assert!(CASES.iter().any(|case| case.0 == *errno), "nobody tries {errno}");
    }
    let failed: Vec<String> = CASES.iter().filter_map(|case| try_it(case, &promised).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

fn try_it((errno, given, typed, words): &Case, promised: &[(&str, &str)]) -> Result<(), String> {
    let words_for = [("MOUNT", MOUNT), ("NOBODY", NOBODY), ("TOLD", TOLD), ("HOLD", HOLD), ("HELD", HELD)];
    let expand =
        |text: &str| words_for.iter().fold(text.to_owned(), |text, (word, is)| text.replace(word, is));
    let place = Place::new(old_and_new());
    place.does(&expand(given))?;
    // The image stands on what it stood on.
    let header = || std::fs::read(place.path("cow.qcow2")).unwrap()[..512].to_vec();
    let before = header();
    let Ended { code, stdout: status, stderr: printed } =
        place.bash(&expand(&format!("{typed} || {{ TOLD || true; exit 1; }}")));
    // What is in the way may go on from now on, and end well.
    let after = header();
    place.does("touch tried")?;
    let (_, text) = promised.iter().find(|promise| promise.0 == *errno).unwrap();
    let is_right = code == Some(1) && printed.ends_with(&format!(": {text}\n")) && status.contains(words);
    match is_right && after == before {
        true => {
            println!("{errno}: {status}");
            Ok(())
        }
        false => Err(format!("{errno}: {typed}\n{printed}{status}")),
    }
}
