//! Why a takeover did not happen: the step at which it ended, and the cause.

use std::fmt;
use std::time::Duration;

/// A step of the takeover, named after the message that completes it.
///
/// ```
/// use heirloom::protocol::Step;
///
/// assert!(Step::Offer < Step::Freeze, "an offer that fails has frozen nothing");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// The successor asks, the incumbent checks who asks and for what.
    Hello,
    /// Base manifest and descriptors travel while the incumbent serves.
    Offer,
    /// The successor prepares itself on what was offered.
    Ready,
    /// The incumbent stops touching the descriptors and sends the delta.
    Freeze,
    /// The successor decodes everything.
    Accept,
    /// The incumbent gives up the service lock.
    Released,
    /// The successor takes the lock and commits.
    Taken,
    /// The incumbent becomes the new program in place; there is nobody to tell.
    Exec,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Hello => "hello",
            Step::Offer => "offer",
            Step::Ready => "ready",
            Step::Freeze => "freeze",
            Step::Accept => "accept",
            Step::Released => "released",
            Step::Taken => "taken",
            Step::Exec => "exec",
        })
    }
}

/// What ended a takeover.
///
/// ```
/// use heirloom::protocol::Cause;
/// use std::time::Duration;
///
/// let cause = Cause::Timeout(Duration::from_secs(2));
/// assert_eq!(cause.to_string(), "the other side did not answer within 2s");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The other side did not answer within this time.
    Timeout(Duration),
    /// The other side withdrew and said why.
    Withdrawn(String),
    /// The other side closed the channel.
    Closed,
    /// The other process has exited.
    Exited,
    /// The other side sent something that is not allowed here, or is no message at all.
    Nonsense(String),
    /// Our own side could not go on.
    Local(String),
    /// Another process holds the service lock.
    LockHeld,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Timeout(limit) => write!(f, "the other side did not answer within {limit:?}"),
            Cause::Withdrawn(why) => write!(f, "the other side withdrew: {why}"),
            Cause::Closed => f.write_str("the other side closed the channel"),
            Cause::Exited => f.write_str("the other process exited"),
            Cause::Nonsense(what) => write!(f, "the other side broke the protocol: {what}"),
            Cause::Local(why) => f.write_str(why),
            Cause::LockHeld => f.write_str("another process holds the service lock"),
        }
    }
}

/// Where and why a takeover ended without success.
///
/// ```
/// use heirloom::protocol::{Cause, Reason, Step};
///
/// let reason = Reason { step: Step::Accept, cause: Cause::Exited };
/// assert_eq!(reason.to_string(), "at step accept: the other process exited");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reason {
    /// The step that was not completed.
    pub step: Step,
    /// What went wrong.
    pub cause: Cause,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at step {}: {}", self.step, self.cause)
    }
}

impl std::error::Error for Reason {}
