//! What programs say to their supervisor, as sd_notify(3) has it.
//!
//! [`message`] reads a datagram, [`socket`] is where they arrive, and [`sender`] says whose count.

pub(crate) mod message;
pub(crate) mod sender;
pub(crate) mod socket;
