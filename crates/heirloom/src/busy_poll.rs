//! Busy polling: looking whether the other process has answered before sleeping until it has.
//!
//! A processor that has gone to sleep takes its time to wake up: in a virtual machine some fifty microseconds, three times in
//! each pause, which is more than all that is done in it. While everything is frozen and the answer is near, each side
//! therefore looks for it for as long as [`Times::look`](crate::protocol::Times::look), and gives way to other processes
//! between two looks.
//!
//! What it promises: a machine that has other things to do is left to them. Nothing is looked for where more is runnable than
//! there are processors, since whoever gives way there comes back milliseconds later; and when giving way has taken long
//! once, that was the last time.

use std::thread::{available_parallelism, yield_now};
use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// After giving way for so long somebody else has had the processor.
const LONG: Duration = Duration::from_micros(100);

#[derive(Debug)]
pub(crate) struct BusyPoll {
    look: Duration,
    idle: bool,
}

impl BusyPoll {
    /// Looks for so long each time, once [`BusyPoll::check_load`] has found that it may.
    pub(crate) fn new(look: Duration) -> BusyPoll {
        BusyPoll { look, idle: false }
    }

    /// Finds out whether there is a processor for everything that is runnable at the moment.
    pub(crate) fn check_load(&mut self) {
        if self.look.is_zero() {
            return;
        }
        let runnable = std::fs::read_to_string("/proc/loadavg").ok().and_then(|line| runnable(&line));
        let processors = available_parallelism().map_or(1, usize::from);
        self.idle = runnable.is_some_and(|runnable| runnable <= processors);
    }

    /// Waits by `wait`, which takes a time limit and says how much was found: looks first, if it may, and then sleeps.
    pub(crate) fn wait<E>(
        &mut self,
        limit: Option<&Timespec>,
        mut wait: impl FnMut(Option<&Timespec>) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let began = Instant::now();
        let mut now = began;
        while self.idle && now - began < self.look {
            match wait(Some(&Timespec::default())) {
                Ok(0) => {}
                found => return found,
            }
            yield_now();
            let before = std::mem::replace(&mut now, Instant::now());
            self.idle = now - before <= LONG;
        }
        wait(limit)
    }
}

/// How many processes and threads run or could run, of a line of `/proc/loadavg` (proc_loadavg(5)).
fn runnable(line: &str) -> Option<usize> {
    line.split(' ').nth(3)?.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fourth_field_says_what_is_runnable() {
        assert_eq!(runnable("0.20 0.18 0.12 1/80 11206\n"), Some(1));
        assert_eq!(runnable("0.20 0.18 0.12\n"), None);
        assert_eq!(runnable(""), None);
        let line = std::fs::read_to_string("/proc/loadavg").unwrap();
        assert!(runnable(&line).is_some(), "{line:?}");
    }

    const LONGEST: Duration = Duration::from_secs(3600);
    const SLEEP: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

    /// Whether it slept, when the look of this number finds something, or none does.
    fn sleeps(poll: &mut BusyPoll, finds: usize, look: Duration) -> bool {
        let (mut looks, mut slept) = (0, false);
        let found = poll.wait(Some(&SLEEP), |limit| {
            slept = limit == Some(&SLEEP);
            std::thread::sleep(look);
            looks += 1;
            Ok::<_, ()>(usize::from(slept || looks == finds))
        });
        assert_eq!(found, Ok(1));
        slept
    }

    #[test]
    fn it_sleeps_when_nothing_was_found_in_time() {
        // On a busy machine giving way may take long, which ends the looking: then once more.
        while sleeps(&mut BusyPoll { look: LONGEST, idle: true }, 3, Duration::ZERO) {}
        assert!(sleeps(&mut BusyPoll { look: Duration::from_nanos(1), idle: true }, 0, LONG / 2));
    }

    #[test]
    fn it_does_not_look_unless_the_machine_was_found_idle() {
        assert!(sleeps(&mut BusyPoll::new(LONGEST), 1, Duration::ZERO));
        let mut off = BusyPoll::new(Duration::ZERO);
        off.check_load();
        assert!(sleeps(&mut off, 1, Duration::ZERO));
    }

    #[test]
    fn giving_way_for_long_is_done_once() {
        let mut poll = BusyPoll { look: LONGEST, idle: true };
        assert!(sleeps(&mut poll, 0, 2 * LONG));
        assert!(!poll.idle);
    }

    #[test]
    fn an_error_is_found_too() {
        for idle in [true, false] {
            assert_eq!(BusyPoll { look: LONGEST, idle }.wait(None, |_| Err("no")), Err("no"));
        }
    }
}
