//! The thread that writes the access log, and who speaks to it.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use heirloom::courtesy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::queue::Queue;
use super::record::AccessRecord;
use crate::config::{AccessFormat, AccessLog};

/// As much as one write has at most: a pipe takes it whole (`PIPE_BUF`), so that the lines of several processes do not mix.
const CHUNK: usize = 4096;
/// How long the thread waits for room before it looks whether it is to end.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long after a failed write it is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often dropped lines are spoken of.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Writes the access log, by a thread of its own.
///
/// One line a record, appended whole: several processes may write to one file, as during a handover. An error, a full disk
/// for instance, is said once, and writing tried again every second; meanwhile lines wait, as long as there is room for them.
///
/// ```
/// use std::time::Duration;
/// use heirloom_proxy::access::{AccessRecord, AccessWriter, End};
/// use heirloom_proxy::config::{AccessFormat, AccessLog};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("web.log");
/// let log = AccessLog { path: Some(path.clone()), format: AccessFormat::Json };
/// let writer = AccessWriter::open(&log)?;
/// writer.submit(AccessRecord {
///     unix_ms: 1_764_332_416_123,
///     client: "127.0.0.1:40000".into(),
///     listener: "web".into(),
///     backend: None,
///     end: End::Refused,
///     from_client: 0,
///     from_backend: 0,
///     connect: None,
///     duration: Duration::from_millis(3),
/// });
/// assert!(writer.close(Duration::from_secs(10)));
/// assert!(std::fs::read_to_string(path)?.contains("refused"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AccessWriter {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

/// Why there is no access log.
///
/// ```
/// use heirloom_proxy::access::AccessWriter;
/// use heirloom_proxy::config::{AccessFormat, AccessLog};
///
/// let log = AccessLog { path: Some("/nowhere/web.log".into()), format: AccessFormat::Text };
/// let error = AccessWriter::open(&log).unwrap_err().to_string();
/// assert!(error.starts_with("cannot open the access log /nowhere/web.log: "));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file cannot be opened for appending.
    #[error("cannot open the access log {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Stdout is closed, say.
    #[error("cannot write the access log to stdout: {0}")]
    Stdout(io::Error),
    /// There is no thread to be had.
    #[error("cannot start a thread for the access log: {0}")]
    Thread(io::Error),
}

impl AccessWriter {
    /// Opens the file, or a duplicate of stdout, and starts the thread.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or no thread be started.
    pub fn open(log: &AccessLog) -> Result<AccessWriter, AccessError> {
        let (file, name) = match &log.path {
            Some(path) => (open(path.clone())?, path.display().to_string()),
            // Stdout is shared with others: its O_NONBLOCK stays as it is, and the thread waits for room before it writes.
            None => {
                (io::stdout().as_fd().try_clone_to_owned().map_err(AccessError::Stdout)?, "stdout".to_owned())
            }
        };
        AccessWriter::to(file, name, log.format).map_err(AccessError::Thread)
    }

    fn to(file: OwnedFd, name: String, format: AccessFormat) -> io::Result<AccessWriter> {
        let queue = Arc::new(Queue::default());
        let thread = thread::Builder::new().name("access-log".to_owned()).spawn({
            let queue = queue.clone();
            move || {
                // Who has started this thread gives way.
                courtesy::take_turns();
                let mut writing =
                    Writing { file, name, queue: &queue, in_trouble: false, said: 0, said_at: None };
                writing.run(format);
                queue.end();
                writing.say_dropped(true);
            }
        })?;
        Ok(AccessWriter { queue, thread: Some(thread) })
    }

    /// Takes in a record to be written, without ever waiting for that. False: there was no room, and it is dropped.
    pub fn submit(&self, record: AccessRecord) -> bool {
        self.queue.put(record)
    }

    /// How many records were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// Waits until everything that was taken in is written, but no longer than so. Whether it is.
    pub fn flush(&self, within: Duration) -> bool {
        self.queue.flush(Instant::now() + within)
    }

    /// Writes everything that was taken in, and ends. False: not all could be written within that time, and the rest is dropped.
    pub fn close(mut self, within: Duration) -> bool {
        let until = Instant::now() + within;
        self.queue.close(until);
        let done = self.queue.flush(until);
        if done && let Some(thread) = self.thread.take() {
            // It has nothing more to wait for.
            let _ = thread.join();
        }
        done
    }
}

/// Without a [close](AccessWriter::close), what was taken in is still written if that can be done at once and the process goes on.
impl Drop for AccessWriter {
    fn drop(&mut self) {
        self.queue.close(Instant::now());
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

/// A file of our own description, so that it may be non-blocking: a pipe with a name neither holds up the start nor a write.
fn open(path: PathBuf) -> Result<OwnedFd, AccessError> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32);
    match options.open(&path) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(AccessError::Open { path, source }),
    }
}

/// The thread.
struct Writing<'a> {
    file: OwnedFd,
    /// What the file is called in the program's log.
    name: String,
    queue: &'a Queue,
    /// The last write has failed, and that was said.
    in_trouble: bool,
    /// How many dropped lines were spoken of, and when.
    said: u64,
    said_at: Option<Instant>,
}

impl Writing<'_> {
    /// Until the queue is closed and everything written, or not to be waited for.
    fn run(&mut self, format: AccessFormat) {
        let mut batch = VecDeque::new();
        let (mut chunk, mut line) = (Vec::with_capacity(CHUNK), Vec::new());
        while self.queue.next(&mut batch) {
            let mut in_chunk = 0;
            for record in batch.drain(..) {
                line.clear();
                record.append_line(format, &mut line);
                if chunk.len() + line.len() > CHUNK && !self.write(&mut chunk, &mut in_chunk) {
                    return;
                }
                chunk.append(&mut line);
                in_chunk += 1;
            }
            if !self.write(&mut chunk, &mut in_chunk) {
                return;
            }
            self.say_dropped(false);
        }
    }

    /// Writes these lines, however long that takes, and takes them out; false if it is not to be waited for any more.
    fn write(&mut self, chunk: &mut Vec<u8>, lines: &mut usize) -> bool {
        let mut rest = chunk.as_slice();
        while !rest.is_empty() {
            match self.write_some(rest) {
                Ok(count) => {
                    rest = &rest[count..];
                    if std::mem::take(&mut self.in_trouble) {
                        tracing::info!(log = self.name, "the access log is written again");
                    }
                }
                Err(_) if self.queue.is_over() => return false,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.in_trouble, true) {
                        tracing::warn!(
                            log = self.name,
                            "cannot write the access log: {}; its lines wait, and are dropped when there are too many",
                            io::Error::from(error)
                        );
                    }
                    self.queue.pause(RETRY);
                }
            }
        }
        chunk.clear();
        self.queue.done(std::mem::take(lines));
        true
    }

    /// Waits a moment for room, and writes what there is room for. A blocking pipe with room does not block for a chunk.
    fn write_some(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(&TICK))? {
            0 => Err(Errno::AGAIN),
            _ => rustix::io::write(&self.file, bytes),
        }
    }

    /// Speaks of lines that were dropped, if there are more than before; not too often, unless it is the last time.
    fn say_dropped(&mut self, at_last: bool) {
        let dropped = self.queue.dropped();
        let long_ago = self.said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if dropped > self.said && (long_ago || at_last) {
            tracing::warn!(
                log = self.name,
                lines = dropped - self.said,
                "lines of the access log were dropped"
            );
            (self.said, self.said_at) = (dropped, Some(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests;
