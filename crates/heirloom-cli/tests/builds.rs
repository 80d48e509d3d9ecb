//! Replacements between different builds: debug and release, other ways to log, and the previous commit's.

mod support;

use std::path::Path;
use std::process::Command;

use support::builds::*;
use support::generations::*;
use support::*;

/// How many lines are streamed at least while the builds replace each other.
const LINES: u64 = 200_000;
#[test]
fn a_debug_build_and_a_release_build_replace_each_other() {
    let this = Path::new(env!("CARGO_BIN_EXE_heirloom"));
    let other = build(&workspace(), if cfg!(debug_assertions) { "release" } else { "dev" }, "other-profile");
    assert_ne!(std::fs::read(this).expect("a program"), std::fs::read(&other).expect("a program"));
    replace_each_other(&[(this, &[]), (&other, &[])]);
}

#[test]
fn an_older_build_and_this_one_replace_each_other() {
    let Some(commit) = older_commit() else {
        return skip("this is no git repository, so there is no older program");
    };
    let this = Path::new(env!("CARGO_BIN_EXE_heirloom"));
    let older = build(&export(&commit), "dev", "older");
    replace_each_other(&[(this, &[]), (&older, &[])]);
    replace_each_other(&[(&older, &[]), (this, &[])]);
}

#[test]
fn programs_that_log_differently_replace_each_other() {
    let this = Path::new(env!("CARGO_BIN_EXE_heirloom"));
    let json: &[&str] = &["--log-format", "json", "--log-level", "debug"];
    let logs = replace_each_other(&[(this, &[]), (this, json), (this, &["--log-level", "error"])]);
    for line in logs[1].lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "no JSON: {line}");
    }
    assert!(logs[0].contains("replaced by"), "{}", logs[0]);
    assert!(logs[1].contains("took over") && logs[1].contains("replaced by"), "{}", logs[1]);
    assert_eq!(logs[2], "", "an error was logged");
}

/// Lets these programs, with their options, replace each other in turn, twice around, while a server streams and the
/// client types. Returns what each has logged in the first round.
fn replace_each_other(programs: &[(&Path, &[&str])]) -> Vec<String> {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let start = |&(program, options): &(&Path, &[&str])| {
        let mut command = Command::new(program);
        command.arg("chat").arg(&address).arg("--control").arg(&control).args(options);
        Process::start(&mut command)
    };
    let mut rounds = programs.iter().chain(programs).chain(&programs[..1]);
    let mut generations = Generations::new(start(rounds.next().expect("a program")), &control);
    let server = accept(&listener);
    let sender = Sender::start(server.try_clone().expect("dup"), LINES);
    let mut logs = Vec::new();
    let mut typed = 0..0;
    for next in rounds {
        typed = typed.end..typed.end + 100;
        generations.type_in(&lines(typed.clone()));
        generations.replace(start(next));
        logs.push(generations.replaced_log());
    }
    let sent = sender.finish();
    assert_same(&generations.finish(sent.len()), &sent);
    assert_same(&read_to_end(server), &lines(0..typed.end));
    logs
}

/// The previous commit, or this one if that did not have the program yet.
fn older_commit() -> Option<String> {
    ["HEAD~1", "HEAD"].into_iter().find_map(commit)
}
