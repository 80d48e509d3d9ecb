//! Logs and status say nothing of what people say: at the most talkative level, through takeovers that succeed, that fail and
//! that are in place, with the words in sockets, buffers and state.

mod rogue;
mod support;

use std::io::Write;

use rogue::{Plot, Role};
use rustix::process::Signal;
use support::generations::{accept, listen};
use support::guests::*;
use support::upgrading::{EndsServing, Place, upgrade};
use support::*;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

/// What nobody may find.
const SECRET: &str = "the safe opens with 7-1-9-3";
/// The most talkative level.
const TRACE: [&str; 2] = ["--log-level", "trace"];

/// Fails if the secret is in a text, as it is or as a list of bytes in decimal or hexadecimal, from any part of it on.
#[track_caller]
fn assert_silent(what: &str, text: &str) {
    let part = &SECRET[4..20];
    let list = |format: fn(u8) -> String, between| part.bytes().map(format).collect::<Vec<_>>().join(between);
    let texts = [
        part.to_owned(),
        list(|byte| byte.to_string(), ", "),
        list(|byte| byte.to_string(), ","),
        list(|byte| format!("{byte:02x}"), ""),
        list(|byte| format!("{byte:#x}"), ", "),
    ];
    for secret in texts {
        assert!(!text.contains(&secret), "{what} has {secret:?}: {text}");
    }
}

/// What anybody who may ask is told.
#[track_caller]
fn assert_status_is_silent(control: &std::path::Path) {
    for options in [&[][..], &["--json"]] {
        let mut status = Process::start(heirloom().arg("status").args(options).arg("--control").arg(control));
        status.wait_for_code(0);
        assert_silent("status", &String::from_utf8_lossy(&status.stdout()));
        assert_silent("status", &status.stderr());
    }
}

/// A successor that is killed when it has everything.
fn fail(control: &std::path::Path, service: &str) {
    let mut rogue =
        rogue::start(Plot { role: Role::Successor, point: "freeze", act: "pause" }, control, service);
    rogue::wait_until_there(&rogue);
    rogue.kill();
    wait_for("the incumbent to go on", || {
        status(control).last_takeover.is_some_and(|last| last.peer_pid == Some(rogue.id()))
    });
    // It says what it was sent when something is wrong with that.
    let mut rogue =
        rogue::start(Plot { role: Role::Successor, point: "freeze", act: "wrong" }, control, service);
    rogue::wait_until_there(&rogue);
    rogue.write(b"go on\n");
    rogue.wait_for_code(rogue::GAVE_UP);
}

#[test]
fn the_chat_server_says_nothing_of_what_its_guests_say() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut first, address) = serve(&control, &TRACE);
    // One says much that the other does not read, and half a line: all of it is state.
    let _deaf = Guest::join_narrow(address);
    let mut talker = Guest::join(address);
    let said = format!("{SECRET}\n").repeat(150_000) + SECRET;
    talker.say(&said);
    wait_for("the server to read it", || status(&control).counters["bytes_in"] == said.len() as u64);
    assert_status_is_silent(&control);
    fail(&control, "server 127.0.0.1:0");
    assert_status_is_silent(&control);
    let mut second = Process::start(&mut listening("127.0.0.1:0", &control, &TRACE));
    first.wait_for_code(0);
    wait_for_generation(&control, 1);
    let carried = status(&control).last_takeover.expect("it was handed over").bytes;
    assert!(carried > 100_000, "only {carried} bytes of state: this shows little");
    upgrade(&control, Place::InPlace.options()).done();
    wait_for_generation(&control, 2);
    assert_status_is_silent(&control);
    second.signal(Signal::TERM);
    second.wait_for_code(0);
    for (generation, process) in [&first, &second].into_iter().enumerate() {
        assert_silent(&format!("the log of process {generation}"), &process.stderr());
    }
    let log = first.stderr();
    assert!(log.contains("serving on") && log.contains("DEBUG"), "it is not talkative: {log}");
}

#[test]
fn the_chat_client_says_nothing_of_what_passes_through_it() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    // Nobody reads its stdout, nor at first what it sends: its buffers are full.
    let (_screen, stdout) = std::io::pipe().expect("pipe");
    let (stdin, mut keyboard) = std::io::pipe().expect("pipe");
    let options = [&TRACE[..], &["--replace", "try"]].concat();
    let mut first = Process::start_between(&mut chat(&address, &control, &options), stdin, stdout);
    let ends = EndsServing(control.clone());
    let mut server = accept(&listener);
    wait_until_connected(&control);
    let much = format!("{SECRET}\n").repeat(8000);
    server.set_nonblocking(true).expect("fcntl");
    rustix::io::ioctl_fionbio(&keyboard, true).expect("ioctl");
    // As much as they take.
    while server.write(much.as_bytes()).is_ok() {}
    while keyboard.write(much.as_bytes()).is_ok() {}
    wait_for("it to read", || status(&control).counters.get("bytes_in").is_some_and(|bytes| *bytes > 10_000));
    assert_status_is_silent(&control);
    fail(&control, &address);
    for (generation, place) in Place::BOTH.into_iter().enumerate() {
        upgrade(&control, place.options()).done();
        wait_for_generation(&control, generation as u64 + 1);
        assert_status_is_silent(&control);
    }
    let carried = status(&control).last_takeover.expect("it was handed over").bytes;
    assert!(carried > 10_000, "only {carried} bytes of state: this shows little");
    first.wait_for_exit();
    drop(ends);
    // All of them have its stderr.
    first.wait();
    let log = first.stderr();
    assert!(log.contains("took over") && log.contains("upgraded in place"), "{log}");
    assert_silent("the log", &log);
}
