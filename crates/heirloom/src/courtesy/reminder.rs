//! Reminds the kernel of those who wait while a program starts, which takes more than a millisecond and knows no steps.
//!
//! Linux looks who is next on a processor when somebody becomes ready there, and at each tick (4 ms at 250 Hz). Who had a little
//! more than its share by then is passed over, and waits for the next look, even behind a program of which it is soon ahead again. A
//! thread on each processor that becomes ready every 100 µs, and has nothing to do, is a reason to look. It takes some 5 µs each
//! time, and no privileges.

use std::io;
use std::num::NonZero;
use std::thread;
use std::time::Duration;

use heirloom_sys::{SignalMask, set_time_slice, time_slice};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity, set_current_timer_slack};

use super::IN_STEPS;

const EVERY: Duration = Duration::from_micros(100);
/// Where there are more of them, who becomes ready finds one that is idle.
const MOST_PROCESSORS: u32 = 4;
const STACK: usize = 64 * 1024;

/// Reminds it so many times of those who wait for a processor on which this thread may run. It is no error if that cannot be.
pub(crate) fn remind(times: u32) {
    if let Err(error) = try_to_remind(times) {
        tracing::debug!(%error, "others may wait longer than they had to");
    }
}

fn try_to_remind(times: u32) -> io::Result<()> {
    let processors = sched_getaffinity(None)?;
    // Without time slices (before Linux 6.12) nobody would go before the program.
    if processors.count() > MOST_PROCESSORS || time_slice()?.unwrap_or_default().is_zero() {
        return Ok(());
    }
    // These are for whoever serves.
    let mask = SignalMask::block_all()?;
    let started =
        (0..CpuSet::MAX_CPU).filter(|&processor| processors.is_set(processor)).try_for_each(|processor| {
            let reminder = move || become_ready(processor, times);
            thread::Builder::new().name("reminder".into()).stack_size(STACK).spawn(reminder).map(drop)
        });
    mask.set()?;
    started
}

/// Becomes ready so many times, on this processor alone.
fn become_ready(processor: usize, times: u32) {
    let mut only = CpuSet::new();
    only.set(processor);
    let prepared = sched_setaffinity(None, &only)
        .and_then(|()| set_current_timer_slack(NonZero::new(1)))
        .map_err(Into::into)
        .and_then(|()| set_time_slice(IN_STEPS));
    if prepared.is_ok() {
        (0..times).for_each(|_| thread::sleep(EVERY));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn reminders() -> usize {
        let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm"));
        threads.filter_map(|thread| name(thread).ok()).filter(|name| name == "reminder\n").count()
    }

    #[test]
    fn there_is_one_for_each_processor_as_long_as_it_takes() {
        let give_up = Instant::now() + Duration::from_secs(60);
        let processors = sched_getaffinity(None).unwrap().count();
        let there_are = processors <= MOST_PROCESSORS && !time_slice().unwrap().unwrap().is_zero();
        // Until they have been seen.
        remind(100_000);
        while there_are && reminders() < processors as usize {
            assert!(Instant::now() < give_up, "{} of {processors}", reminders());
            thread::yield_now();
        }
        assert_eq!(reminders() > 0, there_are);
    }
}
