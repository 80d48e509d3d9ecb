//! The few system calls that Heirloom needs and `rustix` lacks, as safe functions.
//!
//! This is the only crate of the workspace with unsafe code; each block says why it is sound.

mod exec;
mod inherited;
mod mask;
mod option;
mod peer;
mod tcp;

pub use exec::execve;
pub use inherited::adopt;
pub use mask::SignalMask;
pub use peer::{Credentials, peer_credentials, peer_pidfd};
pub use tcp::{TcpCounters, never_sent, tcp_counters};
