//! The edges of the chat client: a stdout that closes, fails or is slow, a stdin that ends, a server that goes.

mod support;

use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use heirloom::NoRequests;
use heirloom::control::{Client, Reply, Request};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_getpipe_size;
use rustix::process::Signal;
use support::generations::assert_same;
use support::generations::listen;
use support::*;

/// The numbered lines from `from` on, `count` of them.
fn lines(from: u64, count: u64) -> Vec<u8> {
    (from..from + count).flat_map(|number| format!("{number:08}\n").into_bytes()).collect()
}

/// A chat whose stdout is a pipe that the test reads itself, or does not.
fn chat_with_own_stdout(command: &mut Command) -> (Process, PipeReader) {
    let (reader, stdout) = std::io::pipe().expect("pipe");
    (Process::start_between(command, Stdio::null(), stdout), reader)
}

/// How many bytes the chat has read from its server, as far as it says.
fn bytes_in(control: &Path) -> u64 {
    try_status(control).and_then(|status| status.counters.get("bytes_in").copied()).unwrap_or(0)
}

/// How many bytes wait in the pipe for its reader.
fn in_pipe(pipe: &PipeReader) -> u64 {
    ioctl_fionread(pipe).expect("a pipe can tell")
}

#[test]
fn a_closed_stdout_ends_with_the_number_of_bytes_that_were_not_written() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (mut first, stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "0s"]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    let pipe = fcntl_getpipe_size(&stdout).expect("a pipe has a size") as u64;
    wait_for("a full pipe and a buffer with the rest", || {
        bytes_in(&control) == 180_000 && in_pipe(&stdout) == pipe
    });
    drop(stdout);
    first.wait_for_code(1);
    let said = first.stderr();
    let unwritten =
        format!("stdout was closed, and no successor came: {} bytes were not written", 180_000 - pipe);
    assert!(said.contains(&unwritten), "{said}");
}

/// What the first client had read and not written reaches the second. What was in the pipe that nobody reads any more
/// is lost with the pipe, 64 KiB at most, and nothing else: the first client was told that it is written.
#[test]
fn a_successor_gets_what_a_closed_stdout_did_not_take() {
    const READ: usize = 90_000;
    /// What the chat reads ahead of its stdout.
    const BUFFER: u64 = 256 * 1024;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (mut first, mut stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "30s"]));
    let (mut server, _) = listener.accept().expect("accept");
    let sent = lines(0, 50_000);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || server.write_all(&sent).map(|()| server)
    });
    let mut read = vec![0; READ];
    stdout.read_exact(&mut read).expect("read");
    // The pipe fills, then the buffer behind it. Then nothing moves any more.
    wait_for("a full pipe and a full buffer", || {
        bytes_in(&control) == READ as u64 + in_pipe(&stdout) + BUFFER
    });
    let lost = in_pipe(&stdout) as usize;
    assert!(lost as u64 <= fcntl_getpipe_size(&stdout).expect("a pipe has a size") as u64);
    drop(stdout);
    wait_for("the end of stdout to be noticed", || first.stderr().contains("nobody reads stdout any more"));
    let second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
    first.wait_for_code(0);
    assert!(first.stderr().contains("replaced by"), "{}", first.stderr());
    wait_for("the rest", || second.stdout_len() >= sent.len() - READ - lost);
    assert_same(&[&read, &sent[READ..READ + lost], &second.stdout()].concat(), &sent);
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
    let start = Instant::now();
    server.write_all(b"kept\n").expect("write");
    let tries = || first.stderr().matches("cannot write to stdout").count() as u64;
    wait_for("further tries", || tries() >= 3);
    let (tries, elapsed) = (tries(), start.elapsed());
    assert!(tries <= elapsed.as_secs() + 1, "{tries} tries within {elapsed:?}: more than one a second");
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
    let start = Instant::now();
    chat.wait_for_code(1);
    // The delays before the twentieth failure are 7 seconds altogether.
    assert!(start.elapsed() < Duration::from_secs(30), "gave up only after {:?}", start.elapsed());
    let said = chat.stderr();
    let last = said.lines().last().expect("it says why");
    assert!(last.contains("ERROR") && last.contains(&address) && last.contains("refused"), "{said}");
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

/// A stderr that is said to lead to the journal, where there is none: the log is on it, as ever.
#[test]
fn where_stderr_leads_to_a_journal_that_is_not_there_the_log_is_on_stderr() {
    if std::path::Path::new("/run/systemd/journal/socket").exists() {
        return; // The log would be in it.
    }
    let scratch = Scratch::new();
    let log = std::fs::File::create(scratch.path("log")).expect("a file");
    let metadata = log.metadata().expect("it is there");
    let stream = format!("{}:{}", metadata.dev(), metadata.ino());
    let mut ping = heirloom();
    ping.args(["ping", "--control"]).arg(scratch.path("nobody.sock")).env("JOURNAL_STREAM", stream);
    assert_eq!(ping.stderr(log).status().expect("it is there").code(), Some(3));
    let said = std::fs::read_to_string(scratch.path("log")).expect("it is there");
    assert!(said.contains("ERROR nobody serves at"), "{said}");
}

fn wait_until_connected_or_given_up(chat: &mut Process) {
    wait_for("the chat to give up", || !chat.is_running());
}

#[test]
fn a_slow_reader_is_waited_for_when_the_chat_is_told_to_stop() {
    const SENT: u64 = 20_000;
    for by_signal in [true, false] {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let (listener, address) = listen();
        // 400 ms for everything, of which less than half is left when it is told.
        let pace = |read| std::thread::sleep(Duration::from_nanos(read as u64 * 2200));
        let mut chat = Process::start_reading(&mut chat(&address, &control, &[]), pace);
        let (mut server, _) = listener.accept().expect("accept");
        server.write_all(&lines(0, SENT)).expect("write");
        wait_for("the bytes to be read", || bytes_in(&control) == 9 * SENT);
        if by_signal {
            chat.signal(Signal::TERM);
        } else {
            Process::start(heirloom().arg("quit").arg("--control").arg(&control)).wait_for_code(0);
        }
        chat.wait_for_code(0);
        assert_eq!(chat.stdout(), lines(0, SENT));
    }
}

/// A reader that sleeps is not waited for longer than a second. What it had in its pipe is its own.
#[test]
fn a_stop_waits_a_second_for_a_reader_that_sleeps_and_says_what_is_lost() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (mut chat, mut stdout) = chat_with_own_stdout(&mut chat(&address, &control, &[]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    let pipe = fcntl_getpipe_size(&stdout).expect("a pipe has a size") as u64;
    wait_for("a full pipe", || bytes_in(&control) == 180_000 && in_pipe(&stdout) == pipe);
    let start = Instant::now();
    chat.signal(Signal::TERM);
    chat.wait_for_code(0);
    assert!(start.elapsed() >= Duration::from_secs(1), "it waited only {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10), "it waited {:?}", start.elapsed());
    assert!(chat.stderr().contains(&format!("unwritten={}", 180_000 - pipe)), "{}", chat.stderr());
    let mut read = Vec::new();
    stdout.read_to_end(&mut read).expect("read");
    assert_same(&read, &lines(0, 20_000)[..pipe as usize]);
}

/// A stop is not held up by a stdout that closes meanwhile, however long `--linger` is.
#[test]
fn a_stdout_that_closes_while_the_chat_stops_does_not_hold_it_up() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (mut first, stdout) = chat_with_own_stdout(&mut chat(&address, &control, &["--linger", "1h"]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(&lines(0, 20_000)).expect("write");
    wait_for("the bytes to be read", || bytes_in(&control) == 180_000);
    let mut client = Client::connect(&control).expect("connect");
    assert_eq!(client.request(&Request::<NoRequests>::Quit).expect("an answer"), Reply::Bye);
    drop(stdout);
    first.wait_for_code(0);
    let said = first.stderr();
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
