//! Incumbents and successors in different pid and user namespaces, that share the directory of the control socket, as
//! containers with a common volume do.

mod rogue;
mod stream;
mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use rogue::{Plot, Role};
use rustix::process::Signal;
use stream::Stream;
use support::upgrading::this_program;
use support::*;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

/// PID 1 of a pid namespace of its own.
const PID: &[&str] = &["--pid", "--fork", "--kill-child"];
/// Root in a user namespace of its own, of which it is the only user.
const MAPPED: &[&str] = &["--user", "--map-root-user"];
/// In a user namespace that knows no user.
const UNMAPPED: &[&str] = &["--user"];

/// Whether such namespaces can be made here; says so if not.
fn can_unshare(namespaces: &[&[&str]]) -> bool {
    let can = namespaces.iter().all(|namespace| {
        let mut command = Command::new("unshare");
        command.args(*namespace).arg("true").stdin(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    });
    // Anybody else would need a user namespace for the others.
    if !can || !rustix::process::geteuid().is_root() {
        skip("namespaces can only be made by root here, with unshare");
        return false;
    }
    true
}

/// The program in new namespaces.
fn inside(namespace: &[&str], arguments: &[&str], control: &Path) -> Process {
    let mut command = Command::new("unshare");
    command.args(namespace).arg(this_program()).args(arguments).arg("--control").arg(control);
    Process::start(&mut command)
}

/// The incumbent sees the successor, which is PID 1 in a namespace below; the other way round each sees that there is somebody.
#[test]
fn into_a_pid_namespace_and_out_of_it() {
    if !can_unshare(&[PID]) {
        return;
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut first = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let mut second = inside(PID, &["chat", stream.address(), "--replace", "must"], &control);
    first.wait_for_code(0);
    wait_for_generation(&control, 1);
    let now = status(&control);
    assert_eq!((now.pid, now.last_takeover.expect("one").peer_pid), (1, None));
    wait_for("its log", || second.stderr().contains("from=a process of another pid namespace"));
    let seen = second.stdout_len();
    wait_for("more of the stream", || second.stdout_len() > seen);

    // It is PID 1, but nobody's who is outside.
    let third = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
    second.wait_for_code(0);
    wait_for_generation(&control, 2);
    assert_eq!(status(&control).pid, third.id());
    stream.ends_exact(0, &[&first, &second, &third]);
}

/// An aborted successor has the lock and is stopped, and the incumbent cannot end it: a signal does not go up from a pid
/// namespace. It waits, and serves when the successor is gone, or lets go.
#[test]
fn a_successor_that_cannot_be_killed_is_waited_for() {
    if !can_unshare(&[PID]) {
        return;
    }
    for how in [Signal::KILL, Signal::CONT] {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let mut stream = Stream::start();
        let incumbent = inside(PID, &["chat", stream.address()], &control);
        wait_until_connected(&control);
        let plot = Plot { role: Role::Successor, point: "locked", act: "pause" };
        let mut rogue = rogue::start(plot, &control, stream.address());
        rogue::wait_until_there(&rogue);
        rogue.signal(Signal::STOP);
        wait_for("the attempt to end it", || incumbent.stderr().contains("cannot end a lingering successor"));
        assert!(rogue.is_running(), "it is not the incumbent's to kill");
        let waiting = status(&control);
        assert!(waiting.takeover_running && waiting.pid == 1, "{waiting:?}");

        rogue.signal(how);
        if how == Signal::CONT {
            rogue.write(b"go on\n");
            rogue.wait_for_code(rogue::GAVE_UP);
        }
        wait_for("the incumbent to go on", || !status(&control).takeover_running);
        let last = status(&control).last_takeover.expect("one");
        assert_eq!((last.outcome.as_str(), last.peer_pid), ("resumed", None));
        assert!(!rogue::says(&rogue).contains("SERVES"));
        stream.ends_exact(0, &[&incumbent]);
    }
}

/// Where the two know each other's users.
#[test]
fn into_a_user_namespace_that_knows_the_user_and_out_of_it() {
    if !can_unshare(&[MAPPED]) {
        return;
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut first = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let mut second = inside(MAPPED, &["chat", stream.address(), "--replace", "must"], &control);
    first.wait_for_code(0);
    wait_for_generation(&control, 1);
    let third = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
    second.wait_for_code(0);
    wait_for_generation(&control, 2);
    stream.ends_exact(0, &[&first, &second, &third]);
}

/// Where a user is nobody to the other side, which could be anybody: neither trusts the other.
#[test]
fn nobody_takes_over_across_user_namespaces_that_do_not_know_the_user() {
    if !can_unshare(&[UNMAPPED]) {
        return;
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut first = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    // To the incumbent it is root; to it, the incumbent is nobody it knows.
    let mut second = inside(UNMAPPED, &["chat", stream.address(), "--replace", "must"], &control);
    second.wait_for_code(4);
    let said = second.stderr();
    assert!(said.contains("is not trusted") && said.contains("same user namespace"), "{said}");
    wait_for("the incumbent to go on", || !status(&control).takeover_running);
    assert!(first.is_running());
    stream.ends_exact(0, &[&first]);

    // The other way round the incumbent knows nobody, not even who asks for its status.
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let stream = Stream::start();
    let mut first = inside(UNMAPPED, &["chat", stream.address()], &control);
    let ask = |command: &str, more: &[&str]| {
        let mut asking = heirloom();
        asking.arg(command).args(more).arg("--control").arg(&control);
        Process::start(&mut asking)
    };
    wait_for("it to serve", || first.stdout_len() > 0 || !first.is_running());
    for mut asking in [ask("status", &[]), ask("chat", &[stream.address(), "--replace", "must"])] {
        asking.wait_for_code(4);
        let said = asking.stderr();
        assert!(said.contains("may not ask here") && said.contains("same user namespace"), "{said}");
    }
    assert!(first.is_running(), "{}", first.stderr());
    first.signal(Signal::TERM);
    first.wait_for_code(0);
}
