//! What the tests of whole takeovers share: a private directory, processes that are never left behind, a server of a
//! bundle, and waiting for conditions.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use heirloom::control::{Client, Reply, Request, Status};
use heirloom::{
    Bundle, Config, Incumbent, NoRequests, Outcome, Replace, Service, Start, Successor, TakenBy, Turn,
};

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

/// A private directory for control sockets.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Scratch(tempfile::tempdir().expect("a temporary directory"))
    }

    /// A control path; its directory is made by whoever serves there first.
    pub(crate) fn control(&self) -> PathBuf {
        self.0.path().join("control/test.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// An example program, which `cargo test` builds, unless it was told to build some other target only.
pub(crate) fn example(name: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().expect("the path of the test");
    let path = test.parent()?.parent()?.join("examples").join(name);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!("the example {name} is not built (run `cargo test --workspace`)"));
    None
}

/// A running process; it is killed, by its handle, when it goes out of scope.
pub(crate) struct Process {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let said = BufReader::new(child.stdout.take().expect("a pipe"));
        Process { child, said }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line on its stdout that begins so, and gives the rest of it.
    pub(crate) fn line(&mut self, beginning: &str) -> String {
        loop {
            let mut line = String::new();
            let n = self.said.read_line(&mut line).expect("its stdout can be read");
            assert!(n > 0, "it ended without a line that begins with {beginning:?}");
            if let Some(rest) = line.trim_end().strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
    }

    /// The lines on its stdout, until it has ended.
    pub(crate) fn lines(&mut self) -> impl Iterator<Item = String> {
        (&mut self.said).lines().map_while(Result::ok)
    }

    /// Waits until it has ended, and fails unless it ended well.
    #[track_caller]
    pub(crate) fn ends_well(&mut self) {
        let mut status = None;
        wait_for("the end of a process", || {
            status = self.child.try_wait().expect("wait");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "it ended with {status:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts where nobody is yet.
pub(crate) fn fresh(control: &Path, service: &Service) -> Incumbent {
    match heirloom::start(control, service.clone(), Config::default(), Replace::Never) {
        Ok(Start::Fresh(incumbent)) => incumbent,
        other => panic!("{other:?}"),
    }
}

/// Starts where somebody is, as a successor.
pub(crate) fn successor(control: &Path, service: &Service) -> Successor {
    match heirloom::start::<NoRequests>(control, service.clone(), Config::default(), Replace::Must) {
        Ok(Start::Successor(successor)) => successor,
        other => panic!("{other:?}"),
    }
}

/// Serves a bundle until it is taken over.
pub(crate) fn serve(mut incumbent: Incumbent, bundle: Bundle) -> TakenBy {
    loop {
        heirloom::runtime::blocking::wait(&incumbent, &mut Vec::new(), None).expect("wait");
        loop {
            match incumbent.turn(Instant::now()).expect("a turn") {
                Turn::Idle => break,
                Turn::Offer(offer) => offer.begin_bundle(&bundle).expect("an offer"),
                Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
                Turn::Freeze(freeze) => match freeze.release_bundle(&bundle).expect("a release") {
                    Outcome::Taken(by) => {
                        // Knowingly: it is the successor's now.
                        let _ = bundle.close_rest();
                        return by;
                    }
                    Outcome::Resumed(_) => {}
                    Outcome::Superseded(why) => panic!("a third process serves: {why}"),
                },
                Turn::Request(_) | Turn::Closed(_) | Turn::Delegated(_) => {}
                Turn::Quit(_) => panic!("nobody asks it to quit"),
            }
        }
    }
}

/// What the process that serves says of itself; waits for one.
pub(crate) fn status(control: &Path) -> Status {
    let mut answer = None;
    wait_for("an answer to Status", || {
        answer = match Client::connect(control).and_then(|mut c| c.request(&Request::<NoRequests>::Status)) {
            Ok(Reply::Status(status)) => Some(status),
            _ => None,
        };
        answer.is_some()
    });
    answer.expect("waited for")
}

/// The byte at a place in the stream that a client sends: no two stretches of it are alike.
pub(crate) fn pattern(seed: u64, position: u64) -> u8 {
    let mut x = (position ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 29;
    (x.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

/// A stretch of that stream.
pub(crate) fn stretch(seed: u64, from: u64, bytes: usize) -> Vec<u8> {
    (from..from + bytes as u64).map(|position| pattern(seed, position)).collect()
}
