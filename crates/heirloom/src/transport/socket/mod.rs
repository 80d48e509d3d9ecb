//! The socket transport: descriptors travel by SCM_RIGHTS, manifests in sealed memfds, over a private SEQPACKET
//! channel that the control socket hands out.
//!
//! [`Incumbent`] is the serving side: it owns the control socket and the service lock and drives at most one
//! takeover at a time. [`Successor`] is the other side. Between them stand the state machines of
//! [`crate::protocol`]; this module carries out what they ask.

mod admission;
mod asked;
mod connection;
mod incumbent;
mod older;
mod start;
mod successor;
mod takeover;
mod turn;
mod upgrade;

pub use asked::Asked;
pub use connection::ConnectionId;
pub use incumbent::Incumbent;
pub use older::OlderIncumbent;
pub use start::{Replace, Start, StartError, start};
pub use successor::{Complete, Offered, Successor, Taken, TakeoverError};
pub use turn::{Batch, Freeze, HandoverError, Offer, Outcome, TakenBy, Turn};
