//! Upgrades of the command: by a takeover, or by a stop and a start with the store; and back when the new one fails.

mod support;

use std::thread::{JoinHandle, spawn};

use heirloom::control::FailureCode;
use heirloom::upgrade::{AskError, Upgrade, Upgraded, ask};
use rustix::process::Signal;
use support::{LONG, PUPPET, Run, has_python};

/// Asks for an upgrade in a thread of its own.
fn begin(run: &Run, request: Upgrade) -> JoinHandle<Result<Upgraded, AskError>> {
    let control = run.control();
    spawn(move || ask(&control, request, LONG))
}

fn to(arguments: &[&str]) -> Upgrade {
    Upgrade { arguments: Some(arguments.iter().map(|&word| word.into()).collect()), ..Upgrade::default() }
}

fn command(run: &Run) -> Vec<String> {
    run.status().supervised.unwrap().command
}

#[track_caller]
fn rolled_back(outcome: JoinHandle<Result<Upgraded, AskError>>) -> String {
    match outcome.join().unwrap() {
        Err(AskError::Refused(failure)) if failure.code == FailureCode::RolledBack => failure.message,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn upgraded(outcome: JoinHandle<Result<Upgraded, AskError>>) -> (Option<u32>, Option<u32>) {
    match outcome.join().unwrap() {
        Ok(Upgraded::Supervised { before, now }) => {
            (before.supervised.unwrap().pid, now.supervised.unwrap().pid)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_command_is_stopped_and_its_new_version_gets_the_store() {
    if !has_python() {
        return;
    }
    let (run, mut old) = Run::puppet(&["--listen", "127.0.0.1:0"]);
    old.tell("r, w = os.pipe(); os.write(w, b'kept'); put('pipe', r, w); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    let mut new = run.next();
    assert_eq!((new.given, new.names.as_str()), (3, "listen:pipe:pipe"));
    assert_eq!(new.arguments, ["second"]);
    assert!(old.is_gone());
    // It is not known to say when it is ready: that it lives for a second is enough.
    assert_eq!(upgraded(outcome), (Some(old.pid), Some(new.pid)));
    assert_eq!(command(&run), ["python3", PUPPET, "second"]);
    assert_eq!(new.text("os.read(4, 9).decode()"), "kept");
    // It is remembered when it has to be started again.
    new.kill(Signal::KILL);
    let mut new = run.next();
    assert_eq!(new.arguments, ["second"]);
    // And one that says so is well when it does.
    new.tell("notify('READY=1'); barrier()");
    let outcome = begin(&run, Upgrade::default());
    let mut newest = run.next();
    assert_eq!(newest.arguments, ["second"]);
    assert!(!outcome.is_finished());
    newest.tell("notify('READY=1')");
    assert_eq!(upgraded(outcome), (Some(new.pid), Some(newest.pid)));
    assert_eq!(run.counter("restarts"), 1);
}

#[test]
fn what_fails_is_undone_and_the_previous_command_has_the_store() {
    if !has_python() {
        return;
    }
    let (run, mut old) = Run::puppet(&["--start-timeout", "6s"]);
    old.tell("put('f', os.memfd_create('x')); barrier()");
    // It ends at once.
    let request = Upgrade { program: Some("/bin/sh".into()), ..to(&["-c", "exit 4"]) };
    let outcome = begin(&run, request);
    let back = run.next();
    assert_eq!((back.given, back.arguments.len()), (1, 0));
    let why = rolled_back(outcome);
    assert!(why.contains("code 4"), "{why}");
    // It is not there.
    let request = Upgrade { program: Some("/nowhere/at/all".into()), ..Upgrade::default() };
    let outcome = begin(&run, request);
    let mut again = run.next();
    let why = rolled_back(outcome);
    assert!(why.contains("/nowhere/at/all"), "{why}");
    assert!(back.is_gone());
    // It is not ready in time.
    again.tell("notify('READY=1'); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "lazy"]));
    let lazy = run.next();
    assert_eq!(lazy.arguments, ["lazy"]);
    let last = run.next();
    assert_eq!((last.given, last.arguments.len()), (1, 0));
    let why = rolled_back(outcome);
    assert!(why.contains("ready"), "{why}");
    assert!(lazy.is_gone());
    assert_eq!(command(&run), ["python3", PUPPET]);
    assert_eq!(run.counter("stored"), 1);
}

#[test]
fn one_that_knows_takeovers_is_taken_over_from() {
    if !has_python() {
        return;
    }
    let (run, mut old) = Run::puppet(&["--listen", "127.0.0.1:0"]);
    old.tell("notify('READY=1\\nX_HEIRLOOM_CONTROL=/run/echo'); put('f', os.memfd_create('x')); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    let mut new = run.next();
    assert_eq!((new.given, new.arguments.as_slice()), (-1, ["second".to_string()].as_slice()));
    let busy = run.upgrade(Upgrade::default()).unwrap_err();
    assert!(matches!(&busy, AskError::Refused(failure) if failure.code == FailureCode::Busy), "{busy:?}");
    // Both speak, each for itself.
    new.tell("put('g', os.memfd_create('x')); notify('READY=1\\nSTATUS=new'); barrier()");
    assert_eq!(run.status().supervised.unwrap().pid, Some(old.pid));
    old.tell("notify(f'MAINPID=%d\\nSTOPPING=1'); barrier()".replace("%d", &new.pid.to_string()).as_str());
    assert!(!outcome.is_finished());
    old.begin("os._exit(0)");
    assert_eq!(upgraded(outcome), (Some(old.pid), Some(new.pid)));
    assert_eq!(command(&run), ["python3", PUPPET, "second"]);
    assert_eq!(run.counter("stored"), 2);
    assert_eq!(run.counter("restarts"), 0);
    new.kill(Signal::KILL);
    let last = run.next();
    assert_eq!((last.given, last.names.as_str()), (3, "listen:f:g"));
}

#[test]
fn a_takeover_that_fails_leaves_the_old_one_serving() {
    if !has_python() {
        return;
    }
    let (run, mut old) = Run::puppet(&["--start-timeout", "6s"]);
    old.tell("notify('READY=1\\nX_HEIRLOOM_CONTROL=/run/echo'); barrier()");
    // It ends.
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    let mut new = run.next();
    new.begin("os._exit(3)");
    assert!(rolled_back(outcome).contains("code 3"));
    // It is not there.
    let request = Upgrade { program: Some("/nowhere/at/all".into()), ..Upgrade::default() };
    assert!(rolled_back(begin(&run, request)).contains("/nowhere"));
    // It is not ready in time, and is killed.
    let outcome = begin(&run, to(&[PUPPET, "lazy"]));
    let lazy = run.next();
    assert!(rolled_back(outcome).contains("ready"));
    support::wait_for("its end", || lazy.is_gone());
    assert_eq!(run.status().supervised.unwrap().pid, Some(old.pid));
    assert_eq!(command(&run), ["python3", PUPPET]);
    assert_eq!(old.number("1 + 1"), 2);
    assert_eq!(run.counter("restarts"), 0);

    // The old one hands over, and the new one dies before it is ready: the previous command is started again.
    old.tell("put('f', os.memfd_create('x')); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    let mut new = run.next();
    old.begin("os._exit(0)");
    old.ends();
    support::wait_for("the old one's end", || old.is_gone());
    new.begin("os._exit(3)");
    let back = run.next();
    assert_eq!((back.given, back.arguments.len()), (1, 0));
    assert!(rolled_back(outcome).contains("code 3"));
}

/// The old one is still there when its successor dies, but serves no more.
#[test]
fn one_that_dies_as_soon_as_it_has_taken_over_is_started_again() {
    if !has_python() {
        return;
    }
    for is_ready in [true, false] {
        let (mut run, mut old) = Run::puppet(&[]);
        old.tell(
            "notify('READY=1\\nX_HEIRLOOM_CONTROL=/run/echo'); put('f', os.memfd_create('x')); barrier()",
        );
        let outcome = begin(&run, to(&[PUPPET, "second"]));
        let mut new = run.next();
        if is_ready {
            new.tell("notify('READY=1'); barrier()");
        }
        new.kill(Signal::KILL);
        let why = rolled_back(outcome);
        assert!(
            why.contains(if is_ready { "when it had taken over" } else { "before it was ready" }),
            "{why}"
        );
        old.begin("os._exit(0)");
        let mut back = run.next();
        assert_eq!((back.given, back.arguments.len()), (1, 0));
        assert_eq!(run.counter("restarts"), 1);
        // That is over.
        back.begin("os._exit(0)");
        assert_eq!(run.code(), 0);
    }
    // It is not taken for one that was replaced when it is told to end.
    let (mut run, mut old) = Run::puppet(&[]);
    old.tell("signal.signal(signal.SIGTERM, lambda *_: os._exit(0))");
    old.tell("notify('READY=1\\nX_HEIRLOOM_CONTROL=/run/echo'); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    run.next().kill(Signal::KILL);
    rolled_back(outcome);
    run.signal(Signal::TERM);
    assert_eq!(run.code(), 0);
}

#[test]
fn an_old_one_that_lingers_is_stopped() {
    if !has_python() {
        return;
    }
    let (run, mut old) = Run::puppet(&["--start-timeout", "6s", "--stop-timeout", "300ms"]);
    old.tell("signal.signal(signal.SIGTERM, signal.SIG_IGN)");
    old.tell("notify('READY=1\\nX_HEIRLOOM_CONTROL=/run/echo'); barrier()");
    let outcome = begin(&run, to(&[PUPPET, "second"]));
    let mut new = run.next();
    new.tell("notify('READY=1')");
    assert_eq!(upgraded(outcome), (Some(old.pid), Some(new.pid)));
    assert!(old.is_gone());
}

#[test]
fn an_upgrade_that_makes_no_sense_is_refused() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    for request in [
        Upgrade { dry_run: true, ..Upgrade::default() },
        Upgrade { in_place: true, ..Upgrade::default() },
        Upgrade { generation: Some(9), ..Upgrade::default() },
    ] {
        let refused = run.upgrade(request.clone());
        assert!(matches!(refused, Err(AskError::Refused(_))), "{request:?}: {refused:?}");
    }
    // While it ends, nothing is begun.
    let mut run = run;
    puppet.tell("notify('READY=1'); barrier()");
    let outcome = begin(&run, Upgrade::default());
    let _next = run.next();
    run.signal(Signal::TERM);
    run.wait();
    assert!(outcome.join().unwrap().is_err());
}
