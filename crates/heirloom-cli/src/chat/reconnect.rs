//! When to connect again, and when to give up. A pure policy: time is passed in, nothing is connected here.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// So many errors in quick succession end it.
pub(super) const MAX_ERRORS: u32 = 20;
/// No delay is longer than this.
const MAX_DELAY: Duration = Duration::from_millis(500);
/// A connection that lasted so long was a success.
const LASTING: Duration = Duration::from_secs(1);

/// The errors in quick succession so far. Travels with a takeover, all but the time of the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Reconnect {
    errors: u32,
    #[serde(skip)]
    connected_at: Option<Instant>,
}

/// There were too many errors in quick succession.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GaveUp {
    errors: u32,
    cause: String,
}

impl Reconnect {
    /// There is a connection. It is no success yet.
    pub(super) fn connected(&mut self, now: Instant) {
        self.connected_at = Some(now);
    }

    /// The connection has brought data: a success.
    pub(super) fn delivered(&mut self) {
        self.errors = 0;
    }

    /// An attempt failed, or the connection was lost, for this reason. Says how long to wait before the next attempt.
    pub(super) fn failed(&mut self, cause: &str, now: Instant) -> Result<Duration, GaveUp> {
        let connected_at = self.connected_at.take();
        if connected_at.is_some_and(|at| now.saturating_duration_since(at) >= LASTING) {
            self.errors = 0;
        }
        self.errors = self.errors.saturating_add(1);
        if self.errors < MAX_ERRORS {
            Ok(self.delay())
        } else {
            Err(GaveUp { errors: self.errors, cause: cause.to_owned() })
        }
    }

    /// How long to wait before an attempt: n³ milliseconds after the n-th error in quick succession, at most 500.
    pub(super) fn delay(&self) -> Duration {
        Duration::from_millis(u64::from(self.errors).saturating_pow(3)).min(MAX_DELAY)
    }
}

impl fmt::Display for GaveUp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "gave up after {} connection errors in quick succession, the last: {}; check that the server runs and \
             that its address is right",
            self.errors, self.cause
        )
    }
}

impl std::error::Error for GaveUp {}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn delays_grow_with_the_cube_up_to_half_a_second() {
        let (mut reconnect, now) = (Reconnect::default(), Instant::now());
        let delays: Vec<u128> =
            (0..10).map(|_| reconnect.failed("refused", now).unwrap().as_millis()).collect();
        assert_eq!(delays, [1, 8, 27, 64, 125, 216, 343, 500, 500, 500]);
    }

    #[test]
    fn the_twentieth_error_is_the_last() {
        let (mut reconnect, now) = (Reconnect::default(), Instant::now());
        for _ in 1..MAX_ERRORS {
            reconnect.failed("refused", now).unwrap();
        }
        let message = reconnect.failed("no route", now).unwrap_err().to_string();
        assert!(message.contains("20 connection errors"), "{message}");
        assert!(message.contains("no route"), "{message}");
    }

    #[test]
    fn a_short_connection_without_data_is_one_more_error() {
        let (mut reconnect, now) = (Reconnect::default(), Instant::now());
        reconnect.failed("refused", now).unwrap();
        reconnect.connected(now);
        assert_eq!(reconnect.failed("closed", now + 999 * MS).unwrap(), 8 * MS);
    }

    #[test]
    fn a_lasting_connection_and_one_with_data_are_successes() {
        let (mut reconnect, now) = (Reconnect::default(), Instant::now());
        for _ in 0..5 {
            reconnect.failed("refused", now).unwrap();
        }
        reconnect.connected(now);
        assert_eq!(reconnect.failed("closed", now + 1000 * MS).unwrap(), MS);

        reconnect.failed("refused", now).unwrap();
        reconnect.connected(now);
        reconnect.delivered();
        assert_eq!(reconnect.failed("closed", now).unwrap(), MS);
    }

    #[test]
    fn only_the_errors_travel() {
        let (mut reconnect, now) = (Reconnect::default(), Instant::now());
        reconnect.failed("refused", now).unwrap();
        reconnect.connected(now);
        let json = serde_json::to_string(&reconnect).unwrap();
        assert_eq!(json, r#"{"errors":1}"#);
        let mut other: Reconnect = serde_json::from_str(&json).unwrap();
        assert_eq!(other.failed("refused", now).unwrap(), 8 * MS);
        assert_eq!(serde_json::from_str::<Reconnect>("{}").unwrap(), Reconnect::default());
        // Whatever number another version sent, there is no overflow.
        let mut many: Reconnect = serde_json::from_str(r#"{"errors":4294967295}"#).unwrap();
        assert_eq!(many.delay(), MAX_DELAY);
        assert!(many.failed("refused", now).is_err());
    }
}
