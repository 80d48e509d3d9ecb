//! The time as the relay counts it: nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share. An `Instant` could
//! not be handed over.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// A moment, or with [`nanoseconds`] a span.
pub(crate) type Time = u64;

pub(crate) fn now() -> Time {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The time of day, for people.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

pub(crate) fn nanoseconds(span: Duration) -> Time {
    span.as_nanos().try_into().unwrap_or(Time::MAX / 2)
}
