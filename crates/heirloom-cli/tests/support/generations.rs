//! One chat that is replaced over and over, and streams of numbered lines to tell whether a byte got lost.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use heirloom::control::LastTakeover;
use rustix::io::ioctl_fionread;

use super::{Process, heirloom, status, wait_for, wait_for_generation};

/// The generations of a chat, the last of which serves.
pub(crate) struct Generations {
    control: PathBuf,
    all: Vec<Process>,
    /// How many generations were other programs in the same process.
    in_place: u64,
}

impl Generations {
    /// Begins with a chat that serves at this control socket, or is about to.
    pub(crate) fn new(first: Process, control: &Path) -> Self {
        Generations { control: control.into(), all: vec![first], in_place: 0 }
    }

    /// The one that serves.
    pub(crate) fn current(&mut self) -> &mut Process {
        self.all.last_mut().expect("there is a first one")
    }

    /// Waits until `successor` has replaced the one that served, and that one has ended as it should. Returns what the
    /// successor says of the takeover.
    pub(crate) fn replace(&mut self, successor: Process) -> LastTakeover {
        self.current().wait_for_code(0);
        self.all.push(successor);
        self.handed_over()
    }

    /// Has the one that serves upgraded in place. Returns what it says of that afterwards.
    pub(crate) fn upgrade_in_place(&mut self) -> LastTakeover {
        let mut upgrade = heirloom();
        upgrade.args(["upgrade", "--in-place", "--control"]).arg(&self.control);
        Process::start(&mut upgrade).wait_for_code(0);
        self.in_place += 1;
        self.handed_over()
    }

    fn handed_over(&mut self) -> LastTakeover {
        let generation = self.all.len() as u64 - 1 + self.in_place;
        wait_for_generation(&self.control, generation);
        let status = status(&self.control);
        assert_eq!((status.generation, status.pid), (generation, self.current().id()));
        let last = status.last_takeover.expect("it was handed over");
        assert_eq!(last.outcome, "taken");
        last
    }

    /// What the one that was replaced last has logged.
    pub(crate) fn replaced_log(&self) -> String {
        self.all[self.all.len() - 2].stderr()
    }

    /// What all of them have logged.
    pub(crate) fn logs(&self) -> String {
        self.all.iter().map(Process::stderr).collect()
    }

    /// How much all of them together have written to stdout so far.
    pub(crate) fn written(&self) -> usize {
        self.all.iter().map(Process::stdout_len).sum()
    }

    /// What all of them have written to stdout, one after the other.
    pub(crate) fn output(&self) -> Vec<u8> {
        self.all.iter().flat_map(Process::stdout).collect()
    }

    /// Waits until so much has been written, ends the last one, and returns what all of them have written.
    pub(crate) fn finish(mut self, length: usize) -> Vec<u8> {
        wait_for("the end of the stream on stdout", || self.written() >= length);
        self.current().signal(rustix::process::Signal::TERM);
        self.current().wait_for_code(0);
        self.output()
    }

    /// Types into the one that serves, and waits until it has read everything. It need not have sent it yet.
    pub(crate) fn type_in(&mut self, text: &[u8]) {
        let current = self.current();
        current.write(text);
        let stdin = current.stdin.as_ref().expect("stdin is open");
        wait_for("stdin to be read", || ioctl_fionread(stdin).expect("a pipe can tell") == 0);
    }
}

/// The lines with these numbers.
pub(crate) fn lines(numbers: std::ops::Range<u64>) -> Vec<u8> {
    let mut text = Vec::new();
    for number in numbers {
        writeln!(text, "{number}").expect("memory takes it");
    }
    text
}

/// Like `assert_eq!`, but says where the first difference is instead of printing megabytes.
#[track_caller]
pub(crate) fn assert_same(got: &[u8], expected: &[u8]) {
    if got == expected {
        return;
    }
    let at = got.iter().zip(expected).take_while(|(a, b)| a == b).count();
    let around = |bytes: &[u8]| {
        let part = &bytes[at.saturating_sub(40)..bytes.len().min(at + 40)];
        String::from_utf8_lossy(part).into_owned()
    };
    panic!(
        "{} bytes instead of {}, different from byte {at} on:\n{:?} instead of\n{:?}",
        got.len(),
        expected.len(),
        around(got),
        around(expected)
    );
}

/// How many bytes a sender sends at most.
const MOST: usize = 4 << 30;

/// A thread that sends numbered lines at full speed, over and over, until it is told to stop.
pub(crate) struct Sender {
    lines: Vec<u8>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

impl Sender {
    /// Sends so many lines at least.
    pub(crate) fn start(mut to: impl Write + Send + 'static, at_least: u64) -> Self {
        let lines = lines(0..at_least);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, block) = (stop.clone(), lines.clone());
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while sent < block.len() || !stopped.load(Ordering::Relaxed) {
                let rest = &block[sent % block.len()..];
                let chunk = &rest[..rest.len().min(64 * 1024)];
                to.write_all(chunk).expect("the stream is taken");
                sent += chunk.len();
                // Rather than that the machine has no memory any more: all of it is kept.
                assert!(sent < MOST, "nobody ends the stream");
            }
            sent
        });
        Sender { lines, stop, thread }
    }

    /// Ends the stream, and returns everything that was sent.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        let length = self.thread.join().expect("the sender does not fail");
        let mut sent = self.lines.repeat(length / self.lines.len() + 1);
        sent.truncate(length);
        sent
    }
}

/// Reads on a thread to the end.
pub(crate) fn read_all(from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || read_to_end(from))
}

/// Reads to the end.
pub(crate) fn read_to_end(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).expect("it can be read to the end");
    all
}

/// A server's listener, and its address.
pub(crate) fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    (listener, address)
}

/// The next connection.
pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    listener.accept().expect("a client").0
}

/// Fails if any generation has made a connection of its own.
pub(crate) fn nobody_else_came(listener: TcpListener) {
    listener.set_nonblocking(true).expect("fcntl");
    let error = listener.accept().expect_err("somebody else connected");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}
