//! The target of this name: see docs/fuzzing.md.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/input.rs"]
mod input;
#[path = "../../crates/heirloom/tests/fuzz/successor.rs"]
mod successor;

libfuzzer_sys::fuzz_target!(|input: &[u8]| successor::run(input));
