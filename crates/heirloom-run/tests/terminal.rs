//! At a terminal: the signal of a key reaches the command once.

mod support;

use std::process::Command;

use support::{Run, has_python, puppet, wait_for};

/// Runs a program on a terminal of its own, and types what comes as lines on a file: `c` for Ctrl-C and so on.
const TERMINAL: &str = r#"
import os, pty, sys, time
pid, master = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
keys = open(os.environ['KEYS'])
os.set_blocking(master, False)
while True:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        os._exit(os.waitstatus_to_exitcode(status))
    line = keys.readline().strip()
    if line: os.write(master, bytes([ord(line) - 96]))
    try: os.write(2, os.read(master, 4096))
    except (BlockingIOError, OSError): time.sleep(0.01)
"#;

#[test]
fn a_key_is_one_signal() {
    if !has_python() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let keys = scratch.path().join("keys");
    std::fs::write(&keys, "").unwrap();
    let by = |program: &str| {
        let mut command = Command::new("python3");
        command.arg("-c").arg(TERMINAL).arg(program).env("KEYS", &keys);
        command
    };
    let mut run = Run::start_by(by, &["--stop-timeout", "30s"], &puppet());
    let mut puppet = run.next();
    let supervisor = puppet.number("os.getppid()");
    puppet.tell("got = []; note = lambda number, frame: got.append(number)");
    puppet.tell("for s in (2, 3, 28, 10): signal.signal(s, note)");
    puppet.tell("assert os.getpgid(0) == os.getpgid(os.getppid()) and os.isatty(0)");
    let mut typed = String::new();
    let mut press = |key: &str| {
        typed += key;
        typed += "\n";
        std::fs::write(&keys, &typed).unwrap();
    };
    // Ctrl-\ is SIGQUIT.
    press("|");
    wait_for("SIGQUIT", || puppet.tell("3 in got") == true);
    // By another process it is passed on: that comes after all that the key has led to.
    puppet.tell("os.kill(os.getppid(), signal.SIGUSR1)");
    wait_for("SIGUSR1", || puppet.tell("10 in got") == true);
    assert_eq!(puppet.number("got.count(3)"), 1);
    // A window that changes its size: once.
    puppet
        .tell("import fcntl, termios; fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 90, 0, 0))");
    puppet.tell("os.kill(os.getppid(), signal.SIGUSR1)");
    wait_for("SIGUSR1", || puppet.tell("got.count(10)") == 2);
    assert_eq!(puppet.number("got.count(28)"), 1);
    // Out of the group, it is reached by run alone.
    puppet.tell("os.setpgid(0, 0)");
    press("c");
    wait_for("SIGINT", || puppet.tell("2 in got") == true);
    assert_eq!(puppet.number("got.count(2)"), 1);
    assert!(supervisor > 1);
    // And that was the end of it all.
    puppet.begin("os._exit(7)");
    assert_eq!(run.code(), 7);
}
