//! How much is passed on a second, at the moment: reckoned from samples that are handed over, so that a handover is not seen in it.

use std::time::Duration;

use crate::clock::{Time, nanoseconds};
use crate::handover::{Sample, TrafficState};

/// How often a sample is taken.
pub(crate) const EVERY: Duration = Duration::from_secs(5);
/// How many are kept: the rates are those of the last 5 to 15 seconds.
const KEPT: usize = 3;

#[derive(Clone, Debug, Default)]
pub(crate) struct Rates {
    samples: Vec<Sample>,
}

impl Rates {
    pub(crate) fn from(samples: Vec<Sample>) -> Rates {
        Rates { samples }
    }

    pub(crate) fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// When the next sample is due.
    pub(crate) fn next(&self) -> Time {
        self.samples.last().map_or(0, |last| last.at.saturating_add(nanoseconds(EVERY)))
    }

    pub(crate) fn take(&mut self, at: Time, traffic: TrafficState) {
        if at < self.next() {
            return;
        }
        if self.samples.len() >= KEPT {
            self.samples.remove(0);
        }
        self.samples.push(Sample { at, traffic });
    }

    /// Connections a second, and bytes a second from clients and to them.
    pub(crate) fn now(&self, at: Time, traffic: TrafficState) -> (f64, f64, f64) {
        let Some(first) = self.samples.first().filter(|first| first.at < at) else { return (0.0, 0.0, 0.0) };
        let seconds = (at - first.at) as f64 / 1e9;
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        let then = first.traffic;
        (
            rate(traffic.connections, then.connections),
            rate(traffic.up, then.up),
            rate(traffic.down, then.down),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_last_seconds() {
        let second = nanoseconds(Duration::from_secs(1));
        let traffic =
            |bytes| TrafficState { connections: bytes / 100, up: bytes, down: 2 * bytes, failed: 0 };
        let mut rates = Rates::default();
        assert_eq!(rates.now(second, traffic(7)), (0.0, 0.0, 0.0));
        for n in 1..100 {
            // More often than they are kept, and faster from a moment on.
            rates.take(n * second, traffic(if n < 50 { n * 1000 } else { 50_000 + (n - 50) * 3000 }));
        }
        assert_eq!(rates.samples().len(), KEPT);
        assert_eq!(rates.now(100 * second, traffic(200_000)), (30.0, 3000.0, 6000.0));
    }
}
