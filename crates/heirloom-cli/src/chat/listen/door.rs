//! The listener, which takes a rest when there are no descriptors for those who connect.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use heirloom::runtime::mio::{deregister, register};
use mio::{Interest, Registry, Token};

/// How many are let in before those who are in have their turn.
const SHARE: usize = 64;
/// The rest after an accept that failed: what it needs is not there again at once.
const REST: Duration = Duration::from_millis(100);

/// Where clients come in.
pub(super) struct Door {
    listener: TcpListener,
    /// Somebody may be waiting of whom the poller does not tell again.
    ready: bool,
    rests_until: Option<Instant>,
    /// The last accept has failed, and it was said.
    failing: bool,
}

impl Door {
    /// The listener is to be non-blocking.
    pub(super) fn new(listener: TcpListener) -> Door {
        Door { listener, ready: false, rests_until: None, failing: false }
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub(super) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        register(registry, self.listener.as_fd(), token, Interest::READABLE)
    }

    /// Lets nobody in any more. Who has connected and was not let in learns it when the process ends.
    pub(super) fn close(&mut self, registry: &Registry) {
        let _ = deregister(registry, self.listener.as_fd());
        (self.ready, self.rests_until) = (false, None);
    }

    /// Somebody is waiting.
    pub(super) fn knock(&mut self) {
        // While it rests, it is known that somebody does.
        self.ready = self.rests_until.is_none();
    }

    /// Whether somebody may be let in at once.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// When to try again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.rests_until
    }

    /// Lets some of those in who wait, with sockets that do not block.
    pub(super) fn accept(&mut self, now: Instant, mut enter: impl FnMut(TcpStream, String)) {
        if self.rests_until.take_if(|until| *until <= now).is_some() {
            self.ready = true;
        }
        for _ in 0..SHARE {
            if !self.ready {
                return;
            }
            match self.listener.accept().and_then(|(socket, address)| {
                socket.set_nonblocking(true)?;
                // It fails where the client has gone already, which is found out soon enough.
                let _ = socket.set_nodelay(true);
                Ok((socket, address))
            }) {
                Ok((socket, address)) => {
                    self.failing = false;
                    enter(socket, address.ip().to_canonical().to_string());
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.ready = false,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => {
                        if !std::mem::replace(&mut self.failing, true) {
                            tracing::warn!(%error, "cannot let anybody in; trying again every {REST:?}");
                        }
                        self.ready = false;
                        self.rests_until = Some(now + REST);
                    }
                },
            }
        }
    }
}
