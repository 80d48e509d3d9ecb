//! The target of this name: see docs/fuzzing.md.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/input.rs"]
mod input;
#[path = "../../crates/heirloom/tests/fuzz/manifest.rs"]
mod manifest;

libfuzzer_sys::fuzz_target!(|input: &[u8]| manifest::run(input));
