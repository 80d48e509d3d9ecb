//! See the module.
#![no_main]

#[path = "../../crates/heirloom/tests/fuzz/input.rs"]
mod input;
#[path = "../../crates/heirloom/tests/fuzz/incumbent.rs"]
mod incumbent;

libfuzzer_sys::fuzz_target!(|input: &[u8]| incumbent::run(input));
