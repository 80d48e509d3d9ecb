//! A chain of processes that take over from each other.
//!
//! Each successor becomes the incumbent of the next, so that every round has a fresh process. Both sides say at which
//! moments things happened, by CLOCK_MONOTONIC, which all processes share; the differences are made here. The start of
//! a process lies before its first moment, its end after the last.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::clients::Task;
use crate::member::{Came, Left};
use crate::process::Process;
use crate::way::Way;

/// One takeover, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// From the incumbent's last turn to the return of the successor's first poll.
    pub(crate) pause: u64,
    /// The parts of the pause: until the successor has everything, until it has committed, until its first poll returns.
    pub(crate) pause_parts: [u64; 3],
    /// From the successor's connect until it has every descriptor, registered with its poller.
    pub(crate) transfer: u64,
    /// The same, until it has also checked them and could serve.
    pub(crate) ready: u64,
}

impl Round {
    fn of(left: Left, came: Came) -> Round {
        let Came { began, registered, checked, complete, taken, polled } = came;
        Round {
            pause: polled - left.frozen,
            pause_parts: [complete - left.frozen, taken - complete, polled - taken],
            transfer: registered - began,
            ready: checked - began,
        }
    }
}

/// The processes that take over from each other, and their clients.
pub(crate) struct Chain {
    way: Way,
    control: PathBuf,
    state_bytes: usize,
    clients: Process,
    incumbent: Process,
    /// The one that was replaced last, until it has ended.
    replaced: Option<Process>,
}

impl Chain {
    /// Starts the first incumbent with as many connections.
    pub(crate) fn begin(
        way: Way,
        directory: &Path,
        connections: usize,
        state_bytes: usize,
    ) -> anyhow::Result<Self> {
        let control = directory.join(format!("{}.sock", way.name()));
        let mut incumbent = start(way, &control, state_bytes, Some(connections))?;
        let servers: Vec<SocketAddr> = incumbent.said()?;
        let servers = servers.iter().map(SocketAddr::to_string);
        let mut clients =
            Process::start(["clients".into(), connections.to_string()].into_iter().chain(servers))?;
        let _: String = clients.said()?;
        let _: String = incumbent.said()?;
        Ok(Chain { way, control, state_bytes, clients, incumbent, replaced: None })
    }

    /// One takeover of idle connections. What the successor's first poll finds is there before it asks; afterwards a
    /// client is answered.
    pub(crate) fn next(&mut self) -> anyhow::Result<Round> {
        self.task(Task::Send)?;
        let round = self.replace()?;
        self.task(Task::Receive)?;
        self.wait_for_replaced()?;
        Ok(round)
    }

    /// One takeover while the sampled connections ask and are answered: the longest that each had to wait, and how long
    /// they were watched.
    pub(crate) fn next_sampled(&mut self) -> anyhow::Result<(Vec<u64>, Duration)> {
        self.task(Task::Sample)?;
        let began = Instant::now();
        self.replace()?;
        let watched = began.elapsed();
        let gaps = self.stop_sampling()?;
        self.wait_for_replaced()?;
        Ok((gaps, watched))
    }

    /// The longest that each sampled connection has to wait in so much time without a takeover.
    pub(crate) fn sample_unreplaced(&mut self, watched: Duration) -> anyhow::Result<Vec<u64>> {
        self.task(Task::Sample)?;
        std::thread::sleep(watched);
        self.stop_sampling()
    }

    fn task(&mut self, task: Task) -> anyhow::Result<()> {
        self.clients.tell(&task)?;
        self.clients.said::<String>().map(drop)
    }

    fn stop_sampling(&mut self) -> anyhow::Result<Vec<u64>> {
        self.clients.tell(&Task::Stop)?;
        self.clients.said()
    }

    fn replace(&mut self) -> anyhow::Result<Round> {
        let mut successor = start(self.way, &self.control, self.state_bytes, None)?;
        let came: Came = successor.said()?;
        let left: Left = self.incumbent.said()?;
        self.replaced = Some(std::mem::replace(&mut self.incumbent, successor));
        Ok(Round::of(left, came))
    }

    /// Waits for the end of the process that was replaced, so that it does not disturb what is measured next.
    fn wait_for_replaced(&mut self) -> anyhow::Result<()> {
        self.replaced.take().map_or(Ok(()), Process::ended)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // It serves until it is replaced.
        self.incumbent.kill();
    }
}

fn start(way: Way, control: &Path, state_bytes: usize, first: Option<usize>) -> anyhow::Result<Process> {
    let mut arguments: Vec<OsString> =
        vec!["server".into(), way.name().into(), control.into(), state_bytes.to_string().into()];
    arguments.extend(first.map(|count| count.to_string().into()));
    Process::start(arguments)
}
