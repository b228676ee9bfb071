//! What is written to the control files, in pieces: each byte 0xfe begins another write.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebasefs::mount::in_words;

fuzz_target!(|bytes: &[u8]| {
    for said in in_words(bytes.split(|byte| *byte == 0xfe)) {
        // Both are one line of ctl/status.
        let words = said.unwrap_or_else(|error| error.to_string());
        assert!(!words.contains('\n'), "{words:?}");
    }
});
