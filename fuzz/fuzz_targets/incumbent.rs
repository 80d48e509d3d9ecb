//! The target of this name: see docs/fuzzing.md.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/incumbent.rs"]
mod incumbent;
#[path = "../../crates/heirloom/tests/fuzz/input.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|input: &[u8]| incumbent::run(input));
