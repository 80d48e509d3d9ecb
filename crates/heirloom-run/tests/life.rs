//! A command's life: how it is started, what it says, what it is told, and with which code it all ends.

mod support;

use std::process::Command;

use heirloom::control::{Reply, Request};
use rustix::process::Signal;
use support::{Run, has_python, puppet, wait_for};

fn shell(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

fn state(run: &Run) -> String {
    run.status().supervised.unwrap().state
}

#[test]
fn the_code_is_the_commands_own() {
    for (options, script, code) in [
        (&["--restart", "never"][..], "exit 0", 0),
        (&["--restart", "never"], "exit 7", 7),
        (&["--restart", "never"], "kill -9 $$", 137),
        (&["--restart", "never"], "kill -TERM $$", 143),
        (&["--tries", "1"], "exit 9", 9),
        (&[], "exit 0", 0),
        // Giving up ends with the last code.
        (&["--tries", "3"], "exit 4", 4),
    ] {
        assert_eq!(Run::start(options, &shell(script)).code(), code, "{options:?} {script}");
    }
    let mut run = Run::start(&["--tries", "3", "--restart", "always"], &shell("exit 0"));
    assert_eq!(run.code(), 0);
    wait_for("it to give up", || run.log().contains("giving up"));
    assert_eq!(run.log().matches("started").count(), 3);
}

#[test]
fn what_cannot_be_run_has_codes_of_its_own() {
    assert_eq!(Run::start(&[], &["/nowhere/at/all"]).code(), 127);
    assert_eq!(Run::start(&[], &["no-such-program-here"]).code(), 127);
    assert_eq!(Run::start(&[], &["/etc/passwd"]).code(), 126);
    assert_eq!(Run::start(&[], &["/"]).code(), 126);
    assert_eq!(Run::start(&["--store-max", "1000000000"], &["true"]).code(), 125);
    assert_eq!(Run::start(&["--listen", "192.0.2.1:80"], &["true"]).code(), 125);
    assert_eq!(Run::start(&["--restart", "sometimes"], &["true"]).code(), 2);
    let run = Run::start(&[], &shell("exec sleep 1000"));
    run.wait_until_it_listens();
    let mut second = Command::new(env!("CARGO_BIN_EXE_heirloom-run"));
    let second = second.arg("--control").arg(run.control()).args(["--", "true"]).output().unwrap();
    assert_eq!(second.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&second.stderr).contains("already serves"));
}

#[test]
fn nothing_of_it_is_left_in_the_file_system() {
    if !has_python() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let (mut run, mut puppet) = Run::puppet(&["--listen", socket.to_str().unwrap()]);
    assert!(socket.exists() && run.directory.path().join("control.notify").exists());
    puppet.begin("os._exit(0)");
    assert_eq!(run.code(), 0);
    assert!(!socket.exists() && !run.control().exists());
    assert!(!run.directory.path().join("control.notify").exists());
}

#[test]
fn signals_are_passed_on_and_two_of_them_end_it() {
    if !has_python() {
        return;
    }
    let (mut run, mut puppet) = Run::puppet(&[]);
    puppet.tell("got = []; note = lambda number, frame: got.append(number)");
    puppet.tell("for s in (1, 3, 10, 12, 14, 15, 28, 40): signal.signal(s, note)");
    let passed = [Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::ALARM, Signal::WINCH];
    for signal in passed {
        run.signal(signal);
        let number = signal.as_raw();
        wait_for("the signal", || puppet.tell(&format!("{number} in got")) == true);
    }
    run.signal(Signal::PIPE);
    run.signal(Signal::CHILD);
    run.signal(Signal::TERM);
    wait_for("the signal", || puppet.tell("15 in got") == true);
    assert_eq!(state(&run), "stopping");
    assert_eq!(puppet.number("len(got)"), 7);
    // It ends in its own way, which is not a failure to be mended.
    puppet.begin("os._exit(5)");
    assert_eq!(run.code(), 5);

    let (mut run, puppet) = Run::puppet(&["--stop-timeout", "100ms"]);
    run.signal(Signal::INT);
    // Python makes an exception of it, which the puppet does not catch while it reads.
    run.wait();
    assert!(puppet.is_gone());
}

#[test]
fn what_does_not_end_is_killed_and_quit_is_as_a_signal() {
    if !has_python() {
        return;
    }
    let (mut run, mut puppet) = Run::puppet(&["--stop-timeout", "200ms"]);
    puppet.tell("signal.signal(signal.SIGTERM, signal.SIG_IGN)");
    assert_eq!(run.ask(&Request::Quit), Reply::Bye);
    assert_eq!(run.code(), 137);
    assert!(puppet.is_gone());
    // While nothing runs, there is nothing to wait for.
    let mut run = Run::start(&["--tries", "0"], &shell("exit 3"));
    wait_for("a long wait", || run.log().contains("starting again in 800ms"));
    run.signal(Signal::TERM);
    assert_eq!(run.code(), 143);
}

#[test]
fn orphans_are_waited_for() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    puppet.tell("for _ in range(20): subprocess.run(['sh', '-c', '(sleep 0.01 &)'])");
    // Whatever process group or session they are in.
    puppet.tell("for _ in range(20): subprocess.run(['sh', '-c', '(setsid sleep 0.01 &)'])");
    wait_for("all orphans", || run.counter("reaped") == 40);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.pid())).unwrap();
    assert_eq!(children.trim(), puppet.pid.to_string());
}

#[test]
fn what_it_says_of_itself_is_shown() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    assert_eq!(state(&run), "running");
    puppet.tell("notify('READY=1\\nSTATUS=two clients'); barrier()");
    assert_eq!(run.status().supervised.unwrap().text, "two clients");
    assert_eq!(state(&run), "ready");
    puppet.tell("notify('RELOADING=1\\nMONOTONIC_USEC=5'); barrier()");
    assert_eq!(state(&run), "reloading");
    puppet.tell("notify('READY=1'); barrier()");
    assert_eq!(state(&run), "ready");
    puppet.tell("notify('STOPPING=1'); barrier()");
    assert_eq!(state(&run), "stopping");
}

#[test]
fn the_watchdog_ends_what_is_silent_and_spares_what_speaks() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--watchdog", "3s", "--stop-timeout", "5s"]);
    assert_eq!(puppet.text("os.environ['WATCHDOG_USEC']"), "3000000");
    assert_eq!(puppet.number("int(os.environ['WATCHDOG_PID'])"), i64::from(puppet.pid));
    puppet.tell("put('x', os.memfd_create('x')); notify('READY=1')");
    for _ in 0..16 {
        puppet.tell("notify('WATCHDOG=1'); time.sleep(0.25)");
    }
    // Now it says nothing any more: SIGABRT, and the next one.
    let mut puppet = run.next();
    wait_for("the signal", || run.log().contains("ended with signal 6"));
    assert_eq!(puppet.given, 1);
    puppet.begin("notify('WATCHDOG=trigger')");
    let puppet = run.next();
    assert_eq!((puppet.given, run.counter("restarts")), (1, 2));
}

#[test]
fn one_that_says_when_it_is_ready_has_a_time_for_it() {
    let options = ["--expect-ready", "--start-timeout", "100ms", "--tries", "2"];
    let mut run = Run::start(&options, &shell("exec sleep 1000"));
    assert_eq!(run.code(), 143);
    wait_for("both to be said", || run.log().matches("does not say that it is ready").count() == 2);
}

#[test]
fn another_main_process_is_followed_if_it_is_one_of_ours() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    // A daemon: its parent says who it is, and ends.
    puppet.tell(
        "child = os.fork()
if child == 0:
    connection.close(); lines.close()
    signal.pause()
    os._exit(0)",
    );
    let child = puppet.number("child") as u32;
    puppet.tell("notify('MAINPID=1'); notify(f'MAINPID={os.getppid()}'); barrier()");
    assert_eq!(run.status().supervised.unwrap().pid, Some(puppet.pid));
    assert_eq!(run.counter("refused"), 2);
    puppet.tell("notify(f'MAINPID={child}'); barrier()");
    assert_eq!(run.status().supervised.unwrap().pid, Some(child));
    puppet.begin("os._exit(1)");
    puppet.ends();
    wait_for("the parent's end", || run.counter("reaped") == 1);
    assert_eq!(run.status().supervised.unwrap().pid, Some(child));
    rustix::process::kill_process(rustix::process::Pid::from_raw(child as i32).unwrap(), Signal::KILL)
        .unwrap();
    let next = run.next();
    assert_eq!(run.status().supervised.unwrap().pid, Some(next.pid));
}

#[test]
fn systemd_notify_is_heard_though_it_ends_at_once() {
    if Command::new("systemd-notify").arg("--version").output().is_err() {
        return support::skip("systemd-notify is not there: install systemd");
    }
    let script = "systemd-notify --ready --status='from a shell'; exec sleep 1000";
    let run = Run::start(&[], &shell(script));
    run.wait_until_it_listens();
    wait_for("the message", || run.status().supervised.unwrap().text == "from a shell");
    wait_for("readiness", || state(&run) == "ready");
    assert_eq!(run.counter("strangers"), 0);
    run.signal(Signal::TERM);
}

#[test]
fn a_stranger_is_not_heard() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    let before = run.descriptors();
    let socket = run.directory.path().join("control.notify");
    let script = run.directory.path().join("stranger.py");
    std::fs::write(
        &script,
        "import array, os, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for _ in range(20):
    s.sendmsg([b'FDSTORE=1\\nSTATUS=mine'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1]))], 0, os.environ['NOTIFY_SOCKET'])
os.read(0, 1)
",
    )
    .unwrap();
    let mut child = Command::new("python3")
        .arg(&script)
        .env("NOTIFY_SOCKET", socket)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("all its messages", || run.counter("strangers") == 20);
    puppet.tell("barrier()");
    assert_eq!(run.status().supervised.unwrap().text, "");
    assert_eq!(run.counter("stored"), 0);
    run.has_descriptors(before);
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn what_is_its_own_is_not_inherited() {
    if !has_python() {
        return;
    }
    let (_run, mut puppet) = {
        let run = Run::start_by(
            |program| {
                let mut command = Command::new(program);
                command.env("NOTIFY_SOCKET", "/nowhere").env("LISTEN_FDS", "9").env("WATCHDOG_USEC", "1");
                command.env("LISTEN_FDNAMES", "x").env("KEPT", "yes").env("HEIRLOOM_STORE", "/nowhere");
                command
            },
            &[],
            &puppet(),
        );
        let puppet = run.next();
        (run, puppet)
    };
    assert_eq!((puppet.given, puppet.names.as_str()), (0, ""));
    assert_eq!(puppet.text("os.environ['KEPT']"), "yes");
    assert_eq!(puppet.tell("os.environ.get('WATCHDOG_USEC')"), serde_json::Value::Null);
    assert!(puppet.text("os.environ['NOTIFY_SOCKET']").ends_with("control.notify"));
    // Nothing of run's own is open in it: beside what all here have, its connection and the socket that it speaks by.
    let ours: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let open = puppet.tell(
        "[os.readlink(p) for n in os.listdir('/proc/self/fd') if os.path.lexists(p := '/proc/self/fd/' + n)]",
    );
    let open: Vec<String> = serde_json::from_value(open).unwrap();
    let own: Vec<&String> = open.iter().filter(|link| *link != "/dev/null" && !ours.contains(link)).collect();
    assert_eq!(own.len(), 2, "{own:?}");
    assert!(own.iter().all(|link| link.starts_with("socket:")), "{own:?}");
    assert_eq!(puppet.tell("signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()"), true);
}
