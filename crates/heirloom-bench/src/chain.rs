//! A chain of processes that take over from each other, and the clients at the other end of their connections.
//!
//! Each successor becomes the incumbent of the next, so that every round has a fresh process. Both sides say at which
//! moments things happened, by CLOCK_MONOTONIC, which all processes share; the difference is made here. The start of a
//! process lies before its first moment, its end after the last one: neither is measured.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What an incumbent says when it has been replaced.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Left {
    /// When it stopped touching its connections.
    pub(crate) frozen: u64,
}

/// What a successor says when it serves.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Came {
    /// When it was about to connect to the control socket.
    pub(crate) began: u64,
    /// When it had every descriptor, registered with its poller.
    pub(crate) registered: u64,
    /// When it served.
    pub(crate) serving: u64,
    /// When it had read the first byte.
    pub(crate) read: u64,
}

/// One takeover, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// From the incumbent's freeze to the first byte that the successor reads.
    pub(crate) pause: u64,
    /// From the successor's connect until it serves.
    pub(crate) whole: u64,
    /// From the successor's connect until it has every descriptor, registered with its poller.
    pub(crate) transfer: u64,
}

/// The rounds of the library and of the floor.
pub(crate) struct Rounds {
    library: Vec<Round>,
    floor: Vec<Round>,
}

impl Rounds {
    /// Lets both take over, in turn, so that whatever else the machine does meets them alike.
    pub(crate) fn run(connections: usize, rounds: usize) -> anyhow::Result<Rounds> {
        let directory = tempfile::tempdir()?;
        let mut library = Chain::begin("library", directory.path(), connections)?;
        let mut floor = Chain::begin("floor", directory.path(), connections)?;
        let mut run = Rounds { library: Vec::new(), floor: Vec::new() };
        for _ in 0..rounds {
            run.library.push(library.next()?);
            run.floor.push(floor.next()?);
        }
        Ok(run)
    }

    /// One quantity of every round: the library's, and the floor's.
    pub(crate) fn values(&self, of: impl Fn(&Round) -> u64) -> (Vec<u64>, Vec<u64>) {
        (self.library.iter().map(&of).collect(), self.floor.iter().map(&of).collect())
    }
}

struct Chain {
    kind: &'static str,
    control: PathBuf,
    clients: Vec<TcpStream>,
    incumbent: Process,
}

struct Process {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Chain {
    fn begin(kind: &'static str, directory: &Path, connections: usize) -> anyhow::Result<Self> {
        let control = directory.join(format!("{kind}.sock"));
        let count = connections.to_string();
        let mut incumbent = Process::start(&format!("{kind}-first"), &control, Some(&count))?;
        let address: String = incumbent.said()?;
        let clients = (0..connections).map(|_| TcpStream::connect(&address)).collect::<Result<_, _>>()?;
        let _: String = incumbent.said()?;
        Ok(Chain { kind, control, clients, incumbent })
    }

    fn next(&mut self) -> anyhow::Result<Round> {
        // What the successor reads first is there before it asks.
        self.clients.last_mut().context("no client")?.write_all(b".")?;
        let mut successor = Process::start(self.kind, &self.control, None)?;
        let came: Came = successor.said()?;
        let mut left = std::mem::replace(&mut self.incumbent, successor);
        let Left { frozen } = left.said()?;
        let status = left.child.wait()?;
        if !status.success() {
            bail!("the incumbent of a measurement ended with {status}");
        }
        Ok(Round {
            pause: came.read - frozen,
            whole: came.serving - came.began,
            transfer: came.registered - came.began,
        })
    }
}

impl Process {
    fn start(part: &str, control: &Path, connections: Option<&str>) -> anyhow::Result<Process> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(part)
            .arg(control)
            .args(connections)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process of the measurement")?;
        let says = BufReader::new(child.stdout.take().context("its stdout is a pipe")?);
        Ok(Process { child, says })
    }

    fn said<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        if self.says.read_line(&mut line)? == 0 {
            bail!("a process of the measurement ended early; it says why above");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, unless the measurement has.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says something to whoever measures.
pub(crate) fn say(what: &impl Serialize) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(what)?)?;
    Ok(stdout.flush()?)
}

/// The first incumbent's connections.
pub(crate) fn connections(count: usize) -> anyhow::Result<Vec<TcpStream>> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    say(&listener.local_addr()?.to_string())?;
    Ok((0..count).map(|_| listener.accept().map(|(stream, _)| stream)).collect::<Result<_, _>>()?)
}

/// CLOCK_MONOTONIC in nanoseconds, the same in all processes.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
