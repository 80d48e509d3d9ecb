//! What the tests share: a `heirloom-run` that is captured and never left behind, and programs under it that do what a
//! test tells them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use heirloom::NoRequests;
use heirloom::control::{Client, Reply, Request, Status};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything may take on a loaded machine before a test calls it a failure.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Waits for a condition, and fails with `what` if it does not come true.
#[track_caller]
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

/// Whether there can be puppets, which are Python programs; says loudly if not.
#[track_caller]
pub(crate) fn has_python() -> bool {
    let found = Command::new("python3").args(["-c", ""]).output().is_ok_and(|output| output.status.success());
    if !found {
        skip("python3 is not installed (apt-get install python3)");
    }
    found
}

/// The program of puppets.
pub(crate) const PUPPET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/puppet.py");

/// The words of a command that is a puppet.
pub(crate) fn puppet() -> Vec<String> {
    vec!["python3".into(), PUPPET.into()]
}

/// A `heirloom-run` and what it needs. It is killed, by its handle, when it goes out of scope; its puppets end by
/// themselves then.
pub(crate) struct Run {
    child: Child,
    pub(crate) directory: tempfile::TempDir,
    listener: UnixListener,
    log: Arc<Mutex<String>>,
    ended: Option<ExitStatus>,
}

impl Run {
    /// Runs a command with these options.
    pub(crate) fn start<W: AsRef<str>>(options: &[&str], command: &[W]) -> Run {
        Run::start_by(|program| Command::new(program), options, command)
    }

    /// Runs a puppet with these options.
    pub(crate) fn puppet(options: &[&str]) -> (Run, Puppet) {
        let run = Run::start(options, &puppet());
        let puppet = run.next();
        (run, puppet)
    }

    /// Runs it by another program; `by` makes its command of the path of `heirloom-run`.
    pub(crate) fn start_by<W: AsRef<str>>(
        by: impl FnOnce(&str) -> Command,
        options: &[&str],
        command: &[W],
    ) -> Run {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700)).expect("chmod");
        let listener = UnixListener::bind(directory.path().join("puppets")).expect("a socket");
        listener.set_nonblocking(true).expect("fcntl");
        let mut child = by(env!("CARGO_BIN_EXE_heirloom-run"))
            .args(options)
            .arg("--control")
            .arg(directory.path().join("control"))
            .arg("--")
            .args(command.iter().map(AsRef::as_ref))
            .env("PUPPET", directory.path().join("puppets"))
            .env("HEIRLOOM_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("heirloom-run starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (mut stderr, kept) = (child.stderr.take().expect("a pipe"), log.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Run { child, directory, listener, log, ended: None }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Waits until it listens at its control socket, which is there a little earlier.
    #[track_caller]
    pub(crate) fn wait_until_it_listens(&self) {
        wait_for("it to listen", || Client::connect(self.control()).is_ok());
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The next puppet that comes to life.
    #[track_caller]
    pub(crate) fn next(&self) -> Puppet {
        let mut accepted = None;
        let give_up = Instant::now() + LONG;
        while accepted.is_none() {
            accepted = self.listener.accept().ok().map(|(stream, _)| stream);
            assert!(Instant::now() < give_up, "no puppet has come; the log: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        Puppet::new(accepted.expect("a connection"))
    }

    /// Whether one has come that was not asked for.
    pub(crate) fn nobody_came(&self) -> bool {
        self.listener.accept().is_err()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a pid");
        kill_process(pid, signal).expect("it is there");
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let give_up = Instant::now() + LONG;
        while self.ended.is_none() {
            self.ended = self.child.try_wait().expect("it can be waited for");
            assert!(Instant::now() < give_up, "it does not end; the log: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.ended.expect("a status")
    }

    /// Waits for its end, and gives its code.
    #[track_caller]
    pub(crate) fn code(&mut self) -> i32 {
        self.wait().code().unwrap_or_else(|| panic!("ended by a signal; the log: {}", self.log()))
    }

    pub(crate) fn status(&self) -> Status {
        match self.ask(&Request::Status) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ask(&self, request: &Request<NoRequests>) -> Reply {
        let mut client = Client::connect(self.control()).expect("it answers");
        client.set_timeout(LONG);
        client.request(request).expect("a reply")
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.status().counters[name]
    }

    /// Upgrades the command, or itself.
    pub(crate) fn upgrade(
        &self,
        request: heirloom::upgrade::Upgrade,
    ) -> Result<heirloom::upgrade::Upgraded, heirloom::upgrade::AskError> {
        heirloom::upgrade::ask(&self.control(), request, LONG)
    }

    /// How many descriptors it has open when it has nothing to do: what it is about to close does not count.
    #[track_caller]
    pub(crate) fn descriptors(&self) -> usize {
        let mut count = None;
        wait_for("it to have nothing to do", || {
            count = self.is_asleep().then(|| self.count_descriptors()).filter(|_| self.is_asleep());
            count.is_some()
        });
        count.expect("waited for")
    }

    fn count_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs").count()
    }

    fn is_asleep(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        // After the name, which is in brackets.
        stat.rsplit(") ").next().is_some_and(|state| state.starts_with('S'))
    }

    /// Waits until it has so many descriptors open.
    #[track_caller]
    pub(crate) fn has_descriptors(&self, count: usize) {
        let mut now = 0;
        let give_up = Instant::now() + LONG;
        while now != count {
            now = self.count_descriptors();
            assert!(
                Instant::now() < give_up,
                "{now} descriptors instead of {count}; the log: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the log of heirloom-run:\n{}", self.log());
        }
    }
}

/// A program that does what it is told in Python (puppet.py). It ends when this goes out of scope.
pub(crate) struct Puppet {
    lines: BufReader<UnixStream>,
    pub(crate) pid: u32,
    /// `LISTEN_FDS`; -1: not set.
    pub(crate) given: i64,
    /// `LISTEN_FDNAMES`.
    pub(crate) names: String,
    pub(crate) arguments: Vec<String>,
}

impl Puppet {
    fn new(stream: UnixStream) -> Puppet {
        stream.set_nonblocking(false).expect("fcntl");
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        let mut lines = BufReader::new(stream);
        let hello = read(&mut lines).expect("a hello");
        let number = |name: &str| hello[name].as_i64().expect("a number");
        let puppet = Puppet {
            lines,
            pid: number("pid") as u32,
            given: number("given"),
            names: hello["names"].as_str().expect("text").into(),
            arguments: serde_json::from_value(hello["arguments"].clone()).expect("a list"),
        };
        let listen_pid = number("listen_pid");
        assert!(
            if puppet.given >= 0 { listen_pid == i64::from(puppet.pid) } else { listen_pid == -1 },
            "LISTEN_PID={listen_pid}"
        );
        puppet
    }

    /// Runs code, and gives the value of it if it is an expression.
    #[track_caller]
    pub(crate) fn tell(&mut self, code: &str) -> Value {
        self.begin(code);
        self.finish()
    }

    /// Waits for the end of what was begun, and gives its value.
    #[track_caller]
    pub(crate) fn finish(&mut self) -> Value {
        let answer = read(&mut self.lines).expect("an answer");
        assert!(answer.get("error").is_none(), "{answer}");
        answer["ok"].clone()
    }

    /// Begins to run code.
    pub(crate) fn begin(&mut self, code: &str) {
        let line = serde_json::to_string(code).expect("JSON") + "\n";
        self.lines.get_mut().write_all(line.as_bytes()).expect("it listens");
    }

    #[track_caller]
    pub(crate) fn number(&mut self, code: &str) -> i64 {
        self.tell(code).as_i64().expect("a number")
    }

    #[track_caller]
    pub(crate) fn text(&mut self, code: &str) -> String {
        self.tell(code).as_str().expect("text").into()
    }

    pub(crate) fn kill(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid as i32).expect("a pid"), signal).expect("it is there");
    }

    /// Whether it is there no more, not even as a zombie.
    pub(crate) fn is_gone(&self) -> bool {
        !std::path::Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn ends(&mut self) {
        assert!(read(&mut self.lines).is_none(), "it says something");
    }
}

fn read(lines: &mut BufReader<UnixStream>) -> Option<Value> {
    let mut line = String::new();
    match lines.read_line(&mut line) {
        Ok(0) => None,
        Ok(_) => Some(serde_json::from_str(&line).expect("JSON")),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
        Err(error) => panic!("the puppet does not answer: {error}"),
    }
}
