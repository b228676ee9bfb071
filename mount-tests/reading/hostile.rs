//! What must be refused, and with which words: chains that go wrong, features that are not
//! understood, images that break the format.

use rebasefs::ErrorKind;
use rebasefs::chain::{Guess, Opener};
use rebasefs::file::Access;
use rebasefs::layer::GuestOffset;

use super::{open, open_fails, reads_like_qemu};
use crate::scratch::Scratch;

/// `a.qcow2` of 1 MiB that names this backing file and, if it is not empty, this format.
fn overlay(s: &Scratch, backing: &str, format: &str) {
    s.qemu_img(&format!("create -q -u -f qcow2 -F raw -b {backing} a.qcow2 1M"));
    if format.is_empty() {
        // No tool leaves the format out any more: the extension gets a type that nobody knows.
        s.poke("a.qcow2", find(s, &0xe279_2acau32.to_be_bytes()), &[1, 2, 3, 4]);
    } else if format != "raw" {
        s.qemu_img(&format!("rebase -u -f qcow2 -F {format} -b {backing} a.qcow2"));
    }
}

/// Where these bytes lie in `a.qcow2`.
fn find(s: &Scratch, part: &[u8]) -> u64 {
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    bytes.windows(part.len()).position(|window| window == part).expect("the bytes are there") as u64
}

/// `a.qcow2` of 1 MiB with some data and without a backing file.
fn plain(s: &Scratch, options: &str) {
    s.qemu_img(&format!("create -q -f qcow2 -o cluster_size=64k{options} a.qcow2 1M"));
    s.draw("a.qcow2", 65536, "11 12 -- zz");
}

fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "'{part}' is missing in: {said}");
    }
}

/// Opens `a.qcow2` and reads all of it; returns the message of what fails.
fn fails(s: &Scratch) -> String {
    let read = |chain: rebasefs::chain::Chain| chain.read_at(GuestOffset(0), &mut vec![0; 1 << 20]);
    open(s, "a.qcow2").and_then(read).expect_err("opening or reading must fail").to_string()
}

#[test]
fn a_chain_that_is_a_loop_is_refused() {
    let s = Scratch::new();
    overlay(&s, "b.qcow2", "qcow2");
    s.qemu_img("rebase -u -f qcow2 -F qcow2 -b a.qcow2 a.qcow2");
    says(&open_fails(&s, "a.qcow2"), &["layer 1 of the chain", "layer 0 of its own chain", "loop"]);
    s.qemu_img("rebase -u -f qcow2 -F qcow2 -b b.qcow2 a.qcow2");
    s.qemu_img("create -q -u -f qcow2 -F qcow2 -b a.qcow2 b.qcow2 1M");
    assert_eq!(open(&s, "a.qcow2").unwrap_err().kind(), ErrorKind::Loop);
    says(&open_fails(&s, "a.qcow2"), &["layer 2 of the chain (named by", "a.qcow2", "loop"]);
    // Also under another name.
    std::fs::hard_link(s.path("a.qcow2"), s.path("c.qcow2")).unwrap();
    s.qemu_img("rebase -u -f qcow2 -F qcow2 -b c.qcow2 a.qcow2");
    says(&open_fails(&s, "a.qcow2"), &["loop"]);
}

#[test]
fn a_backing_file_that_is_no_file_is_refused_by_its_kind() {
    let s = Scratch::new();
    std::fs::create_dir(s.path("directory")).unwrap();
    s.ok("mkfifo", "fifo");
    let _socket = std::os::unix::net::UnixListener::bind(s.path("socket")).unwrap();
    let kinds = [
        ("missing.img", ErrorKind::NotFound, "No such file or directory"),
        ("directory", ErrorKind::IsDirectory, "is a directory"),
        ("fifo", ErrorKind::NotAFile, "is neither a regular file nor a block device"),
        ("socket", ErrorKind::NotAFile, "is neither a regular file nor a block device"),
        ("/dev/null", ErrorKind::NotAFile, "is neither a regular file nor a block device"),
        ("a.qcow2/x", ErrorKind::Io, "Not a directory"),
    ];
    for (name, kind, words) in kinds {
        overlay(&s, name, "raw");
        assert_eq!(open(&s, "a.qcow2").unwrap_err().kind(), kind, "{name}");
        says(&open_fails(&s, "a.qcow2"), &["layer 1 of the chain (named by", "a.qcow2", name, words]);
    }
}

#[test]
fn a_format_that_we_do_not_read_is_refused_by_name() {
    let s = Scratch::new();
    s.qemu_img("create -q -f vmdk b.img 1M");
    overlay(&s, "b.img", "vmdk");
    says(&open_fails(&s, "a.qcow2"), &["layer 1 of the chain", "b.img", "format 'vmdk' is not supported"]);
    overlay(&s, "b.img", "");
    says(&open_fails(&s, "a.qcow2"), &["looks like format vmdk"]);
}

#[test]
fn trap_13_a_guessed_format_that_names_further_files_is_refused_unless_allowed() {
    let s = Scratch::new();
    s.draw_raw("secret.raw", 65536, "55");
    s.qemu_img("create -q -f qcow2 -F raw -b secret.raw b.img 1M");
    overlay(&s, "b.img", "");
    let error = open(&s, "a.qcow2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    says(&error.to_string(), &["layer 1 of the chain", "b.img", "'secret.raw'", "a guest could have"]);
    let trusting = Opener::new().guess(Guess::Anything);
    let chain = trusting.chain(&s.path("a.qcow2"), None, Access::ReadOnly).unwrap();
    assert_eq!(chain.layers().len(), 3);
}

#[test]
fn trap_13_a_guessed_format_with_an_external_data_file_is_refused() {
    let s = Scratch::new();
    let data = s.path("secret.raw").display().to_string();
    s.qemu_img(&format!("create -q -f qcow2 -o data_file={data} b.img 1M"));
    overlay(&s, "b.img", "");
    says(&open_fails(&s, "a.qcow2"), &["layer 1 of the chain", "secret.raw", "a guest could have"]);
}

#[test]
fn a_guess_that_leads_nowhere_is_taken() {
    let s = Scratch::new();
    s.qemu_img("create -q -f qcow2 b.img 1M");
    s.draw("b.img", 65536, "b1");
    overlay(&s, "b.img", "");
    reads_like_qemu(&s, "qcow2", "a.qcow2", "guessed qcow2");
    s.draw_raw("b.img", 65536, "b1 -- b2");
    reads_like_qemu(&s, "qcow2", "a.qcow2", "guessed raw");
}

#[test]
fn an_incompatible_feature_is_refused_by_the_name_that_the_image_gives_it() {
    let s = Scratch::new();
    plain(&s, "");
    // The feature table names bit 1 "corrupt bit"; we move that name to bit 17.
    let at = find(&s, b"\0\x01corrupt bit");
    s.poke("a.qcow2", at + 1, &[17]);
    s.poke("a.qcow2", 72, &(1u64 << 17).to_be_bytes());
    says(&open_fails(&s, "a.qcow2"), &["a.qcow2", "not supported", "'corrupt bit' (bit 17)"]);
    s.poke("a.qcow2", 72, &(1u64 << 63 | 1 << 5).to_be_bytes());
    says(&open_fails(&s, "a.qcow2"), &["unnamed (bit 5)", "unnamed (bit 63)"]);
}

#[test]
fn encrypted_images_are_refused_by_name() {
    let s = Scratch::new();
    for (format, name) in [("aes", "AES"), ("luks", "LUKS")] {
        let options = format!("encrypt.format={format},encrypt.key-secret=s");
        s.qemu_img(&format!("create -q --object secret,id=s,data=abc -f qcow2 -o {options} a.qcow2 1M"));
        says(&open_fails(&s, "a.qcow2"), &["a.qcow2", "encryption", name, "not supported"]);
    }
}

#[test]
fn header_fields_that_make_no_sense_are_refused_with_their_offset() {
    let fields: [(u64, &[u8], &str); 22] = [
        (4, &4u32.to_be_bytes(), "qcow2 version 4 is not supported"),
        (20, &8u32.to_be_bytes(), "cluster size 2^8"),
        (20, &22u32.to_be_bytes(), "cluster size 2^22"),
        (20, &u32::MAX.to_be_bytes(), "cluster size 2^4294967295"),
        (24, &u64::MAX.to_be_bytes(), "virtual size 18446744073709551615 is too large at offset 0x18"),
        (24, &(1u64 << 40).to_be_bytes(), "L1 table is too small for the virtual size"),
        (32, &7u32.to_be_bytes(), "encryption method 7"),
        (36, &u32::MAX.to_be_bytes(), "the L1 table claims 34359738360 bytes"),
        (36, &(4u32 << 20).to_be_bytes(), "the L1 table leaves the file"),
        (36, &0u32.to_be_bytes(), "the L1 table is too small"),
        (40, &0x1234u64.to_be_bytes(), "the L1 table is not aligned"),
        (40, &(u64::MAX << 16).to_be_bytes(), "the L1 table lies beyond any file"),
        (40, &(1u64 << 50).to_be_bytes(), "the L1 table leaves the file"),
        (48, &1u64.to_be_bytes(), "the refcount table is not aligned"),
        (56, &u32::MAX.to_be_bytes(), "the refcount table claims"),
        (56, &0u32.to_be_bytes(), "there is no refcount table"),
        (60, &u32::MAX.to_be_bytes(), "snapshots are too many"),
        (96, &7u32.to_be_bytes(), "refcount width 2^7"),
        (100, &0u32.to_be_bytes(), "header length 0 is not valid"),
        (100, &u32::MAX.to_be_bytes(), "header length 4294967295 is not valid"),
        (100, &0xfffeu32.to_be_bytes(), "header length 65534 is not valid"),
        (104, &[1], "compression type"),
    ];
    for (at, value, words) in fields {
        let s = Scratch::new();
        plain(&s, "");
        s.poke("a.qcow2", at, value);
        says(&open_fails(&s, "a.qcow2"), &["a.qcow2: ", words]);
    }
}

#[test]
fn a_backing_name_out_of_its_place_is_refused() {
    let places = [(0x1_0000u64, 8u32), (0xfffc, 8), (8, 8), (0x200, 1024), (u64::MAX, 8), (0x200, u32::MAX)];
    for (offset, size) in places {
        let s = Scratch::new();
        plain(&s, "");
        s.poke("a.qcow2", 8, &[&offset.to_be_bytes()[..], &size.to_be_bytes()].concat());
        says(&open_fails(&s, "a.qcow2"), &["a.qcow2", "does not lie in the header cluster", "offset 0x8"]);
    }
}

#[test]
fn a_header_extension_that_leaves_its_place_is_refused() {
    let s = Scratch::new();
    plain(&s, "");
    s.poke("a.qcow2", 116, &u32::MAX.to_be_bytes());
    says(&open_fails(&s, "a.qcow2"), &["header extension", "leaves its place", "offset 0x70"]);
}

#[test]
fn a_file_that_is_no_qcow2_image_at_all_is_refused() {
    let s = Scratch::new();
    for bytes in [&b""[..], b"QFI", b"QFI\xfb", &[0x77; 8192]] {
        s.write("b.img", bytes);
        overlay(&s, "b.img", "qcow2");
        says(&open_fails(&s, "a.qcow2"), &["layer 1 of the chain", "b.img"]);
    }
}

/// Host offset of the first L2 table of `a.qcow2`.
fn l2_table(s: &Scratch) -> u64 {
    let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
    let u64_at = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    u64_at(u64_at(40)) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn table_entries_that_break_the_format_are_refused_when_they_are_read() {
    let copied = 1u64 << 63;
    let entries = [
        (1 << 40 | copied, "a cluster lies past the end of the file"),
        (0x50200 | copied, "is not aligned to a cluster"),
        (0x50000 | copied | 2, "has reserved bits set"),
        (0x50000 | copied | 1 << 60, "has reserved bits set"),
        (1 << 62 | 1 << 40, "a compressed cluster lies past the end of the file"),
        (1 << 62 | 1 << 63 | 0x50000, "is compressed but marked as writable in place"),
        (1 << 62 | 0x50000, "cannot be decompressed"),
    ];
    for (entry, words) in entries {
        let s = Scratch::new();
        plain(&s, "");
        s.poke("a.qcow2", l2_table(&s) + 8, &entry.to_be_bytes());
        says(&fails(&s), &["layer 0 of the chain", "a.qcow2", words]);
        let mut before = vec![0; 65536];
        open(&s, "a.qcow2").unwrap().read_at(GuestOffset(0), &mut before).unwrap();
        assert!(before.iter().all(|byte| *byte == 0x11), "what precedes it is read all the same");
    }
}

#[test]
fn l1_entries_that_break_the_format_are_refused_when_they_are_read() {
    for (entry, words) in [
        (0x200u64, "is not aligned to a cluster"),
        (0x50001, "has reserved bits set"),
        (1 << 50, "points past the end of the file"),
    ] {
        let s = Scratch::new();
        plain(&s, "");
        let at = u64::from_be_bytes(std::fs::read(s.path("a.qcow2")).unwrap()[40..48].try_into().unwrap());
        s.poke("a.qcow2", at, &entry.to_be_bytes());
        says(&fails(&s), &["layer 0 of the chain", "a.qcow2", "L1 entry", words]);
    }
}

#[test]
fn subclusters_that_are_both_data_and_zero_are_refused() {
    let s = Scratch::new();
    plain(&s, ",extended_l2=on");
    s.poke("a.qcow2", l2_table(&s) + 8, &u64::MAX.to_be_bytes());
    says(&fails(&s), &["a.qcow2", "calls a subcluster both allocated and zero"]);
}

#[test]
fn compressed_garbage_is_an_error_in_the_layer_that_holds_it() {
    let s = Scratch::new();
    for kind in ["zlib", "zstd"] {
        s.qemu_img(&format!("create -q -f qcow2 -o compression_type={kind} b.qcow2 1M"));
        s.draw("b.qcow2", 65536, "c11");
        s.qemu_img("create -q -f qcow2 -F qcow2 -b b.qcow2 a.qcow2 1M");
        let end = std::fs::metadata(s.path("b.qcow2")).unwrap().len();
        s.poke("b.qcow2", 0x50000, &vec![0xff; (end - 0x50000) as usize]);
        says(&fails(&s), &["layer 1 of the chain", "b.qcow2", "decompressed", "offset 0x50000"]);
    }
}

#[test]
fn snapshot_tables_that_break_the_format_are_refused() {
    let damage: [(u64, &[u8], &str); 5] = [
        (0, &0x1234u64.to_be_bytes(), "L1 table is not aligned"),
        (8, &u32::MAX.to_be_bytes(), "L1 table claims"),
        (8, &0u32.to_be_bytes(), "too small for its disk size"),
        (36, &u32::MAX.to_be_bytes(), "bytes of extra data"),
        (12, &u16::MAX.to_be_bytes(), "leaves the file"),
    ];
    for (at, value, words) in damage {
        let s = Scratch::new();
        plain(&s, "");
        s.qemu_img("snapshot -c one a.qcow2");
        let bytes = std::fs::read(s.path("a.qcow2")).unwrap();
        let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
        s.poke("a.qcow2", table + at, value);
        let chain = open(&s, "a.qcow2").unwrap();
        let error = chain.top().unwrap().as_qcow2().unwrap().snapshots().unwrap_err().to_string();
        says(&error, &["reading snapshot 0", "a.qcow2", words]);
    }
}

#[test]
fn an_image_that_is_its_own_data_file_is_refused() {
    let s = Scratch::new();
    let data = s.path("d.qcow2").display().to_string();
    s.qemu_img(&format!("create -q -f qcow2 -o data_file={data} a.qcow2 1M"));
    s.poke("a.qcow2", find(&s, b"d.qcow2"), b"a.qcow2");
    says(&open_fails(&s, "a.qcow2"), &["a.qcow2", "names itself as its external data file"]);
    assert_eq!(open(&s, "a.qcow2").unwrap_err().kind(), ErrorKind::Loop);
}

#[test]
fn a_data_file_that_is_missing_is_an_error_that_names_it() {
    let s = Scratch::new();
    let data = s.path("d.raw").display().to_string();
    s.qemu_img(&format!("create -q -f qcow2 -o data_file={data} a.qcow2 1M"));
    std::fs::remove_file(s.path("d.raw")).unwrap();
    says(&open_fails(&s, "a.qcow2"), &["external data file", "d.raw", "No such file"]);
}
