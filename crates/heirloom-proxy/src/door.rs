//! A listener as a loop serves it: who waits is accepted while there is room, and else waits in the kernel.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::{io, mem};

use heirloom::Kind;
use heirloom_sys::accept_queue;
use mio::Registry;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::clock::Time;
use crate::id::{Key, token};

/// How many are accepted in a turn.
pub(crate) const AT_ONCE: usize = 64;
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) key: Key,
    pub(crate) listener: usize,
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) kind: Kind,
    /// Of all loops, this is the one that hands it over, and is alone with it then.
    pub(crate) home: bool,
    watch: Watch,
    /// Somebody may wait.
    pub(crate) ready: bool,
    /// When to try again.
    pub(crate) resting: Option<Time>,
}

/// How the poller of a loop tells of those who come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    Not,
    /// One of the loops that wait is told, as a rule (`EPOLLEXCLUSIVE`, `epoll_ctl(2)`).
    Shared,
    /// This loop is told, and whoever else waits: a process that has the listener, too, would not hear of somebody of whom a loop
    /// of this one was told as one of many.
    Alone,
}

/// Who waits at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    /// At least so many; of others the poller tells.
    Counted(usize),
    /// At least one. Of others nothing is known.
    Somebody,
}

impl Queue {
    /// When one was accepted. `None`: it is to be asked for again.
    pub(crate) fn without_one(self) -> Option<Queue> {
        match self {
            Queue::Counted(count) => Some(Queue::Counted(count.saturating_sub(1))),
            Queue::Somebody => None,
        }
    }
}

impl Door {
    pub(crate) fn new(key: Key, listener: usize, socket: OwnedFd, kind: Kind) -> Door {
        let (socket, watch) = (Arc::new(socket), Watch::Not);
        Door { key, listener, socket, kind, home: true, watch, ready: true, resting: None }
    }

    /// The same listener for another loop.
    pub(crate) fn for_another(&self) -> Door {
        Door { socket: Arc::clone(&self.socket), home: false, watch: Watch::Not, resting: None, ..*self }
    }

    /// Has a poller tell of it in this way from now on. Of those who wait by then, it tells at once.
    pub(crate) fn watch(&mut self, registry: &Registry, watch: Watch) -> io::Result<()> {
        let before = mem::replace(&mut self.watch, watch);
        if before == watch {
            return Ok(());
        }
        if before != Watch::Not {
            let _ = epoll::delete(registry, &self.socket);
        }
        let how = match watch {
            Watch::Not => return Ok(()),
            Watch::Shared => EventFlags::EXCLUSIVE,
            Watch::Alone => EventFlags::empty(),
        };
        // As mio does it, which knows nothing of this flag: edge-triggered, and the token is all of the data.
        let data = EventData::new_u64(token(self.key.first()).0 as u64);
        Ok(epoll::add(registry, &self.socket, data, how | EventFlags::IN | EventFlags::ET)?)
    }

    /// Who waits now. To find by accept(2) that nobody does costs as much as a tenth of a short connection.
    pub(crate) fn queue(&self) -> Queue {
        let known = match self.kind {
            Kind::TcpListener => accept_queue(&self.socket).map(Queue::Counted),
            _ => is_readable(&self.socket)
                .map(|readable| if readable { Queue::Somebody } else { Queue::Counted(0) }),
        };
        // If nobody does, accept(2) tells of it.
        known.unwrap_or(Queue::Somebody)
    }

    /// Whether to try to accept.
    pub(crate) fn wants_turn(&mut self, now: Time) -> bool {
        self.resting.take_if(|at| *at <= now);
        self.ready && self.resting.is_none()
    }
}

fn is_readable(socket: impl AsFd) -> io::Result<bool> {
    Ok(poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&Timespec::default()))? > 0)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use mio::{Events, Poll};

    use super::*;

    /// How often a poller tells of the door, without waiting for it.
    fn told(poll: &mut Poll, door: &Door) -> usize {
        let mut events = Events::with_capacity(8);
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| {
            assert_eq!(event.token(), token(door.key.first()));
            assert!(event.is_readable());
        });
        events.iter().count()
    }

    #[test]
    fn whoever_comes_is_told_of_once_by_those_that_watch() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let key = Key::of(heirloom::ItemId(u64::MAX - 3));
        let mut home = Door::new(key, 0, listener.into(), Kind::TcpListener);
        let mut other = home.for_another();
        let [mut one, mut two] = [(); 2].map(|()| Poll::new().unwrap());
        let come = || TcpStream::connect(at).unwrap();
        let _first = come();
        assert_eq!((told(&mut one, &home), home.queue()), (0, Queue::Counted(1)));
        home.watch(one.registry(), Watch::Shared).unwrap();
        other.watch(two.registry(), Watch::Shared).unwrap();
        // Nobody waits in them, so that both are told.
        assert_eq!((told(&mut one, &home), told(&mut two, &other)), (1, 1));
        assert_eq!((told(&mut one, &home), told(&mut two, &other)), (0, 0));
        let _second = come();
        assert_eq!((told(&mut one, &home), told(&mut two, &other)), (1, 1));
        other.watch(two.registry(), Watch::Not).unwrap();
        home.watch(one.registry(), Watch::Alone).unwrap();
        assert_eq!((told(&mut one, &home), home.queue()), (1, Queue::Counted(2)));
        let _third = come();
        assert_eq!((told(&mut one, &home), told(&mut two, &other)), (1, 0));
        other.watch(two.registry(), Watch::Shared).unwrap();
        assert_eq!(told(&mut two, &other), 1);
    }
}
