//! A listener as a loop serves it: who waits is accepted while there is room, and else waits in the kernel.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use heirloom::Kind;
use heirloom_sys::accept_queue;

use crate::clock::Time;
use crate::id::Key;

/// How many are accepted in a turn.
pub(crate) const AT_ONCE: usize = 64;
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) key: Key,
    pub(crate) listener: usize,
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) kind: Kind,
    /// Somebody may wait.
    pub(crate) ready: bool,
    /// When to try again.
    pub(crate) resting: Option<Time>,
}

/// How many wait at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    /// At least so many; of others the poller tells.
    Known(usize),
    /// Until none is left.
    Unknown,
}

impl Door {
    pub(crate) fn new(key: Key, listener: usize, socket: OwnedFd, kind: Kind) -> Door {
        Door { key, listener, socket: Arc::new(socket), kind, ready: true, resting: None }
    }

    /// Who waits now. To find by accept(2) that nobody does costs as much as a tenth of a short connection.
    pub(crate) fn queue(&self) -> Queue {
        match self.kind {
            Kind::TcpListener => accept_queue(&self.socket).map_or(Queue::Unknown, Queue::Known),
            _ => Queue::Unknown,
        }
    }

    /// Whether to try to accept.
    pub(crate) fn wants_turn(&mut self, now: Time) -> bool {
        self.resting.take_if(|at| *at <= now);
        self.ready && self.resting.is_none()
    }
}
