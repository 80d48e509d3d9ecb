//! The processes of a measurement: started here, and talked to in lines of JSON.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long a process may take to end by itself when nobody tells it anything any more.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A process that was started, and is ended with this.
pub(crate) struct Process {
    child: Child,
    hears: Option<ChildStdin>,
    says: BufReader<ChildStdout>,
}

impl Process {
    /// Starts this program again, as the part with these arguments.
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(
        arguments: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Process> {
        Self::start_by(Command::new(std::env::current_exe()?).args(arguments))
    }

    /// Starts a command that is, or leads to, a part of this program.
    pub(crate) fn start_by(command: &mut Command) -> anyhow::Result<Process> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process of the measurement")?;
        let hears = child.stdin.take();
        let says = BufReader::new(child.stdout.take().context("its stdout is a pipe")?);
        Ok(Process { child, hears, says })
    }

    /// Which process it is.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it what to do next.
    pub(crate) fn tell(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        write_line(self.hears.as_mut().context("its stdin is a pipe")?, what)
    }

    /// Waits for what it says next.
    pub(crate) fn said<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        read_line(&mut self.says)?.context("a process of the measurement ended early; it says why above")
    }

    /// Ends one that does not end with its stdin.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn ended(mut self) -> anyhow::Result<()> {
        let status = self.child.wait()?;
        if !status.success() {
            bail!("a process of the measurement ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, unless the measurement has. One that has something to clear away ends with its stdin.
        self.hears = None;
        let give_up = Instant::now() + END_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says something to whoever measures.
pub(crate) fn say(what: &impl Serialize) -> anyhow::Result<()> {
    write_line(&mut std::io::stdout().lock(), what)
}

/// What one is told next; `None` when there is nobody any more who could.
pub(crate) fn told<T: DeserializeOwned>() -> anyhow::Result<Option<T>> {
    read_line(&mut std::io::stdin().lock())
}

fn write_line(to: &mut impl Write, what: &impl Serialize) -> anyhow::Result<()> {
    writeln!(to, "{}", serde_json::to_string(what)?)?;
    Ok(to.flush()?)
}

fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> anyhow::Result<Option<T>> {
    let mut line = String::new();
    match from.read_line(&mut line)? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_str(&line)?)),
    }
}

/// CLOCK_MONOTONIC in nanoseconds, the same in all processes.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
