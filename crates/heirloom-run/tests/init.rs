//! As PID 1 of a pid namespace.

mod support;

use std::process::Command;

use heirloom::upgrade::{Upgrade, Upgraded};
use support::{Run, has_python, puppet};

/// Starts it as PID 1; `None` where that cannot be.
fn start(options: &[&str]) -> Option<Run> {
    let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    let can = Command::new("unshare").args(unshare).arg("true").status().is_ok_and(|status| status.success());
    if !can {
        support::skip("a pid namespace cannot be made here: run as root");
        return None;
    }
    let by = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(unshare).arg(program);
        command
    };
    Some(Run::start_by(by, options, &puppet()))
}

#[test]
fn it_keeps_the_store_is_upgraded_and_ends_with_all_others() {
    if !has_python() {
        return;
    }
    let Some(mut run) = start(&["--listen", "127.0.0.1:0", "--stop-timeout", "3s"]) else { return };
    let mut first = run.next();
    assert_eq!(run.status().pid, 1);
    assert_eq!(first.number("os.getppid()"), 1);
    first.tell("r, w = os.pipe(); os.write(w, b'kept'); put('pipe', r, w); notify('READY=1'); barrier()");
    // Two that do not end when asked, and one that does; orphans are waited for.
    first.tell(
        "x = subprocess.run(['sh', '-c', '(exit 3 &); (trap \"\" TERM; sleep 1000) & (sleep 1000) &'])",
    );
    first.begin("os.kill(os.getpid(), signal.SIGKILL)");

    let mut second = run.next();
    assert_eq!((second.given, second.names.as_str()), (3, "listen:pipe:pipe"));
    let itself = Upgrade { itself: true, ..Upgrade::default() };
    assert!(matches!(run.upgrade(itself), Ok(Upgraded::Replaced { .. })));
    assert_eq!(run.status().pid, 1);
    second.begin("os.kill(os.getpid(), signal.SIGKILL)");

    let mut third = run.next();
    assert_eq!(third.given, 3);
    assert_eq!(third.text("os.read(4, 9).decode()"), "kept");
    assert!(run.counter("reaped") >= 1);
    third.begin("os.kill(1, signal.SIGTERM); signal.pause()");
    third.ends();
    assert_eq!(run.code(), 143);
}

#[test]
fn the_code_gets_through() {
    if !has_python() {
        return;
    }
    let Some(mut run) = start(&["--tries", "1"]) else { return };
    let mut only = run.next();
    only.begin("os._exit(9)");
    assert_eq!(run.code(), 9);
}
