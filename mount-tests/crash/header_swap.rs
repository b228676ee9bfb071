//! Power cuts in a header swap alone (`-u`): either reference is there, the old or the new one, name
//! and format together, and nothing else of the image changes. With long names, and extensions
//! that reach beyond the first sector and have to move: the swap takes two steps then.

use std::sync::Arc;

use rebasefs::chain::Chain;
use rebasefs::layer::qcow2::check;
use rebasefs::layer::qcow2::testing::{Extension, Preamble};
use rebasefs::layer::{Layer, Reference};
use rebasefs::{ErrorKind, Rebase};

use serde_json::Value;

use super::{every_cut, open, views};
use crate::memory_file::{MemoryFile, Operation};
use crate::scratch::Scratch;

/// The names that an image gets one after the other, by their lengths; 0 is none.
const NAMES: [usize; 9] = [3, 1000, 0, 500, 1023, 40, 0, 1023, 0];

/// Type of the extension that leads around others.
const DETOUR: &[u8] = b"RBFS";

fn reference(length: usize) -> Option<Reference> {
    let format = if length.is_multiple_of(2) { "raw" } else { "parallels" };
    let name = "n".repeat(length).into();
    (length > 0).then(|| Reference { name, format: Some(format.to_owned()) })
}

/// Another program's extension, where the header cluster has room for it: what lies behind the
/// first sector moves with it then.
fn add_extension(bytes: &mut [u8]) {
    let Preamble { header, mut extensions, .. } = Preamble::read(&MemoryFile::new(bytes.to_vec())).unwrap();
    if header.version == 3 && header.cluster_size() > 1024 {
        let data = (0..600u32).map(|n| (n % 251) as u8).collect();
        extensions.0.push(Extension { kind: 0x1234_5678, data });
        let area = extensions.encode();
        bytes[header.length as usize..][..area.len()].copy_from_slice(&area);
    }
}

#[test]
fn no_power_cut_leaves_anything_but_the_old_or_the_new_reference() {
    let (mut states, mut detours, mut refused) = (0, 0, 0);
    for options in
        ["cluster_size=512", "cluster_size=1k", "cluster_size=4k", "cluster_size=64k", "compat=0.10"]
    {
        let s = Scratch::new();
        s.qemu_img(&format!("create -q -f qcow2 -o {options} cow.qcow2 64k"));
        s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x11 8k 8k"]);
        s.qemu_img("snapshot -c one cow.qcow2");
        s.qemu_io("qcow2", "cow.qcow2", &["write -q -P 0x22 12k 8k"]);
        let mut bytes = std::fs::read(s.path("cow.qcow2")).unwrap();
        add_extension(&mut bytes);
        let own = views(&MemoryFile::new(bytes.clone()), &Chain::default());
        for length in NAMES {
            let file = MemoryFile::new(bytes.clone());
            let before = open(&file).backing().cloned();
            let rebase = Rebase::of_chain(Chain::new([Arc::new(open(&file)) as Arc<dyn Layer>]));
            let backing = reference(length);
            let rebase = match &backing {
                Some(backing) => rebase.record_only(backing.clone()),
                None => rebase.record_none(),
            };
            if let Err(error) = rebase.run() {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{options}: {error}");
                assert!(file.log().is_empty());
                refused += 1;
                continue;
            }
            let is_detour = |operation: &Operation| matches!(operation, Operation::Write(0, bytes) if bytes.windows(4).any(|w| w == DETOUR));
            detours += usize::from(file.log().iter().any(is_detour));
            states += every_cut(&bytes, &file.log(), |state, what| {
                let file = MemoryFile::new(state);
                let found = open(&file);
                let is_either = found.backing() == before.as_ref() || found.backing() == backing.as_ref();
                assert!(is_either, "{options}: {:?}: {}", found.backing(), what());
                assert!(views(&file, &Chain::default()) == own, "{options}: {}", what());
                assert!(check::check(&found).unwrap().is_sound(), "{options}: {}", what());
            });
            bytes = file.bytes();
            assert_eq!(open(&file).backing(), backing.as_ref());
            s.write("cow.qcow2", &bytes);
            // There are no such files, and QEMU checks no image without opening them.
            let info: Value = serde_json::from_str(&s.qemu_img("info --output=json cow.qcow2")).unwrap();
            let name = info["backing-filename"].as_str().map(Into::into);
            let format = info["backing-filename-format"].as_str().map(str::to_owned);
            assert_eq!(name.map(|name| Reference { name, format }), backing);
        }
        s.check_clean("cow.qcow2");
    }
    println!("{states} states of a header swap, {detours} in two steps, {refused} without room; none wrong");
    assert!(states > 200 && detours > 3, "only {states} states, {detours} in two steps");
}
