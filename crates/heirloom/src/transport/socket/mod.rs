//! The socket transport: descriptors travel by SCM_RIGHTS, manifests in sealed memfds, over a private SEQPACKET
//! channel that the control socket hands out.
//!
//! The incumbent's end of a takeover is driven by [`Incumbent`](crate::Incumbent), turn by turn; [`Successor`] is the other
//! end. Between them stand the state machines of [`crate::protocol`]; this module carries out what they ask.

mod arriving;
mod lent;
mod successor;
pub(crate) mod takeover;

pub use lent::Lent;
pub use successor::{Complete, Offered, Successor, Taken, TakeoverError};
