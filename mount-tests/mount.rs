//! The mounted view: bytes, holes and blocks of `disk.raw`, who may use it, how it ends.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use crate::mounted::{Mounted, is_mounted, is_running, open_dev_fuse, wait_until};
use crate::scratch::{Scratch, rebasefs};

const CLUSTER: usize = 65536;

/// ```text
/// base:    11 11 -- 22 -- -- 33 33
/// overlay: -- 44 -- zz 55 -- -- --
/// ```
fn two_layers() -> Scratch {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", CLUSTER, "11 11 -- 22 -- -- 33 33");
    scratch.qemu_img("create -q -f qcow2 -b base.raw -F raw cow.qcow2");
    scratch.draw("cow.qcow2", CLUSTER, "-- 44 -- zz 55 -- -- --");
    scratch
}

#[test]
fn disk_has_the_bytes_that_qemu_shows() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    assert_eq!(mounted.bytes(), scratch.guest_bytes("qcow2", "cow.qcow2"));
    let metadata = mounted.path("disk.raw").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (8 * CLUSTER as u64, 0o444));
}

#[test]
fn reads_beyond_the_end_are_short() {
    let scratch = Scratch::new();
    scratch.draw_raw("base.raw", 512, "11 22 33");
    let mounted = Mounted::new(&scratch, "base.raw");
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    let mut buffer = [0; 1024];
    assert_eq!(disk.read_at(&mut buffer, 1024).unwrap(), 512);
    assert_eq!(disk.read_at(&mut buffer, 1536).unwrap(), 0);
    assert_eq!(disk.read_at(&mut buffer, 1 << 62).unwrap(), 0);
}

/// Start and length of the runs of data of an image, in bytes, as `qemu-img map` sees them.
fn data_runs_by_qemu(scratch: &Scratch, line: &str) -> Vec<(u64, u64)> {
    let map = scratch.qemu_img(&format!("map -U --output=json {line}"));
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in map.iter().filter(|extent| extent["data"] == true) {
        let (start, length) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        match runs.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += length,
            _ => runs.push((start, length)),
        }
    }
    runs
}

#[test]
fn holes_and_blocks_are_those_of_the_whole_chain() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let by_chain = data_runs_by_qemu(&scratch, "cow.qcow2");
    // qemu-img asks disk.raw with SEEK_DATA and SEEK_HOLE.
    let disk = mounted.path("disk.raw");
    assert_eq!(data_runs_by_qemu(&scratch, &format!("-f raw {}", disk.display())), by_chain);
    let bytes: u64 = by_chain.iter().map(|(_, length)| length).sum();
    assert_eq!(disk.metadata().unwrap().blocks() * 512, bytes);
}

#[test]
fn a_sparse_copy_is_as_sparse_as_the_disk() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let disk = mounted.path("disk.raw");
    scratch.ok("cp", &format!("--sparse=auto {} copy.raw", disk.display()));
    let copy = scratch.path("copy.raw");
    assert_eq!(std::fs::read(&copy).unwrap(), mounted.bytes());
    assert_eq!(copy.metadata().unwrap().blocks(), disk.metadata().unwrap().blocks());
}

#[test]
fn the_chain_is_listed_and_the_backing_file_named() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let size = 8 * CLUSTER;
    let (cow, base) = (scratch.path("cow.qcow2"), scratch.path("base.raw"));
    let lines = format!("0 qcow2 {size} {}\n1 raw {size} {}\n", cow.display(), base.display());
    assert_eq!(mounted.says("chain"), lines);
    assert_eq!(mounted.says("backing"), "base.raw\n");
    assert_eq!(mounted.status("state"), "idle");
}

#[test]
fn a_terabyte_of_holes_is_served_and_rebased_in_little_memory() {
    let scratch = Scratch::new();
    scratch.qemu_img("create -q -f qcow2 base.qcow2 1T");
    let writes: Vec<String> = (0..64).map(|n| format!("write -P 7 {}G 1M", n * 16)).collect();
    scratch.qemu_io("qcow2", "base.qcow2", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    scratch.ok("cp", "base.qcow2 new.qcow2");
    scratch.qemu_io("qcow2", "new.qcow2", &["write -P 8 32G 2M"]);
    scratch.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 cow.qcow2");
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let disk = mounted.path("disk.raw");
    assert_eq!(disk.metadata().unwrap().blocks(), 64 << 11);
    scratch.ok("dd", &format!("if={} of=/dev/null bs=4M count=256 status=none", disk.display()));
    mounted.rebase("new.qcow2").unwrap();
    scratch.ok("cp", &format!("--sparse=auto {} copy.raw", disk.display()));
    assert_eq!(scratch.path("copy.raw").metadata().unwrap().blocks(), 64 << 11);
    let peak = peak_memory(mounted.server());
    assert!(peak < 64 << 20, "{peak} bytes");
    mounted.unmount();
    scratch.check_clean("cow.qcow2");
}

/// The most that a process had resident, in bytes.
fn peak_memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn many_readers_of_compressed_clusters_read_the_same() {
    let scratch = Scratch::new();
    let mixed: Vec<u8> = (0..64 * CLUSTER as u32).map(|n| (n >> 7) as u8 ^ (n >> 16) as u8).collect();
    scratch.write("plain.raw", &mixed);
    scratch.qemu_img("convert -c -f raw -O qcow2 plain.raw packed.qcow2");
    let mounted = Mounted::with(&scratch, "packed.qcow2", "--threads 4");
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (disk, mixed) = (&disk, &mixed);
            scope.spawn(move || {
                let mut buffer = vec![0; 3 * 4096];
                for step in 0..256 {
                    let at = (step * 7919 + reader * 104_729) * 512 % (mixed.len() - buffer.len());
                    disk.read_exact_at(&mut buffer, at as u64).unwrap();
                    assert_eq!(buffer, mixed[at..at + buffer.len()], "at {at}");
                }
            });
        }
    });
}

#[test]
fn damaged_data_are_an_error_never_zeros() {
    let scratch = two_layers();
    // The L2 entry of guest cluster 1 leads past the end of the file.
    let l1 = read_u64(&scratch, 40);
    let l2 = read_u64(&scratch, l1) & 0x00ff_ffff_ffff_fe00;
    let image = File::options().write(true).open(scratch.path("cow.qcow2")).unwrap();
    image.write_all_at(&(1 << 63 | 1u64 << 40).to_be_bytes(), l2 + 8).unwrap();
    let mounted = Mounted::with(&scratch, "cow.qcow2", &format!("--log {}", scratch.path("log").display()));
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    let mut buffer = [0; 512];
    disk.read_exact_at(&mut buffer, 0).unwrap();
    let error = disk.read_exact_at(&mut buffer, CLUSTER as u64).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
    let log = std::fs::read_to_string(scratch.path("log")).unwrap();
    assert!(log.contains("past the end of the file"), "{log}");
}

fn read_u64(scratch: &Scratch, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(scratch.path("cow.qcow2")).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn umount_ends_the_server() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    scratch.ok("umount", "cow.qcow2.mnt");
    mounted.wait_until_gone();
    // The image is free again: QEMU's write lock can be had.
    scratch.draw("cow.qcow2", CLUSTER, "66");
}

#[test]
fn signals_end_mount_and_server() {
    for signal in ["TERM", "INT"] {
        let scratch = two_layers();
        let mountpoint = scratch.path("mnt");
        std::fs::create_dir(&mountpoint).unwrap();
        // Whoever runs the tests may ignore some of them, as under nohup.
        let mount = format!("{} mount cow.qcow2 {}", rebasefs(), mountpoint.display());
        scratch.ok("env", &format!("--default-signal=TERM,INT,HUP {mount}"));
        let mounted = Mounted::found(mountpoint);
        mounted.bytes();
        mounted.signal(signal);
        mounted.wait_until_gone();
    }
}

#[test]
fn a_signal_ends_a_mount_that_is_in_use() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let disk = File::open(mounted.path("disk.raw")).unwrap();
    mounted.signal("TERM");
    mounted.wait_until_gone();
    drop(disk);
}

#[test]
fn in_the_foreground_it_serves_until_a_signal() {
    let scratch = two_layers();
    let mountpoint = scratch.path("mnt");
    std::fs::create_dir(&mountpoint).unwrap();
    let mut server = Command::new("env")
        .args(["--default-signal=INT", rebasefs(), "mount", "--foreground", "cow.qcow2"])
        .arg(&mountpoint)
        .current_dir(scratch.path(""))
        .spawn()
        .unwrap();
    wait_until("it is mounted", || is_mounted(&mountpoint));
    let mounted = Mounted::found(mountpoint);
    assert_eq!(mounted.server(), server.id());
    assert_eq!(mounted.bytes(), scratch.guest_bytes("qcow2", "cow.qcow2"));
    mounted.signal("INT");
    assert_eq!(server.wait().unwrap().code(), Some(0));
}

#[test]
fn in_the_background_it_keeps_no_standard_stream() {
    let scratch = two_layers();
    let mountpoint = scratch.path("mnt");
    std::fs::create_dir(&mountpoint).unwrap();
    // Would wait for ever if the server kept the pipes open.
    let output = Command::new(rebasefs())
        .args(["mount", "cow.qcow2"])
        .arg(&mountpoint)
        .current_dir(scratch.path(""))
        .stdin(Stdio::piped())
        .output()
        .unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty());
    let mounted = Mounted::found(mountpoint);
    let directory = std::fs::read_link(format!("/proc/{}/cwd", mounted.server())).unwrap();
    assert_eq!(directory.to_str(), Some("/"));
}

#[test]
fn what_cannot_be_mounted_is_said_clearly() {
    let scratch = two_layers();
    scratch.ok("mkdir", "mnt sub");
    scratch.write("file", b"");
    let image = |words: &str| scratch.rebasefs_fails(1, &format!("mount {words}"));
    assert!(image("missing.qcow2 mnt").contains("missing.qcow2: cannot open"));
    assert!(image("missing.qcow2 mnt").contains("No such file or directory"));
    assert!(image("sub mnt").contains("is a directory"));
    assert!(image("cow.qcow2 nowhere").contains("create the directory first"));
    assert!(image("cow.qcow2 file").contains("not a directory"));
    assert!(image("cow.qcow2 .").contains("would hide the image"));
    let _mounted = Mounted::new(&scratch, "cow.qcow2");
    assert!(image("cow.qcow2 cow.qcow2.mnt").contains("is mounted here already"));
}

#[test]
fn mistyped_options_are_refused_by_name() {
    let scratch = two_layers();
    scratch.ok("mkdir", "mnt");
    assert!(scratch.rebasefs_fails(1, "mount -o allow_others cow.qcow2 mnt").contains("'allow_others'"));
    assert!(scratch.rebasefs_fails(1, "mount -f vmdx cow.qcow2 mnt").contains("vmdx"));
    assert!(scratch.rebasefs_fails(1, "mount --threads 0 cow.qcow2 mnt").contains("threads"));
    assert!(scratch.rebasefs_fails(1, "mount -o auto_unmount cow.qcow2 mnt").contains("allow_other"));
}

#[test]
fn mount_options_reach_the_kernel() {
    let scratch = two_layers();
    let mounted = Mounted::with(&scratch, "cow.qcow2", "-o ro,noexec,noatime -o fsname=disk");
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line =
        table.lines().find(|line| line.contains(mounted.path("").to_str().unwrap().trim_end_matches('/')));
    let fields: Vec<&str> = line.expect("it is mounted").split(' ').collect();
    assert_eq!(fields[0], "disk");
    for option in ["ro", "noexec", "noatime", "nosuid", "nodev", "default_permissions"] {
        assert!(fields[3].split(',').any(|word| word == option), "{option} is not in {}", fields[3]);
    }
    let error = mounted.rebase("base.raw").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

/// Runs a command in the scratch directory as the user nobody; returns its exit code and output.
fn as_nobody(scratch: &Scratch, line: &str) -> (Option<i32>, String) {
    let line = format!("--reuid 65534 --regid 65534 --clear-groups {line}");
    let ended = scratch.run("setpriv", &line);
    (ended.code, ended.stdout + &ended.stderr)
}

fn open_to_all(scratch: &Scratch, names: &[&str]) {
    for name in names {
        let mode = if scratch.path(name).is_dir() { 0o777 } else { 0o666 };
        std::fs::set_permissions(scratch.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn an_ordinary_user_can_mount_and_unmount() {
    let scratch = two_layers();
    scratch.ok("mkdir", "mnt");
    open_to_all(&scratch, &["", "cow.qcow2", "mnt"]);
    open_dev_fuse();
    let mountpoint = scratch.path("mnt");
    let mount = format!("{} mount cow.qcow2 {}", rebasefs(), mountpoint.display());
    assert_eq!(as_nobody(&scratch, &mount), (Some(0), String::new()));
    let mounted = Mounted::found(mountpoint);
    let (code, bytes) = as_nobody(&scratch, "sha256sum mnt/disk.raw");
    assert_eq!(code, Some(0), "{bytes}");
    scratch.qemu_img("convert -U -O raw cow.qcow2 flat.raw");
    assert_eq!(bytes.split(' ').next(), scratch.ok("sha256sum", "flat.raw").split(' ').next());
    assert_eq!(as_nobody(&scratch, "stat -c %u mnt/disk.raw"), (Some(0), "65534\n".to_owned()));
    // Not even root looks into it without allow_root.
    assert!(std::fs::read_dir(mounted.path("ctl")).is_err());
    assert_eq!(as_nobody(&scratch, "fusermount3 -u mnt"), (Some(0), String::new()));
    mounted.wait_until_gone();
}

#[test]
fn a_signal_ends_the_mount_of_an_ordinary_user() {
    let scratch = two_layers();
    scratch.ok("mkdir", "mnt");
    open_to_all(&scratch, &["", "cow.qcow2", "mnt"]);
    open_dev_fuse();
    let mount = format!("{} mount cow.qcow2 {}", rebasefs(), scratch.path("mnt").display());
    assert_eq!(as_nobody(&scratch, &mount), (Some(0), String::new()));
    let mounted = Mounted::found(scratch.path("mnt"));
    mounted.signal("TERM");
    mounted.wait_until_gone();
}

#[test]
fn others_see_it_only_with_allow_other() {
    let scratch = two_layers();
    open_to_all(&scratch, &[""]);
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    let (code, said) = as_nobody(&scratch, "cat cow.qcow2.mnt/ctl/backing");
    assert!(code == Some(1) && said.contains("Permission denied"), "{said}");
    mounted.unmount();
    let _mounted = Mounted::with(&scratch, "cow.qcow2", "-o allow_other");
    assert_eq!(as_nobody(&scratch, "cat cow.qcow2.mnt/ctl/backing"), (Some(0), "base.raw\n".to_owned()));
    let (code, said) = as_nobody(&scratch, "tee cow.qcow2.mnt/ctl/backing");
    assert!(code == Some(1) && said.contains("Permission denied"), "{said}");
}

#[test]
fn a_loop_device_reads_the_disk() {
    for how in ["", "--direct-io=on"] {
        let scratch = two_layers();
        let mounted = Mounted::new(&scratch, "cow.qcow2");
        let disk = mounted.path("disk.raw");
        let device = scratch.ok("losetup", &format!("-r --show -f {how} {}", disk.display()));
        let bytes = std::fs::read(device.trim());
        scratch.ok("losetup", &format!("-d {}", device.trim()));
        assert_eq!(bytes.unwrap(), mounted.bytes());
        // The kernel lets go of the file a little later.
        wait_until("the loop device is gone", || {
            !scratch.ok("losetup", "-a").contains(disk.to_str().unwrap())
        });
    }
}

#[test]
fn nothing_can_be_made_changed_or_removed() {
    let scratch = two_layers();
    let mounted = Mounted::new(&scratch, "cow.qcow2");
    for line in [
        "touch new",
        "mkdir new",
        "rm -f disk.raw",
        "mv disk.raw d",
        "ln disk.raw d",
        "ln -s disk.raw d",
        "chmod 600 disk.raw",
        "truncate -s 1 disk.raw",
        "echo 1 > disk.raw",
    ] {
        let (code, said) = mounted.shell(line);
        assert!(code != Some(0) && !said.contains("not implemented"), "{line}: {code:?} {said}");
    }
    assert_eq!(mounted.bytes(), scratch.guest_bytes("qcow2", "cow.qcow2"));
    assert!(is_running(mounted.server()));
}

/// mount(8) says `rw` of every mount; a person who types it wants to write.
#[test]
fn who_types_rw_is_told_how_the_disk_is_written() {
    open_dev_fuse();
    let s = crate::control::old_and_new();
    s.ok("mkdir", "mnt");
    for (options, is_told) in [("-o rw", true), ("-o rw --rw", false), ("-o rw,writable", false), ("", false)]
    {
        let ended = s.run(rebasefs(), &format!("mount {options} cow.qcow2 {}", s.path("mnt").display()));
        let mounted = Mounted::found(s.path("mnt"));
        assert_eq!(ended.code, Some(0), "{options}: {}", ended.stderr);
        assert_eq!(ended.stderr.contains("add --rw"), is_told, "{options}: {}", ended.stderr);
        drop(mounted);
    }
}
