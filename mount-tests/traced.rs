//! The program under strace, which sends it a signal at a system call: killed or stopped exactly
//! there.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::mounted::wait_until;
use crate::scratch::rebasefs;

/// Before the `number`th call of `system_call`, `signal` comes.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub system_call: &'static str,
    pub number: usize,
    pub signal: &'static str,
}

impl At {
    /// A command that runs rebasefs under this trap, as the process that it starts.
    pub fn command(self, directory: &Path, line: &str) -> Command {
        let mut command = on_one_processor();
        command.arg("strace").args(self.strace()).arg("-D").arg(rebasefs()).args(line.split_whitespace());
        command.current_dir(directory);
        command
    }

    /// Lays the trap for a process that runs. Each of its threads counts for itself.
    pub fn attach(self, process: u32) {
        attach(&self.strace(), process);
    }

    fn strace(self) -> [String; 8] {
        let Self { system_call, number, signal } = self;
        injecting(system_call, &format!("signal=SIG{signal}:when={number}"))
    }
}

/// Lets each `system_call` of a process that runs take so much longer.
pub fn slow_down(process: u32, system_call: &str, milliseconds: u32) {
    attach(&injecting(system_call, &format!("delay_enter={milliseconds}ms")), process);
}

/// Arguments for strace to do this to each such call.
pub fn injecting(system_call: &str, what: &str) -> [String; 8] {
    let trace = format!("trace={system_call}");
    let inject = format!("inject={system_call}:{what}");
    ["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(str::to_owned)
}

fn attach(arguments: &[String], process: u32) {
    let mut strace = Command::new("strace");
    let strace = strace.args(arguments).args(["-p", &process.to_string()]);
    let mut strace = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect(MISSING);
    // It ends with the process.
    std::thread::spawn(move || strace.wait());
    wait_until("strace is attached", || {
        tasks(process).iter().all(|status| !status.contains("TracerPid:\t0\n"))
    });
}

/// rebasefs, whose calls of `system_call` fail with `error` from the `number`th on, without being made.
pub fn failing(directory: &Path, line: &str, system_call: &str, number: usize, error: &str) -> Command {
    let mut command = on_one_processor();
    let strace = injecting(system_call, &format!("error={error}:when={number}+"));
    command.arg("strace").args(strace).arg(rebasefs()).args(line.split_whitespace()).current_dir(directory);
    command
}

const MISSING: &str = "strace is needed; scripts/test installs it";

/// With one processor there is one worker: the calls come in the same order each time. Add the
/// program to run.
pub fn on_one_processor() -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]);
    command
}

/// Wakes `stopped` until `waiting` has ended: nobody knows whether it has come to its stop yet.
pub fn let_go_on(stopped: u32, waiting: &mut Child) -> ExitStatus {
    wait_until("the rebase has ended", || {
        let _ =
            Command::new("kill").args(["-s", "CONT", &stopped.to_string()]).stderr(Stdio::null()).status();
        waiting.try_wait().unwrap().is_some()
    });
    waiting.wait().unwrap()
}

/// `/proc/PID/status` of each thread.
fn tasks(process: u32) -> Vec<String> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok()).collect()
}
