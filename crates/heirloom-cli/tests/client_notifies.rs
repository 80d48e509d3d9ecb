//! What the chat client tells its supervisor, who is the test here.

mod support;

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use support::generations::listen;
use support::told::Supervisor;
use support::*;

fn supervised(address: &str, control: &Path, notify: &Path) -> Command {
    let mut chat = chat(address, control, &[]);
    chat.env("NOTIFY_SOCKET", notify).env("WATCHDOG_USEC", "200000");
    chat
}

#[test]
fn that_it_serves_that_it_lives_who_follows_and_that_it_ends() {
    let scratch = Scratch::new();
    let (control, notify) = (scratch.path("chat.sock"), scratch.path("notify"));
    let supervisor = Supervisor::at(&notify);
    let (_listener, address) = listen();
    let mut first = Process::start(&mut supervised(&address, &control, &notify));
    supervisor.wait_for("READY=1\n", 1);
    supervisor.wait_for("STATUS=connected\n", 1);
    supervisor.wait_for("WATCHDOG=1\n", 5);

    let mut second = Process::start(&mut supervised(&address, &control, &notify));
    first.wait_for_code(0);
    supervisor.wait_for(&format!("MAINPID={}\n", second.id()), 1);
    supervisor.wait_for(&format!("READY=1\nMAINPID={}\n", second.id()), 1);
    let before = supervisor.count("WATCHDOG=1\n");
    supervisor.wait_for("WATCHDOG=1\n", before + 3);

    assert_eq!(supervisor.count("STOPPING=1\n"), 0);
    second.signal(Signal::TERM);
    second.wait_for_code(0);
    supervisor.wait_for("STOPPING=1\n", 1);
}

/// A watchdog that watches another process is not this one's.
#[test]
fn nothing_of_a_watchdog_that_is_not_its_own() {
    let scratch = Scratch::new();
    let (control, notify) = (scratch.path("chat.sock"), scratch.path("notify"));
    let supervisor = Supervisor::at(&notify);
    let (_listener, address) = listen();
    let mut chat = supervised(&address, &control, &notify);
    let mut chat = Process::start(chat.env("WATCHDOG_PID", "1"));
    supervisor.wait_for("STATUS=connected\n", 1);
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    supervisor.wait_for("STOPPING=1\n", 1);
    assert_eq!(supervisor.count("WATCHDOG=1\n"), 0);
}

/// It serves without one that has gone.
#[test]
fn a_supervisor_that_is_not_there_is_no_obstacle() {
    let scratch = Scratch::new();
    let (control, notify) = (scratch.path("chat.sock"), scratch.path("nobody"));
    let (listener, address) = listen();
    let mut chat = Process::start(&mut supervised(&address, &control, &notify));
    let mut server = listener.accept().expect("a client").0;
    std::io::Write::write_all(&mut server, b"hello").expect("it reads");
    wait_for("hello", || chat.stdout() == b"hello");
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert!(chat.stderr().contains("without a store"), "{}", chat.stderr());
}
