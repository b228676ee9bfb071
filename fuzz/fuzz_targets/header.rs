//! The header cluster: header, extensions, names. What is accepted is encoded and decoded again.
#![no_main]

#[path = "../../mount-tests/memory_file.rs"]
#[allow(dead_code)]
mod memory_file;

use libfuzzer_sys::fuzz_target;
use memory_file::MemoryFile;
use rebasefs::layer::Format;
use rebasefs::layer::qcow2::Header;
use rebasefs::layer::qcow2::testing::{DECODED_LENGTH, Extensions, Preamble};

fuzz_target!(|bytes: &[u8]| {
    let file = MemoryFile::new(bytes.to_vec());
    let _ = Format::recognise(&file).map(|format| format.to_string());
    if let Some((start, rest)) = bytes.split_first_chunk::<DECODED_LENGTH>() {
        look_at_header(start);
        look_at_extensions(rest);
    }
    if let Ok(preamble) = Preamble::read(&file) {
        let _ = preamble.data_file();
        let name = preamble.backing.map(|backing| backing.name);
        assert!(name.is_none_or(|name| !name.is_empty() && name.len() <= 1023));
    }
});

fn look_at_header(start: &[u8; DECODED_LENGTH]) {
    let Ok(header) = Header::decode(start) else { return };
    if header.validate(|bit| Some(bit.to_string())).is_err() {
        return;
    }
    let mut again = header.encode();
    again.resize(DECODED_LENGTH.max(again.len()), 0);
    let (again, _) = again.split_first_chunk().expect("it is as long as that");
    assert_eq!(Header::decode(again).expect("it was accepted"), header);
    assert!(header.l2_entries().is_power_of_two());
}

fn look_at_extensions(area: &[u8]) {
    let Ok(extensions) = Extensions::decode(area, 0) else { return };
    let _ = (0..64).find_map(|bit| extensions.incompatible_feature_name(bit));
    assert_eq!(Extensions::decode(&extensions.encode(), 0).expect("it was accepted"), extensions);
}
