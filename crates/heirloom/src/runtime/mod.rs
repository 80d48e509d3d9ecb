//! Adapters to the ways in which programs wait: threads that block, and mio.
//!
//! An [`Incumbent`](crate::Incumbent) is a descriptor and a deadline, so that any other event loop drives it too.

pub mod blocking;
#[cfg(feature = "mio")]
pub mod mio;
