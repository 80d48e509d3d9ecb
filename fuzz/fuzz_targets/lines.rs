//! The target of this name: see docs/fuzzing.md.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/lines.rs"]
mod lines;

libfuzzer_sys::fuzz_target!(|input: &[u8]| lines::run(input));
