//! Waiting for `ctl/status` with poll(2), as a program does that shows it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::{CLUSTER, old_and_new};
use crate::mounted::Mounted;

/// Reads the state and waits for the next one, until none comes any more after "failed".
const WATCHER: &str = "\
import os, select
file = os.open('ctl/status', os.O_RDONLY)
poll = select.poll()
poll.register(file, select.POLLIN)
state = ''
while not state.startswith('state: failed'):
    assert poll.poll(20000), 'nobody wakes us'
    state = os.pread(file, 4096, 0).decode()
    print(state.splitlines()[0], flush=True)
# Who does not wait is told at once.
assert poll.poll(0) == []
# Other files are ready always, and nothing is wrong with them.
disk = os.open('disk.raw', os.O_RDONLY)
poll.register(disk, select.POLLIN)
assert poll.poll(0) == [(disk, select.POLLIN)]
";

#[test]
fn each_state_wakes_whoever_waits_for_status() {
    let scratch = old_and_new();
    scratch.write("watcher.py", WATCHER.as_bytes());
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let mut watcher = Command::new("python3")
        .arg(scratch.path("watcher.py"))
        .current_dir(mounted.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is needed; scripts/test installs it");
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut wait_for = |state: &str| {
        let line = lines.find(|line| line == state);
        assert!(line.is_some(), "nobody was woken by '{state}'");
    };
    wait_for("state: idle");
    mounted.rebase("new.raw").unwrap();
    wait_for("state: done");
    // What is no command at all is a state, too.
    mounted.rebase("missing.raw").unwrap_err();
    wait_for("state: failed");
    assert!(watcher.wait().unwrap().success());
    assert_eq!(mounted.bytes().len(), 8 * CLUSTER);
}
