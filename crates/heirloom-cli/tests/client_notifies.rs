//! What the chat client tells its supervisor, who is the test here.

mod rogue;
mod support;

use std::path::Path;
use std::process::Command;

use rogue::{Plot, Role};
use rustix::process::Signal;
use support::generations::listen;
use support::told::Supervisor;
use support::*;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

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

/// A takeover that fails before the freeze and after it, and an upgrade to a program that cannot take over.
#[test]
fn that_an_upgrade_is_under_way_and_that_it_was_rolled_back() {
    let scratch = Scratch::new();
    let (control, notify) = (scratch.path("chat.sock"), scratch.path("notify"));
    let supervisor = Supervisor::at(&notify);
    let (_listener, address) = listen();
    let mut chat = Process::start(&mut supervised(&address, &control, &notify));
    supervisor.wait_for("STATUS=connected\n", 1);
    let serves_on = |reason: &str| {
        format!("READY=1\nMAINPID={}\nSTATUS=connected; upgrade rolled back: {reason}", chat.id())
    };
    let mut upgrade = heirloom();
    upgrade.args(["upgrade", "--program", "/bin/false", "--control"]).arg(&control);
    Process::start(&mut upgrade).wait_for_code(5);
    supervisor.wait_for_part("RELOADING=1\nMONOTONIC_USEC=");
    supervisor.wait_for_part(&serves_on(""));
    for (tries, point) in (2..).zip(["offered", "freeze"]) {
        let plot = Plot { role: Role::Successor, point, act: "withdraw" };
        rogue::start(plot, &control, &address).wait_for_code(rogue::GAVE_UP);
        wait_for("the news of it", || supervisor.all().matches(&serves_on("")).count() == tries);
    }
    supervisor.wait_for_part(&serves_on("at step accept: "));
    // A dry run replaces nobody.
    let told = supervisor.all();
    Process::start(heirloom().args(["upgrade", "--dry-run", "--control"]).arg(&control)).wait_for_code(0);
    assert_eq!(supervisor.all().matches("RELOADING").count(), told.matches("RELOADING").count());
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
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
