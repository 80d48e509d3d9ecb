//! Upgrades in place, a hundred of one process: it has the same pid, the same connection and nothing more than before, and
//! not a byte is lost of what is typed and what comes.

mod stream;
mod support;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use stream::Stream;
use support::generations::*;
use support::proc::{Footprint, children, environment, only_child, settled_footprint, signal, time_running};
use support::upgrading::*;
use support::*;

/// How often one process is upgraded.
const UPGRADES: u64 = 100;

/// Upgrades, every third time by a signal, and waits until that is done.
fn upgrade_again(control: &Path, pid: u32, generation: u64) {
    if generation.is_multiple_of(3) {
        signal(pid, Signal::USR2);
        wait_for_generation(control, generation);
    } else {
        let said = upgrade(control, &[] as &[&str]).done();
        assert!(said.starts_with("upgraded in place: "), "{said}");
    }
    assert_eq!(status(control).generation, generation);
}

/// Fails unless there is nothing more of the process than before the upgrades.
#[track_caller]
fn has_not_grown(pid: u32, before: &Footprint) {
    let after = settled_footprint(pid);
    assert_eq!(after.descriptors(), before.descriptors(), "{before:#?}\nbecame\n{after:#?}");
    assert_eq!(after.signals(), before.signals());
    let environment = environment(pid);
    let ours = environment.iter().filter(|variable| variable.starts_with("HEIRLOOM_UPGRADE=")).count();
    assert_eq!(ours, 1, "{environment:#?}");
}

/// A tmux server of the test's own.
struct Tmux(PathBuf);

impl Tmux {
    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.0).args(["-f", "/dev/null"]).args(arguments).env_remove("TMUX");
        let output = command.stdin(Stdio::null()).output().expect("tmux can be started");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let mut command = Command::new("tmux");
        let _ = command.arg("-S").arg(&self.0).arg("kill-server").stderr(Stdio::null()).status();
    }
}

/// The line that a server sends with this number: in letters, to be told from the echo of what is typed, which is in digits.
fn line_in_letters(number: u64) -> Vec<u8> {
    let letters = format!("{number:07}").bytes().map(|digit| digit - b'0' + b'a').collect::<Vec<_>>();
    [&letters[..], b".\n"].concat()
}

/// What is in letters on a screen.
fn in_letters(screen: &[u8]) -> Vec<u8> {
    screen.iter().copied().filter(|byte| matches!(byte, b'a'..=b'j' | b'.')).collect()
}

#[test]
fn a_hundred_upgrades_at_a_terminal() {
    if !have("tmux") {
        return skip("there is no tmux");
    }
    let scratch = Scratch::new();
    let (control, screen, log) = (scratch.path("chat.sock"), scratch.path("screen"), scratch.path("log"));
    let (listener, address) = listen();
    let tmux = Tmux(scratch.path("tmux.sock"));
    let program = this_program().to_str().expect("UTF-8");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (control_text, log_text) = (text(&control), text(&log));
    tmux.run(&[
        "new-session",
        "-d",
        "-x",
        "80",
        "-y",
        "24",
        "sh",
        "-c",
        "exec 2>\"$0\"; exec \"$@\"",
        &log_text,
        program,
        "chat",
        &address,
        "--control",
        &control_text,
    ]);
    let mut server = accept(&listener);
    wait_until_connected(&control);
    tmux.run(&["pipe-pane", &format!("exec cat >'{}'", screen.display())]);
    let pane = tmux.run(&["display-message", "-p", "#{pane_pid}"]);
    let pid: u32 = pane.parse().expect("a pid");
    assert_eq!(status(&control).pid, pid);

    let heard = read_all(server.try_clone().expect("dup"));
    let stop = Arc::new(AtomicBool::new(false));
    let sender = thread::spawn({
        let stop = stop.clone();
        move || {
            let mut sent = Vec::new();
            for number in 0.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let lines: Vec<u8> = (10 * number..10 * (number + 1)).flat_map(line_in_letters).collect();
                server.write_all(&lines).expect("the stream is taken");
                sent.extend(lines);
                thread::sleep(Duration::from_millis(2));
            }
            sent
        }
    });
    let typed = thread::scope(|scope| {
        let typist = scope.spawn(|| {
            let mut typed = 0;
            while !stop.load(Ordering::SeqCst) {
                tmux.run(&["send-keys", &typed.to_string(), "Enter"]);
                typed += 1;
            }
            // A line that is half typed when the program changes.
            tmux.run(&["send-keys", &typed.to_string()]);
            typed
        });
        let upgrades = scope.spawn(|| {
            upgrade_again(&control, pid, 1);
            let before = settled_footprint(pid);
            (2..UPGRADES).for_each(|generation| upgrade_again(&control, pid, generation));
            before
        });
        let before = upgrades.join();
        stop.store(true, Ordering::SeqCst);
        let typed = typist.join().expect("tmux takes it");
        upgrade_again(&control, pid, UPGRADES);
        tmux.run(&["send-keys", "Enter"]);
        has_not_grown(pid, &before.expect("they succeed"));
        typed
    });
    assert!(typed > 10, "only {typed} lines were typed meanwhile");
    let sent = sender.join().expect("the sender does not fail");
    let shown = in_letters(&sent);
    let screen = || in_letters(&std::fs::read(&screen).unwrap_or_default());
    wait_for("everything on the screen", || screen().len() >= shown.len());
    assert_same(&screen(), &shown);
    let expected = lines(0..typed + 1);
    wait_for("everything typed to be sent", || {
        status(&control).counters.get("bytes_out") == Some(&(expected.len() as u64))
    });
    let status = status(&control);
    assert_eq!((status.pid, status.generation), (pid, UPGRADES));
    assert_eq!(tmux.run(&["display-message", "-p", "#{pane_pid}"]), pane);
    assert_eq!(children(pid), "");
    signal(pid, Signal::TERM);
    assert_same(&heard.join().expect("the server reads"), &expected);
    nobody_else_came(listener);
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(!log.contains("ERROR"), "{log}");
}

/// How a process becomes PID 1 of a pid namespace here, and how others come in; `None` where that is not allowed.
fn pid_namespace() -> Option<(&'static [&'static str], &'static [&'static str])> {
    const WAYS: [(&[&str], &[&str]); 2] = [
        (&["--pid", "--fork", "--kill-child", "--mount-proc"], &["--pid", "--mount"]),
        (
            &["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"],
            &["--user", "--preserve-credentials", "--pid", "--mount"],
        ),
    ];
    WAYS.into_iter().filter(|_| have("unshare") && have("nsenter")).find(|(unshare, _)| {
        let mut command = Command::new("unshare");
        command.args(*unshare).arg("true").stdin(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

#[test]
fn a_hundred_upgrades_of_pid_1() {
    let Some((unshare, nsenter)) = pid_namespace() else {
        return skip("no pid namespace can be made here (unshare needs root or user namespaces)");
    };
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut command = Command::new("unshare");
    command.args(unshare).arg(this_program()).args(["chat", stream.address(), "--control"]).arg(&control);
    let mut init = Process::start(&mut command);
    wait_until_connected(&control);
    // What it is called out here.
    let pid = only_child(init.id());
    assert_eq!(status(&control).pid, 1);
    let (mut typed, mut before) = (String::new(), None);
    for generation in 1..=UPGRADES {
        upgrade_again(&control, pid, generation);
        before.get_or_insert_with(|| settled_footprint(pid));
        let line = format!("typed in generation {generation}\n");
        init.write(line.as_bytes());
        typed.push_str(&line);
        let status = status(&control);
        assert_eq!((status.pid, status.generation), (1, generation));
    }
    has_not_grown(pid, &before.expect("after the first"));
    wait_for("what was typed", || stream.heard() == typed);

    // Its successor would end with it, if it came from the same namespace.
    let mut command = Command::new("nsenter");
    command.arg("--target").arg(pid.to_string()).args(nsenter).arg(this_program());
    command.args(["chat", stream.address(), "--replace", "must", "--control"]).arg(&control);
    let mut inside = Process::start(&mut command);
    inside.wait_for_code(4);
    let said = inside.stderr();
    assert!(said.contains("is PID 1 of its pid namespace") && said.contains("upgrade it in place"), "{said}");
    let seen = init.stdout_len();
    wait_for("more of the stream", || init.stdout_len() > seen);
    assert_eq!(only_child(init.id()), pid);

    let mut outside = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
    init.wait_for_code(0);
    let status = status(&control);
    assert_eq!((status.pid, status.generation), (outside.id(), UPGRADES + 1));
    let seen = outside.stdout_len();
    wait_for("more of the stream", || outside.stdout_len() > seen);
    stream.ends_exact(0, &[&init, &outside]);
    assert!(outside.is_running());
}

/// Neither the server nor the reader of stdout reads, so that bytes of both directions wait in the program.
#[test]
fn what_could_not_be_sent_or_written_yet_stays() {
    /// More than what the kernel and the program keep for a server that does not read.
    const TYPED: u64 = 1_500_000;
    const SENT: u64 = 1_500_000;
    const UPGRADES: u64 = 10;
    /// The buffers of both directions, full.
    const CARRIED: u64 = (256 + 64) * 1024;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    set_socket_recv_buffer_size(&listener, 64 * 1024).expect("setsockopt");
    let (stdin, mut keyboard) = std::io::pipe().expect("pipe");
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Process::start_between(&mut chat(&address, &control, &[]), stdin, stdout);
    let server = accept(&listener);
    wait_until_connected(&control);
    let typist = thread::spawn(move || keyboard.write_all(&lines(0..TYPED)).expect("stdin is read"));
    let mut sending = server.try_clone().expect("dup");
    let sender = thread::spawn(move || sending.write_all(&lines(0..SENT)).expect("the stream is taken"));
    let upgraded = || {
        upgrade(&control, &["--in-place"]).done();
        let status = status(&control);
        (status.pid, status.last_takeover.expect("it was upgraded").bytes)
    };
    for _ in 0..=UPGRADES {
        // Between two of them the kernel may find room for more, until it has no more.
        wait_for("an upgrade with all buffers full", || {
            let (pid, bytes) = upgraded();
            assert_eq!(pid, chat.id());
            bytes > CARRIED
        });
    }
    // Now they read, and the program is upgraded all the while.
    let (shown, heard) = (read_all(screen), read_all(server));
    for _ in 0..UPGRADES {
        upgraded();
    }
    typist.join().expect("everything is typed");
    sender.join().expect("everything is sent");
    let (typed, sent) = (lines(0..TYPED), lines(0..SENT));
    wait_for("everything on its way", || {
        let counters = status(&control).counters;
        (counters["bytes_in"], counters["bytes_out"]) == (sent.len() as u64, typed.len() as u64)
    });
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert_same(&shown.join().expect("the screen reads"), &sent);
    assert_same(&heard.join().expect("the server reads"), &typed);
    nobody_else_came(listener);
}

/// Whether a chat still reads its stdin.
fn stdin_open(control: &Path) -> bool {
    let mut inspect = heirloom();
    let output = inspect.args(["inspect", "--json", "--control"]).arg(control).output().expect("output");
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    shown["state"]["stdin_open"].as_bool().expect("it is in the state")
}

#[test]
fn a_stdin_that_has_ended_stays_ended() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let mut chat = Process::start(&mut chat(&address, &control, &[]));
    let mut server = accept(&listener);
    wait_until_connected(&control);
    chat.write(b"last words\n");
    chat.stdin = None;
    wait_for("the end of stdin", || !stdin_open(&control));
    let mut expected = Vec::new();
    for round in 0..5 {
        upgrade(&control, &["--in-place"]).done();
        assert!(!stdin_open(&control));
        let answer = format!("answer {round}\n");
        server.write_all(answer.as_bytes()).expect("the connection lives");
        expected.extend(answer.bytes());
        wait_for("the answer", || chat.stdout() == expected);
    }
    // It sleeps: a poll that reported the end over and over would keep it running.
    let before = time_running(chat.id());
    thread::sleep(Duration::from_millis(500));
    let ran = Duration::from_nanos(time_running(chat.id()) - before);
    assert!(ran < Duration::from_millis(20), "it ran for {ran:?} though nothing happened");
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert_eq!(read_to_end(server), b"last words\n");
}

/// A terminal: what types into it, and what a program has as its stdin.
fn terminal() -> (OwnedFd, File) {
    let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    unlockpt(&keyboard).expect("unlock");
    let name = ptsname(&keyboard, Vec::new()).expect("its name");
    let path = Path::new(name.to_str().expect("UTF-8"));
    let stdin = File::options().read(true).write(true).open(path).expect("open");
    (keyboard, stdin)
}

/// Another read from a terminal would succeed after the end (Ctrl-D).
#[test]
fn the_end_of_what_is_typed_at_a_terminal_stays_the_end() {
    const CTRL_D: &[u8] = b"\x04";
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (keyboard, stdin) = terminal();
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Process::start_between(&mut chat(&address, &control, &[]), stdin, stdout);
    let mut server = accept(&listener);
    wait_until_connected(&control);
    let screen = Reader::start(screen);
    let mut keyboard = File::from(keyboard);
    keyboard.write_all(&[b"last words\n", CTRL_D].concat()).expect("type");
    wait_for("the end of stdin", || !stdin_open(&control));
    upgrade_again(&control, chat.id(), 1);
    keyboard.write_all(b"after the end\n").expect("type");
    for round in 1..=20 {
        server.write_all(b"?").expect("the connection lives");
        wait_for("the program's next turn", || screen.len() == round);
    }
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert_eq!(read_to_end(server), b"last words\n");
}

/// SIGUSR2 at all times, also between two programs when there is no handler; and a SIGTERM at moments that are spread over
/// several upgrades.
#[test]
fn signals_that_come_in_an_upgrade_wait_and_are_heard() {
    const ROUNDS: u32 = 40;
    /// A round's SIGTERM comes after this round's number modulo this of upgrades,
    const WHOLE: usize = 4;
    /// and so much later than the last four rounds'.
    const LATER: Duration = Duration::from_millis(2);
    let mut upgrades = 0;
    for round in 0..ROUNDS {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let (listener, address) = listen();
        let (_keyboard, stdin) = terminal();
        let (screen, stdout) = std::io::pipe().expect("pipe");
        let mut chat = Process::start_between(&mut chat(&address, &control, &[]), stdin, stdout);
        let mut server = accept(&listener);
        // More than what a pipe holds, so that the rest waits in the program.
        let sent = lines(0..20_000);
        server.write_all(&sent).expect("write");
        wait_for("the bytes to be read", || {
            try_status(&control)
                .is_some_and(|status| status.counters.get("bytes_in") == Some(&(sent.len() as u64)))
        });
        let done = |chat: &Process| chat.stderr().matches("upgraded in place").count();
        let whole = round as usize % WHOLE;
        wait_for("upgrades by signals", || {
            (0..20).for_each(|_| chat.signal(Signal::USR2));
            done(&chat) >= whole
        });
        let begun = Instant::now();
        while begun.elapsed() < LATER * (round / WHOLE as u32) {
            chat.signal(Signal::USR2);
        }
        chat.signal(Signal::TERM);
        let pid = chat.id();
        (0..5).for_each(|_| signal(pid, Signal::USR2));
        let shown = read_all(screen);
        chat.wait_for_code(0);
        let log = chat.stderr();
        assert!(!log.contains("nobody took") && !log.contains("ERROR"), "round {round}: {log}");
        assert_same(&shown.join().expect("the screen reads"), &sent);
        upgrades += done(&chat);
        nobody_else_came(listener);
    }
    println!("{upgrades} upgrades in {ROUNDS} rounds");
}

#[test]
fn the_environment_goes_along_without_what_was_meant_for_the_first_program() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_listener, address) = listen();
    let mut command = Command::new("sh");
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=x HEIRLOOM_UPGRADE=in-place:$$:0 exec \"$@\"";
    command.args(["-c", script, "sh"]).arg(this_program());
    command.args(["chat", &address, "--control"]).arg(&control).env("COLOUR", "a mild green");
    let chat = Process::start(&mut command);
    wait_until_connected(&control);
    let variables = |name: &str| {
        let environment = environment(chat.id());
        environment.into_iter().filter(|variable| variable.starts_with(name)).collect::<Vec<_>>()
    };
    assert_eq!(variables("LISTEN_").len(), 3);
    for generation in 1..=3 {
        upgrade(&control, &["--in-place"]).done();
        assert_eq!(status(&control).generation, generation);
        assert_eq!(variables("LISTEN_"), [] as [&str; 0]);
        assert_eq!(variables("HEIRLOOM_UPGRADE=").len(), 1);
        assert_eq!(variables("COLOUR="), ["COLOUR=a mild green"]);
    }
}
