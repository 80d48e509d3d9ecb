//! How long to wait before a command is started again: twice as long after each failure, at most 10 s.

use std::time::Duration;

use serde::{Deserialize, Serialize};

const LONGEST: Duration = Duration::from_secs(10);

/// A command that was well for this long has not failed in quick succession.
pub(crate) const WELL: Duration = Duration::from_secs(10);

/// Failures in quick succession.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Another failure, after it was well for `well`. How long to wait, `first` for the first; `None`: it was the last of `tries`
    /// (0: never).
    pub(crate) fn failed(&mut self, well: Duration, tries: u32, first: Duration) -> Option<Duration> {
        if well >= WELL {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        if tries > 0 && self.failures >= tries {
            return None;
        }
        Some(first.saturating_mul(1 << (self.failures - 1).min(16)).min(LONGEST))
    }

    pub(crate) fn failures(self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);

    #[test]
    fn waits_double_up_to_ten_seconds_and_begin_again_after_it_was_well() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> =
            (0..9).map(|_| backoff.failed(Duration::ZERO, 0, FIRST).unwrap().as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(backoff.failed(WELL, 0, FIRST), Some(FIRST));
        assert_eq!(backoff.failures(), 1);
    }

    #[test]
    fn the_last_try_is_the_last() {
        let mut backoff = Backoff::default();
        assert!((1..10).all(|_| backoff.failed(Duration::ZERO, 10, FIRST).is_some()));
        assert_eq!(backoff.failed(Duration::ZERO, 10, FIRST), None);
        assert_eq!(Backoff::default().failed(Duration::ZERO, 1, FIRST), None);
        let zero = Duration::ZERO;
        assert_eq!(Backoff { failures: 30 }.failed(zero, 0, zero), Some(zero));
    }
}
