//! The target of this name: see docs/fuzzing.md.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/state.rs"]
mod state;

libfuzzer_sys::fuzz_target!(|input: &[u8]| state::run(input));
