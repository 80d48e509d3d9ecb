//! How long each side waits for the other, in one place.

use std::time::Duration;

/// The time limits of a takeover. Each side has its own; they need not agree.
///
/// The first two pass while the incumbent serves; they cost clients nothing. From the freeze on, clients wait: the
/// longest pause that a dead or stopped successor can cause is `accept + taken + fence + relock`, unless
/// [`Fencing`](super::Fencing) lets it last.
///
/// ```
/// use heirloom::protocol::Times;
/// use std::time::Duration;
///
/// let patient = Times { ready: Duration::from_secs(300), ..Times::default() };
/// assert_eq!(patient.accept, Duration::from_secs(2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Times {
    /// The next message of an offer, or the next credit for it. 10 s.
    pub offer: Duration,
    /// For the incumbent: from the end of the offer to `Ready`. For the successor: from `Ready` to `Freeze`. 30 s.
    pub ready: Duration,
    /// From `Freeze` to `Accept`, at the incumbent. 2 s.
    pub accept: Duration,
    /// From `Released` to `Taken`, at the incumbent. 2 s.
    pub taken: Duration,
    /// From `Accept` to the lock taken, at the successor. Longer than the incumbent's `accept` and `taken`. 10 s.
    pub released: Duration,
    /// How long a successor that may hold the lock may linger after an abort before it is killed, or whatever
    /// [`Fencing`](super::Fencing) says. 1 s.
    pub fence: Duration,
    /// How long an incumbent tries to take the lock again, once the successor is gone, before it concludes that a
    /// third process serves. 1 s.
    pub relock: Duration,
    /// From the start of a program that an upgrade starts to its answer to the preflight, and to its request for a
    /// takeover. 10 s each.
    pub start: Duration,
    /// How long each side looks for the other's answer before it sleeps, once everything is frozen, on a machine that has a
    /// processor to spare: one that sleeps takes longer to wake up than a pause would otherwise last. Zero: not at all.
    /// 200 µs.
    pub look: Duration,
    /// The pause between two attempts at a lock that is held: flock(2) has no time limit of its own. 2 ms.
    pub retry: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Times {
            offer: Duration::from_secs(10),
            ready: Duration::from_secs(30),
            accept: Duration::from_secs(2),
            taken: Duration::from_secs(2),
            released: Duration::from_secs(10),
            fence: Duration::from_secs(1),
            relock: Duration::from_secs(1),
            start: Duration::from_secs(10),
            look: Duration::from_micros(200),
            retry: Duration::from_millis(2),
        }
    }
}
