//! What the talker says: the numbers from 1 on, a line each, as fast as the others can hear them.

use std::io::Write;
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::process::wait_until;

/// How many lines are said at a time.
const CHUNK: u64 = 500;
/// How many lines the talker may be ahead of the slowest who hears it.
const AHEAD: u64 = 20_000;
/// How soon a talker that is too far ahead looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A speech that goes on until it is [ended](Speech::end), or dropped.
pub(super) struct Speech {
    stop: Arc<AtomicBool>,
    /// At least so many lines, unless it is dropped.
    thread: Option<JoinHandle<std::io::Result<u64>>>,
}

impl Speech {
    pub(super) fn begin(into: ChildStdin, at_least: u64, heard: [Arc<AtomicU64>; 2]) -> Speech {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || speak(into, at_least, &heard, &stopped));
        Speech { stop, thread: Some(thread) }
    }

    /// Ends the speech when enough was said, and tells how many lines that were. Calls `meanwhile` while it waits.
    pub(super) fn end(mut self, meanwhile: impl Fn()) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("it ends once")?;
        wait_until("the end of the speech", || {
            meanwhile();
            Ok(thread.is_finished())
        })?;
        let said = thread.join().map_err(|_| anyhow!("the talker's voice broke"))?;
        said.context("the talker does not read its stdin")
    }
}

fn speak(
    mut into: ChildStdin,
    at_least: u64,
    heard: &[Arc<AtomicU64>],
    stop: &AtomicBool,
) -> std::io::Result<u64> {
    let mut said = 0;
    let mut chunk = Vec::new();
    while said < at_least || !stop.load(Ordering::SeqCst) {
        let slowest = heard.iter().map(|heard| heard.load(Ordering::SeqCst)).min().unwrap_or(said);
        if said > slowest + AHEAD {
            std::thread::sleep(LOOK_AGAIN);
            continue;
        }
        chunk.clear();
        for number in said + 1..=said + CHUNK {
            writeln!(chunk, "{number}")?;
        }
        into.write_all(&chunk)?;
        said += CHUNK;
    }
    Ok(said)
}
