//! The edges of the chat client: a stdout that closes, fails or is slow, a stdin that ends, a server that goes.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use heirloom::NoRequests;
use heirloom::control::{Client, Reply, Request};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_getpipe_size;
use rustix::process::Signal;
use support::*;

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    (listener, address)
}

/// The numbered lines from `from` on, `count` of them.
fn lines(from: u64, count: u64) -> Vec<u8> {
    (from..from + count).flat_map(|number| format!("{number:08}\n").into_bytes()).collect()
}

/// A chat whose stdout is a pipe that the test reads itself.
fn chat_with_own_stdout(command: &mut Command) -> (std::process::Child, std::process::ChildStdout) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
    let stdout = child.stdout.take().expect("a pipe");
    (child, stdout)
}

/// How many bytes the chat has read from its server, as far as it says.
fn bytes_in(control: &Path) -> u64 {
    try_status(control).and_then(|status| status.counters.get("bytes_in").copied()).unwrap_or(0)
}

fn stderr_of(child: std::process::Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().expect("wait");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_closed_stdout_ends_with_the_number_of_bytes_that_were_not_written() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (child, stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "0s"]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    let pipe = fcntl_getpipe_size(&stdout).expect("a pipe has a size") as u64;
    wait_for("a full pipe and a buffer with the rest", || {
        bytes_in(&control) == 180_000 && ioctl_fionread(&stdout).expect("a pipe can tell") == pipe
    });
    drop(stdout);
    let (code, said) = stderr_of(child);
    assert_eq!(code, Some(1), "{said}");
    let unwritten =
        format!("stdout was closed, and no successor came: {} bytes were not written", 180_000 - pipe);
    assert!(said.contains(&unwritten), "{said}");
}

/// What the first client had read and not written reaches the second. What was in the pipe that nobody reads any more
/// is lost with the pipe: at most its capacity of 64 KiB.
#[test]
fn a_successor_gets_what_a_closed_stdout_did_not_take() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (child, mut stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "60s"]));
    let (mut server, _) = listener.accept().expect("accept");
    let sent = lines(0, 50_000);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || server.write_all(&sent).map(|()| server)
    });
    let mut first = vec![0; 90_000];
    stdout.read_exact(&mut first).expect("read");
    // The pipe fills, then the buffer behind it.
    wait_for("a full buffer", || {
        try_status(&control).is_some_and(|status| status.counters["bytes_in"] > 90_000 + 200_000)
    });
    drop(stdout);
    let second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
    let (code, said) = stderr_of(child);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("nobody reads stdout any more") && said.contains("replaced by"), "{said}");
    assert_eq!(first, sent[..90_000]);
    wait_for("the rest", || second.stdout().ends_with(&sent[sent.len() - 9..]));
    let rest = second.stdout();
    assert_eq!(rest, sent[sent.len() - rest.len()..], "nothing is missing within what the second wrote");
    let lost = sent.len() - 90_000 - rest.len();
    assert!(lost <= 65_536 + 4096, "{lost} bytes were lost, more than a pipe holds");
    drop(writer.join().expect("no panic").expect("written"));
}

#[test]
fn a_full_disk_loses_nothing() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
    let mut command = chat(&address, &control, &[]);
    let mut first = Process::start_between(&mut command, Stdio::null(), full);
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(b"kept\n").expect("write");
    wait_for("another try", || first.stderr().matches("cannot write to stdout").count() >= 2);
    let second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
    wait_for("the bytes", || second.stdout() == b"kept\n");
    first.wait_for_code(0);
}

#[test]
fn the_end_of_stdin_is_not_the_end() {
    let scratch = Scratch::new();
    let (listener, address) = listen();
    let mut chat = Process::start(&mut chat(&address, &scratch.path("chat.sock"), &[]));
    let (mut server, _) = listener.accept().expect("accept");
    chat.write(b"last words\n");
    chat.stdin = None;
    let mut heard = [0; 11];
    server.read_exact(&mut heard).expect("read");
    assert_eq!(&heard, b"last words\n");
    server.write_all(b"an answer\n").expect("write");
    wait_for("the answer", || chat.stdout() == b"an answer\n");
    assert!(chat.is_running());
}

#[test]
fn a_lost_connection_is_made_again_and_a_hopeless_one_is_given_up() {
    let scratch = Scratch::new();
    let (listener, address) = listen();
    let mut chat = Process::start(&mut chat(&address, &scratch.path("chat.sock"), &[]));
    for round in 0..5 {
        let (mut server, _) = listener.accept().expect("accept");
        server.write_all(b"hello\n").expect("write");
        wait_for("the greeting", || chat.stdout() == b"hello\n".repeat(round + 1));
    }
    drop(listener);
    chat.wait_for_code(1);
    assert!(chat.stderr().contains("refused"), "{}", chat.stderr());
    assert_eq!(chat.stdout(), b"hello\n".repeat(5));
}

#[test]
fn a_signal_ends_it_cleanly_with_everything_written() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let (listener, address) = listen();
        let mut chat = Process::start(&mut chat(&address, &control, &[]));
        let (mut server, _) = listener.accept().expect("accept");
        server.write_all(&lines(0, 1000)).expect("write");
        wait_for("the bytes to be read", || {
            try_status(&control).is_some_and(|status| status.counters["bytes_in"] == 9000)
        });
        chat.signal(signal);
        chat.wait_for_code(0);
        assert_eq!(chat.stdout(), lines(0, 1000));
        assert!(!control.exists(), "the control socket is removed");
    }
}

#[test]
fn a_log_in_json_and_a_closed_stderr() {
    let scratch = Scratch::new();
    let (listener, address) = listen();
    let mut json = Process::start(&mut chat(&address, &scratch.path("a.sock"), &["--log-format", "json"]));
    let _server = listener.accept().expect("accept");
    wait_for("a line", || json.stderr().contains("connected"));
    for line in BufReader::new(json.stderr().as_bytes()).lines() {
        let line: serde_json::Value = serde_json::from_str(&line.expect("UTF-8")).expect("JSON");
        assert!(line.get("level").is_some() && line.get("message").is_some(), "{line}");
    }
    json.kill();
    json.wait();

    let mut silent = Command::new("sh");
    silent.args([
        "-c",
        "exec \"$@\" 2>&-",
        "sh",
        env!("CARGO_BIN_EXE_heirloom"),
        "chat",
        &address,
        "--control",
    ]);
    let silent = Process::start(silent.arg(scratch.path("b.sock")));
    let mut server: TcpStream = listener.accept().expect("accept").0;
    server.write_all(b"heard\n").expect("write");
    wait_for("the bytes", || silent.stdout() == b"heard\n");
}

#[test]
fn without_a_journal_logging_to_it_is_an_error_that_says_what_to_do() {
    let scratch = Scratch::new();
    let mut chat = Process::start(&mut chat("127.0.0.1:9", &scratch.path("chat.sock"), &["--journal"]));
    if std::path::Path::new("/run/systemd/journal/socket").exists() {
        // Where there is one, it is used: nothing comes to stderr.
        wait_until_connected_or_given_up(&mut chat);
        assert!(chat.stderr().is_empty(), "{}", chat.stderr());
        return;
    }
    chat.wait_for_code(1);
    assert!(chat.stderr().contains("--journal"), "{}", chat.stderr());
}

fn wait_until_connected_or_given_up(chat: &mut Process) {
    wait_for("the chat to give up", || !chat.is_running());
}

#[test]
fn a_slow_reader_is_waited_for_when_the_chat_is_told_to_stop() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let pace = |read| std::thread::sleep(Duration::from_nanos(read as u64 * 1000));
    let mut chat = Process::start_reading(&mut chat(&address, &control, &[]), pace);
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    wait_for("the bytes to be read", || {
        try_status(&control).is_some_and(|status| status.counters["bytes_in"] == 180_000)
    });
    Process::start(heirloom().arg("quit").arg("--control").arg(&control)).wait_for_code(0);
    chat.wait_for_code(0);
    assert_eq!(chat.stdout(), lines(0, 20_000));
}

/// A stop is not held up by a stdout that closes meanwhile, however long `--linger` is.
#[test]
fn a_stdout_that_closes_while_the_chat_stops_does_not_hold_it_up() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (child, stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "1h"]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    wait_for("the bytes to be read", || bytes_in(&control) == 180_000);
    let mut client = Client::connect(&control).expect("connect");
    assert_eq!(client.request(&Request::<NoRequests>::Quit).expect("an answer"), Reply::Bye);
    drop(stdout);
    let (code, said) = stderr_of(child);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("stopping with bytes that nobody took"), "{said}");
}

/// A stop does not wait for a disk to have room again, and says what is lost.
#[test]
fn a_stop_with_a_full_disk_says_what_was_not_written() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
    let mut chat = Process::start_between(&mut chat(&address, &control, &[]), Stdio::null(), full);
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(b"lost\n").expect("write");
    wait_for("a stdout that fails", || chat.stderr().contains("cannot write to stdout"));
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert!(chat.stderr().contains("stopping with bytes that nobody took unwritten=5"), "{}", chat.stderr());
    assert!(!control.exists(), "the control socket is removed");
}
