//! What another process can send, fuzzed. Each target here is one of cargo-fuzz too (`/fuzz`, see `docs/fuzzing.md`); this is
//! the short, deterministic run: every seed, and mutations of them from a fixed start.
//!
//! Nothing panics, nothing runs for ever, and a small input never makes anything allocate much: the process may not have
//! more than [`MEMORY`] for all of it.

mod incumbent;
mod input;
mod lines;
mod manifest;
mod mutate;
mod packets;
mod seeds;
mod state;
mod successor;

use std::sync::Once;
use std::{fs, panic};

use mutate::Mutations;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many mutations each target gets.
const RUNS: usize = 4000;
/// What the process may allocate in bytes beside what it has at the start. An input has a few kilobytes.
const MEMORY: u64 = 64 << 20;

#[test]
fn lines_of_the_control_socket() {
    fuzz("lines", lines::run);
}

#[test]
fn packets_of_the_channel() {
    fuzz("packets", packets::run);
}

#[test]
fn the_incumbent_machine() {
    fuzz("incumbent", incumbent::run);
}

#[test]
fn the_successor_machine() {
    fuzz("successor", successor::run);
}

#[test]
fn manifests() {
    fuzz("manifest", manifest::run);
}

#[test]
fn state_of_an_application() {
    fuzz("state", state::run);
}

fn fuzz(target: &str, run: fn(&[u8])) {
    static LIMITED: Once = Once::new();
    LIMITED.call_once(limit_memory);
    let seeds = seeds::of(target);
    let inputs = seeds.iter().cloned().chain(Mutations::new(&seeds).take(RUNS));
    for input in inputs {
        if let Err(panic) = panic::catch_unwind(|| run(&input)) {
            eprintln!("target {target}, input {:?}", input.escape_ascii().to_string());
            panic::resume_unwind(panic);
        }
    }
}

fn limit_memory() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let has = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let has: u64 = has.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = getrlimit(Resource::Data);
    setrlimit(Resource::Data, Rlimit { current: Some((has << 10) + MEMORY), ..limit }).unwrap();
}
