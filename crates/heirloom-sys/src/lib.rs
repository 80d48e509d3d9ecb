//! The few system calls that Heirloom needs and `rustix` lacks, as safe functions.
//!
//! This is the only crate of the workspace with unsafe code; each block says why it is sound.

mod datagram;
mod exec;
mod inherited;
mod kcmp;
mod mask;
mod option;
mod peer;
mod signals;
mod spawn;
mod tcp;
mod time_slice;

pub use datagram::{Datagram, peek_datagram, receive_datagram, set_peek_offset};
pub use exec::execve;
pub use inherited::adopt;
pub use kcmp::compare_files;
pub use mask::SignalMask;
pub use peer::{Credentials, peer_credentials, peer_pidfd};
pub use signals::{Signal, SignalFd, send_signal, send_signal_to_all};
pub use spawn::{FIRST_PASSED, Spawn, SpawnFailure, SpawnStage, spawn, spawn_sibling};
pub use tcp::{TcpCounters, accept_queue, is_at_mark, never_sent, tcp_counters};
pub use time_slice::{set_time_slice, time_slice};
