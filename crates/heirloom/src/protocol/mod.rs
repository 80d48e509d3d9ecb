//! The takeover as two state machines without I/O.
//!
//! [`Incumbent`] and [`Successor`] hold every rule about who may serve and when. They open no socket and read no
//! clock: the driver of a transport feeds them messages, facts (the other end closed, the other process exited, the
//! lock was taken) and the time, and carries out the [actions](IncumbentAction) that they ask for, in order. The
//! same machines run behind the blocking and the mio front end and in the model checker (`tests/model.rs`).
//!
//! # The invariant
//!
//! At every instant at most one of the two processes touches the descriptors. The commit point is the successor's
//! successful send of [`ToIncumbent::Taken`]: before it, anything that goes wrong makes the incumbent resume; after
//! it, the successor serves. An incumbent that resumes first makes sure that no `Taken` can follow: it enqueues
//! [`ToSuccessor::Abort`], shuts its receiving side, and reads what is left.
//!
//! The states and what leads from one to the next are in `docs/protocol.md`, which a test compares with the machines.

mod fencing;
mod incumbent;
mod message;
mod reason;
mod successor;
mod times;

pub use fencing::Fencing;
pub use incumbent::{Incumbent, IncumbentAction, IncumbentOutcome};
pub use message::{MessageError, ToIncumbent, ToSuccessor};
pub use reason::{Cause, Reason, Step};
pub use successor::{Successor, SuccessorAction, SuccessorOutcome};
pub use times::Times;

/// The versions of the takeover's conversation that this library speaks.
pub const VERSIONS: crate::control::request::VersionRange =
    crate::control::request::VersionRange { min: 1, max: 1 };

/// How many batches of descriptors may be on their way without the successor having read them.
///
/// It bounds what waits unread in the channel, so that an `Abort` always fits behind it.
pub const WINDOW: u32 = 8;

/// How many descriptors travel in one batch at most.
pub const BATCH: usize = crate::channel::MAX_DESCRIPTORS;
