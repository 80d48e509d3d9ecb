//! The demonstration's processes: this same program, with its output collected as it comes.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::signals::undisturbed;

/// How long the demonstration waits for anything before it gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child process. It is killed, by its handle, when the demonstration ends before it.
pub(super) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Mutex<Output>>,
    reader: Option<JoinHandle<()>>,
    /// How many bytes of the output [`Process::expect_line`] has used up.
    heard: usize,
}

#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    ended: bool,
}

impl Process {
    /// Starts a build of this program with these arguments.
    pub(super) fn start(program: &Path, arguments: &[&str]) -> anyhow::Result<Process> {
        Process::start_counting(program, arguments, Arc::default())
    }

    /// Like [`Process::start`]; the lines on its stdout are counted as they come.
    pub(super) fn start_counting(
        program: &Path,
        arguments: &[&str],
        lines: Arc<AtomicU64>,
    ) -> anyhow::Result<Process> {
        let mut child = spawn(program, arguments, Stdio::piped(), Stdio::inherit())?;
        let stdout = child.stdout.take().context("the child's stdout is a pipe")?;
        Ok(Process::collecting(child, stdout, lines))
    }

    /// Like [`Process::start`], for one whose log is to be read instead of its stdout.
    pub(super) fn start_logging(program: &Path, arguments: &[&str]) -> anyhow::Result<Process> {
        let mut child = spawn(program, arguments, Stdio::null(), Stdio::piped())?;
        let stderr = child.stderr.take().context("the child's stderr is a pipe")?;
        Ok(Process::collecting(child, stderr, Arc::default()))
    }

    fn collecting(mut child: Child, mut from: impl Read + Send + 'static, lines: Arc<AtomicU64>) -> Process {
        let output: Arc<Mutex<Output>> = Arc::default();
        let into = output.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                let mut output = into.lock().unwrap_or_else(PoisonError::into_inner);
                output.bytes.extend_from_slice(&buffer[..n]);
                let ends = buffer[..n].iter().filter(|&&byte| byte == b'\n').count();
                lines.fetch_add(ends as u64, Ordering::SeqCst);
            }
            into.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        });
        Process { stdin: child.stdin.take(), child, output, reader: Some(reader), heard: 0 }
    }

    /// Waits for the next line, which has to begin with `prefix`, and returns the rest; a JSON object whole.
    pub(super) fn expect_line(&mut self, prefix: &str) -> anyhow::Result<String> {
        let mut line = None;
        wait_until("a process of the demonstration", || {
            let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = &output.bytes[self.heard..];
            match rest.iter().position(|&byte| byte == b'\n') {
                Some(end) => line = Some(String::from_utf8_lossy(&rest[..end]).into_owned()),
                None if output.ended => bail!("a process of the demonstration ended early"),
                None => {}
            }
            Ok(line.is_some())
        })?;
        let line = line.unwrap_or_default();
        self.heard += line.len() + 1;
        match line.strip_prefix(prefix) {
            Some(_) if prefix == "{" => Ok(line),
            Some(rest) => Ok(rest.to_string()),
            None => bail!("a process of the demonstration says {line:?} instead of {prefix:?}"),
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is still open")?;
        stdin.write_all(bytes).context("a process of the demonstration does not read its stdin")
    }

    /// Its stdin, for somebody else to write to.
    pub(super) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// Whether it has ended, or was replaced.
    pub(super) fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill a process of the demonstration")
    }

    /// Waits until it has ended and its output is complete; its exit code, if it was not killed.
    pub(super) fn wait(&mut self) -> anyhow::Result<Option<i32>> {
        let mut status = None;
        wait_until("the end of a process of the demonstration", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Ok(status.and_then(|status| status.code()))
    }

    pub(super) fn output(&self) -> Vec<u8> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }

    /// Its output as text.
    pub(super) fn log(&self) -> String {
        String::from_utf8_lossy(&self.output()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, arguments: &[&str], stdout: Stdio, stderr: Stdio) -> anyhow::Result<Child> {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Set by Ctrl-C and its like.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From now on a signal ends the next wait with an error, so that everything is cleaned up.
pub(super) fn watch_signals() -> anyhow::Result<()> {
    let set_up = || {
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, INTERRUPTED.clone())?;
        }
        Ok(())
    };
    undisturbed(set_up).context("cannot watch for signals")
}

/// Waits until the condition is true.
pub(super) fn wait_until(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let give_up = Instant::now() + PATIENCE;
    while !condition()? {
        if INTERRUPTED.load(Ordering::SeqCst) {
            bail!("interrupted");
        }
        if Instant::now() >= give_up {
            bail!("waited {PATIENCE:?} for {what} in vain");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
