//! What the tests of the program share: processes that are captured and never left behind, and waiting for conditions.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod builds;
pub(crate) mod ears;
pub(crate) mod echo;
pub(crate) mod generations;
pub(crate) mod guests;
pub(crate) mod proc;
pub(crate) mod proxy;
pub(crate) mod random;
pub(crate) mod supervised;
pub(crate) mod systemd;
pub(crate) mod talk;
pub(crate) mod told;
pub(crate) mod traffic;
pub(crate) mod units;
pub(crate) mod upgrading;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use heirloom::NoRequests;
use heirloom::control::{Client, Reply, Request, Status};

/// How long anything may take on a loaded machine before a test calls it a failure.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Waits for a condition, and fails with `what` if it does not come true.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Says loudly that a test does not run here; an error where nothing may be skipped.
#[track_caller]
pub(crate) fn skip(why: &str) {
    // Not by a macro, whose output is kept back when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
    assert!(std::env::var_os("HEIRLOOM_REQUIRE_ALL").is_none(), "nothing may be skipped here: {why}");
}

/// Whether a program is there.
pub(crate) fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// A private directory for control sockets.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700)).expect("chmod");
        Scratch(directory)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Lets every user look for files in it whose names are known.
    pub(crate) fn open_to_others(&self) {
        std::fs::set_permissions(self.0.path(), std::fs::Permissions::from_mode(0o711)).expect("chmod");
    }
}

/// The program under test.
pub(crate) fn heirloom() -> Command {
    Command::new(env!("CARGO_BIN_EXE_heirloom"))
}

/// `heirloom chat ADDRESS --control PATH` and further options.
pub(crate) fn chat(address: &str, control: &Path, options: &[&str]) -> Command {
    let mut command = heirloom();
    command.arg("chat").arg(address).arg("--control").arg(control).args(options);
    command
}

/// A running process whose output is captured as it comes. It is killed, by its handle, when it goes out of scope.
pub(crate) struct Process {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    stdout: Arc<Mutex<Vec<u8>>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts it with stdin, stdout and stderr as pipes, the latter two read at full speed.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::start_reading(command, |_| {})
    }

    /// Like [`Process::start`]; `pace` is called with the number of bytes that were just read from stdout.
    pub(crate) fn start_reading(command: &mut Command, pace: impl Fn(usize) + Send + 'static) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take().expect("a pipe"), &stdout, pace),
            collect(child.stderr.take().expect("a pipe"), &stderr, |_| {}),
        ];
        Process { stdin: child.stdin.take(), child, stdout, stderr, readers }
    }

    /// Starts it with a stdin and a stdout of the caller's, who may share them between processes.
    pub(crate) fn start_between(
        command: &mut Command,
        stdin: impl Into<Stdio>,
        stdout: impl Into<Stdio>,
    ) -> Self {
        let mut child = command
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        // The command keeps its ends of pipes, which would never come to an end.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let stderr = Arc::default();
        let readers = vec![collect(child.stderr.take().expect("a pipe"), &stderr, |_| {})];
        Process { stdin: child.stdin.take(), child, stdout: Arc::default(), stderr, readers }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stdout so far.
    pub(crate) fn stdout(&self) -> Vec<u8> {
        self.stdout.lock().expect("no panic while reading").clone()
    }

    pub(crate) fn stdout_len(&self) -> usize {
        self.stdout.lock().expect("no panic while reading").len()
    }

    /// What it has written to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().expect("no panic while reading")).into_owned()
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("stdin is open").write_all(bytes).expect("the process reads its stdin");
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Waits until it has ended and its output is read to the end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = self.wait_for_exit();
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader panicked");
        }
        status
    }

    /// Waits until it has ended. A process that it has started may write to its stdout and stderr still.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        let give_up = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(Instant::now() < give_up, "it does not end; stderr:\n{}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it has ended, and fails unless it ended with this code.
    #[track_caller]
    pub(crate) fn wait_for_code(&mut self, code: i32) {
        let status = self.wait();
        assert_eq!(status.code(), Some(code), "stderr:\n{}", self.stderr());
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill");
    }

    /// Sends a signal to it, by pid: the child has not been waited for, so that the pid is still its own.
    pub(crate) fn signal(&mut self, signal: rustix::process::Signal) {
        assert!(self.is_running(), "it has ended; stderr:\n{}", self.stderr());
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("kill");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(
    mut from: impl Read + Send + 'static,
    into: &Arc<Mutex<Vec<u8>>>,
    pace: impl Fn(usize) + Send + 'static,
) -> JoinHandle<()> {
    let into = into.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            into.lock().expect("no panic while reading").extend_from_slice(&buffer[..n]);
            pace(n);
        }
    })
}

/// Asks for the status, over and over until somebody answers.
pub(crate) fn status(control: &Path) -> Status {
    let mut answer = None;
    wait_for("an answer to Status", || {
        answer = try_status(control);
        answer.is_some()
    });
    answer.expect("waited for")
}

/// Asks for the status once.
pub(crate) fn try_status(control: &Path) -> Option<Status> {
    match Client::connect(control).ok()?.request(&Request::<NoRequests>::Status) {
        Ok(Reply::Status(status)) => Some(status),
        _ => None,
    }
}

/// Waits until the chat at this control socket is connected to its server.
pub(crate) fn wait_until_connected(control: &Path) {
    wait_for("a connected chat", || try_status(control).is_some_and(|status| !status.items.is_empty()));
}

/// Waits until this generation serves.
pub(crate) fn wait_for_generation(control: &Path, generation: u64) {
    wait_for("the next generation", || try_status(control).is_some_and(|s| s.generation >= generation));
}

/// A server that accepts and says nothing, and a chat that is connected to it.
pub(crate) fn connected_chat(control: &Path) -> (std::net::TcpListener, String, Process) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let chat = Process::start(&mut chat(&address, control, &[]));
    wait_until_connected(control);
    (listener, address, chat)
}
