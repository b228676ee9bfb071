//! A rebase on the command line that is told to stop: it says how far it came, leaves a whole image,
//! and the same command goes on from there.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use crate::mounted::wait_until;
use crate::scratch::{Scratch, rebasefs};
use crate::traced::{At, injecting, on_one_processor};

const CLUSTER: usize = 65536;
const CLUSTERS: usize = 256;
const REBASE: &str = "rebase --progress=none -b new.raw -F raw cow.qcow2";

/// An image that stands on 16 MiB, all of which `new.raw` has otherwise.
pub fn large() -> Scratch {
    let s = Scratch::new();
    s.draw_raw("base.raw", CLUSTER, &"11 ".repeat(CLUSTERS));
    s.draw_raw("new.raw", CLUSTER, &"22 ".repeat(CLUSTERS));
    s.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    s
}

/// Starts a rebase, each such call of which takes so many milliseconds longer. Signals do to it what
/// they do by default, also where whoever runs the tests ignores them.
fn slow(s: &Scratch, system_call: &str, milliseconds: u32) -> Child {
    slow_line(s, REBASE, system_call, milliseconds)
}

/// The same with another command line.
pub fn slow_line(s: &Scratch, line: &str, system_call: &str, milliseconds: u32) -> Child {
    let trace = injecting(system_call, &format!("delay_enter={milliseconds}ms"));
    started(s, line, "--default-signal=INT,TERM,HUP", &trace)
}

fn started(s: &Scratch, line: &str, signals: &str, trace: &[String]) -> Child {
    let mut rebase = Command::new("env");
    rebase.args([signals, "strace", "-D"]).args(trace).arg(rebasefs()).args(line.split(' '));
    rebase.current_dir(s.path("")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

pub fn send(signal: &str, process: &Child) {
    let sent = Command::new("kill").args(["-s", signal, &process.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits for the end: exit code, standard output, standard error.
pub fn ended(mut process: Child) -> (Option<i32>, String, String) {
    let (mut out, mut err) = (String::new(), String::new());
    process.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    process.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (process.wait().unwrap().code(), out, err)
}

/// The bytes that the overlay holds itself, as qemu-img sees it.
pub fn held(s: &Scratch) -> u64 {
    let map = s.qemu_img("map --output=json cow.qcow2");
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    map.iter().filter(|extent| extent["depth"] == 0).map(|extent| extent["length"].as_u64().unwrap()).sum()
}

#[test]
fn the_first_signal_stops_it_cleanly_and_the_same_command_goes_on() {
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let s = large();
        let rebase = slow(&s, "pwrite64", 20);
        let some = 2 << 20;
        wait_until("something is copied", || s.path("cow.qcow2").metadata().unwrap().len() > some);
        send(signal, &rebase);
        let (ended_with, out, said) = ended(rebase);
        assert_eq!((ended_with, out.as_str()), (Some(code), ""), "{said}");
        assert!(said.starts_with(&format!("rebasefs: SIG{signal} after ")), "{said}");
        assert!(
            said.contains(" of 16 MiB, ") && said.contains("still stands on its old backing file"),
            "{said}"
        );
        assert!(said.contains("start it again"), "{said}");
        s.check_clean("cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
        assert!(s.qemu_img("info cow.qcow2").contains("backing file: base.raw"));
        let kept = held(&s);
        assert!(kept > 0 && kept < 16 << 20, "{kept} bytes kept");
        // What the message says is what qemu-img finds, in whole clusters of 64 KiB.
        let mib = kept as f64 / f64::from(1 << 20);
        let word = said.split(", ").nth(1).unwrap();
        let amount: f64 = word.split(' ').next().unwrap().parse().unwrap();
        assert!(word.contains("copied and kept"), "{said}");
        let unit = if word.contains("MiB") { 1.0 } else { 1024.0 };
        assert!((amount / unit - mib).abs() < 0.01 * mib, "{said}: {kept}");
        let again: serde_json::Value =
            serde_json::from_str(&s.rebasefs(&format!("{REBASE} --output json"))).unwrap();
        assert_eq!(again["copied"], (16 << 20) - kept);
        println!("SIG{signal}: {kept} bytes kept, {} copied when it was started again", again["copied"]);
        s.check_clean("cow.qcow2");
        assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
    }
}

#[test]
fn the_second_signal_ends_it_at_once_and_the_image_is_whole() {
    let s = large();
    let mut rebase = slow(&s, "fdatasync", 2000);
    let all = (CLUSTERS * CLUSTER) as u64;
    wait_until("all is copied", || s.path("cow.qcow2").metadata().unwrap().len() > all);
    send("INT", &rebase);
    // It says so when it takes a moment.
    let mut words = vec![0; 80];
    rebase.stderr.as_mut().unwrap().read_exact(&mut words).unwrap();
    assert!(String::from_utf8(words).unwrap().starts_with("rebasefs: SIGINT: finishing what is under way"));
    send("INT", &rebase);
    let (code, _, said) = ended(rebase);
    assert_eq!(code, None, "{said}");
    assert!(matches!(s.run("qemu-img", "check cow.qcow2").code, Some(0 | 3)));
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
    s.rebasefs(REBASE);
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
}

#[test]
fn while_it_looks_at_metadata_it_ends_without_further_ado() {
    let s = large();
    // Reads of the chain's files, header and tables.
    let rebase = slow(&s, "pread64", 400);
    wait_until("it runs", || {
        let command = std::fs::read(format!("/proc/{}/cmdline", rebase.id())).unwrap_or_default();
        command.starts_with(rebasefs().as_bytes()) && is_waiting_for_signals(rebase.id())
    });
    send("INT", &rebase);
    let (code, _, said) = ended(rebase);
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("SIGINT"), "{said}");
    assert_eq!(held(&s), 0);
    s.check_clean("cow.qcow2");
}

fn is_waiting_for_signals(process: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks
        .filter_map(Result::ok)
        .any(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "signals\n"))
}

#[test]
fn reclaiming_that_is_stopped_says_what_stands_and_the_same_command_goes_on() {
    let s = large();
    s.rebasefs(REBASE);
    let line = "rebase --progress=none --reclaim -b base.raw -F raw cow.qcow2";
    let rebase = slow_line(&s, line, "pread64", 20);
    wait_until("the header names the new one", || {
        s.run("qemu-img", "info -U cow.qcow2").stdout.contains("backing file: base.raw")
    });
    send("INT", &rebase);
    let (code, _, said) = ended(rebase);
    assert_eq!(code, Some(130), "{said}");
    let words = "start it again: what was dropped already is dropped";
    let stands = format!("reclaiming was stopped; the image stands on its new backing file ({words})\n");
    assert!(said.contains("rebasefs: SIGINT after ") && said.ends_with(&stands), "{said}");
    assert!(held(&s) > 0);
    s.rebasefs(line);
    assert_eq!(held(&s), 0);
    s.check_clean("cow.qcow2");
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
}

/// Stopped before the last barrier, the one behind the swap.
#[test]
fn after_the_header_swap_it_is_done() {
    let s = large();
    let fresh = std::fs::read(s.path("cow.qcow2")).unwrap();
    let counted = on_one_processor()
        .args(["strace", "-f", "-qq", "-o", "syncs", "-e", "trace=fdatasync", rebasefs()])
        .args(REBASE.split(' '))
        .current_dir(s.path(""))
        .output()
        .unwrap();
    assert!(counted.status.success());
    let syncs = std::fs::read_to_string(s.path("syncs")).unwrap();
    let number = syncs.lines().filter(|line| line.contains("fdatasync(")).count();
    s.write("cow.qcow2", &fresh);
    let at = At { system_call: "fdatasync", number, signal: "STOP" };
    let mut rebase = at.command(&s.path(""), REBASE);
    let rebase = rebase.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it has stopped behind the swap", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", rebase.id())).unwrap();
        status.contains("State:\tt") || status.contains("State:\tT")
    });
    wait_until("the header names the new one", || {
        s.run("qemu-img", "info -U cow.qcow2").stdout.contains("backing file: new.raw")
    });
    send("TERM", &rebase);
    let id = rebase.id();
    let waiter = std::thread::spawn(move || ended(rebase));
    wait_until("the rebase has ended", || {
        let _ = Command::new("kill").args(["-s", "CONT", &id.to_string()]).stderr(Stdio::null()).status();
        waiter.is_finished()
    });
    let (code, out, said) = waiter.join().unwrap();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.is_empty() || said.contains("came too late: it is done"), "{said}");
    assert_eq!(out, "");
    s.check_clean("cow.qcow2");
    assert!(s.guest_bytes("qcow2", "cow.qcow2") == vec![0x11; CLUSTERS * CLUSTER]);
}

/// `nohup`, and what a script puts in the background, shall go on.
#[test]
fn an_ignored_signal_stops_nothing() {
    let s = large();
    let rebase = started(&s, REBASE, "--ignore-signal=INT", &injecting("pwrite64", "delay_enter=10ms"));
    wait_until("something is copied", || s.path("cow.qcow2").metadata().unwrap().len() > 1 << 20);
    send("INT", &rebase);
    let (code, _, said) = ended(rebase);
    assert_eq!((code, said.as_str()), (Some(0), ""));
}
