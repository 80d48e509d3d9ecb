//! What is there when nothing is said.

use std::time::Duration;

/// How long one backend may take to accept a connection.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How many further backends are tried, as far as there are others.
pub(super) const RETRIES: u32 = 2;
/// After how long a silence a peer is probed.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(60);
/// Whether small segments are sent at once.
pub(super) const NODELAY: bool = true;
/// How many connections wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
pub(super) const BACKLOG: u32 = 4096;
/// Whether event loops stay on a processor.
pub(super) const PIN_THREADS: bool = false;
