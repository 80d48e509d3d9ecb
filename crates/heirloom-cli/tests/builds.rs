//! Replacements between different builds: debug and release, other ways to log, and the previous commit's.

mod support;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::builds::*;
use support::generations::*;
use support::*;

/// How many lines are streamed at least while the builds replace each other.
const LINES: u64 = 200_000;
/// What a commit must have for its program to know how to hand over.
const CHAT: &str = "crates/heirloom-cli/src/chat/mod.rs";

#[test]
fn a_debug_build_and_a_release_build_replace_each_other() {
    let this = Path::new(env!("CARGO_BIN_EXE_heirloom"));
    let other = other_profile();
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
    if !have("git") {
        return None;
    }
    let has_chat = |commit: &str| git(["cat-file", "-e", &format!("{commit}:{CHAT}")]).is_some();
    let commit = ["HEAD~1", "HEAD"].into_iter().find(|commit| has_chat(commit))?;
    git(["rev-parse", commit]).map(|hash| String::from_utf8_lossy(&hash).trim().to_owned())
}

/// The files of a commit, in a directory of its own. Different commits have different ones, since cargo goes by times.
fn export(commit: &str) -> PathBuf {
    let source = builds().join(format!("source-{commit}"));
    if source.exists() {
        return source;
    }
    let unpacked = tempfile::tempdir_in(builds()).expect("a temporary directory");
    let archive = unpacked.path().join("archive.tar");
    git(["archive".as_ref(), "--output".as_ref(), archive.as_os_str(), commit.as_ref()])
        .expect("git archive");
    let tar = Command::new("tar").arg("-xf").arg(&archive).current_dir(&unpacked).status();
    assert!(tar.expect("tar can be started").success(), "tar cannot unpack {}", archive.display());
    std::fs::remove_file(archive).expect("the archive can be removed");
    // Somebody else may have been faster; then theirs is as good.
    let _ = std::fs::rename(unpacked.keep(), &source);
    source
}

/// What git says about this repository, if it has an answer.
fn git<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Option<Vec<u8>> {
    let output = Command::new("git")
        // The files may belong to another user, as in a container.
        .args(["-c", "safe.directory=*"])
        .args(arguments)
        .current_dir(workspace())
        .output()
        .expect("git can be started");
    output.status.success().then_some(output.stdout)
}
