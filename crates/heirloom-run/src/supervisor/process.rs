//! A process of the command that is looked after.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Moment;

/// The main process, or one that is to become it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) started: Moment,
    /// Since when it says that it is ready.
    pub(crate) ready: Option<Moment>,
    pub(crate) reloading: bool,
    pub(crate) stopping: bool,
    /// How often it has to say that it is alive.
    pub(crate) watchdog: Option<Duration>,
    /// Its last sign of life; none before its first.
    pub(crate) alive: Option<Moment>,
}

impl Process {
    pub(crate) fn new(pid: u32, now: Moment, watchdog: Option<Duration>) -> Process {
        Process { pid, started: now, ready: None, reloading: false, stopping: false, watchdog, alive: None }
    }

    /// By when it must have said that it is alive. Before it has said anything it has `start` in any case.
    pub(crate) fn watchdog_at(&self, start: Duration) -> Option<Moment> {
        let every = self.watchdog?;
        Some(match self.alive.max(self.ready) {
            Some(alive) => alive.after(every),
            None => self.started.after(every.max(start)),
        })
    }

    /// For how long it has been well: ready, if it is one that says so.
    pub(crate) fn well(&self, says_ready: bool, now: Moment) -> Duration {
        match self.ready {
            Some(ready) => now.since(ready),
            None if says_ready => Duration::ZERO,
            None => now.since(self.started),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_waits_for_the_first_sign() {
        let (start, second) = (Moment::now(), Duration::from_secs(1));
        let mut process = Process::new(7, start, Some(second));
        assert_eq!(process.watchdog_at(second * 30), Some(start.after(second * 30)));
        process.ready = Some(start.after(second * 2));
        assert_eq!(process.watchdog_at(second * 30), Some(start.after(second * 3)));
        process.alive = Some(start.after(second * 5));
        assert_eq!(process.watchdog_at(second * 30), Some(start.after(second * 6)));
        process.watchdog = None;
        assert_eq!(process.watchdog_at(second), None);
    }
}
