//! The connection of one client.
//!
//! The socket is never waited for: what does not go at once is tried again when the poller tells of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use heirloom::ItemId;
use heirloom::runtime::mio::{deregister, register, reregister};
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use rustix::net::{RecvFlags, connect_unspec, recv, sockopt};

use super::client;
use super::event::Counted;
use super::outbox::Outbox;

/// A socket, and what is known of it.
#[derive(Debug)]
pub(super) struct Connection {
    socket: TcpStream,
    /// The kernel takes no more for now; the poller tells when it does.
    blocked: bool,
    /// Whether the poller has been asked to tell that.
    asked: bool,
}

impl Connection {
    /// The socket is to be non-blocking.
    pub(super) fn new(socket: TcpStream) -> Connection {
        Connection { socket, blocked: false, asked: false }
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Asks the poller to tell when there is something to read.
    pub(super) fn register(&self, registry: &Registry, id: ItemId) -> io::Result<()> {
        register(registry, self.socket.as_fd(), token(id), Interest::READABLE)
    }

    /// Reads once.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.socket).read(buffer)
    }

    /// Reads once, and leaves it there.
    pub(super) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.peek(buffer)
    }

    /// Drops what was [peeked](Connection::peek) at, all of it. (The kernel does so without a copy.)
    pub(super) fn discard(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut dropped = 0;
        while dropped < buffer.len() {
            match recv(&self.socket, &mut buffer[dropped..], RecvFlags::TRUNC) {
                Ok((_, 0)) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok((_, count)) => dropped += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes the kernel count what is read as it is read, and tells what it has counted. See
    /// [`TcpCounters`](heirloom_sys::TcpCounters).
    pub(super) fn count(&self) -> io::Result<Counted> {
        sockopt::set_socket_oobinline(&self.socket, true)?;
        client::counted(&self.socket)
    }

    /// The error that has ended the connection, if nobody has heard of it yet.
    pub(super) fn take_error(&self) -> Option<Errno> {
        self.socket.take_error().ok().flatten().as_ref().and_then(Errno::from_io_error)
    }

    /// Reads what has come by now, and drops it: a connection that is closed with something unread is reset, and the
    /// client might lose what it was sent last.
    pub(super) fn drain(&self, buffer: &mut [u8]) {
        // A client that sends all the time does not hold up the end for ever.
        let mut reads = 0..64;
        while reads.next().is_some() && matches!((&self.socket).read(buffer), Ok(1..)) {}
    }

    /// Sends some of an outbox, if the kernel takes it. How much that was; nothing when it takes no more for now.
    pub(super) fn send(&mut self, outbox: &Outbox) -> io::Result<usize> {
        while !self.blocked && !outbox.is_empty() {
            match (&self.socket).write_vectored(&outbox.front()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.blocked = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => {
                    #[cfg(test)]
                    super::killed::step();
                    return sent;
                }
            }
        }
        Ok(0)
    }

    /// Asks the poller to tell when a full socket takes more.
    pub(super) fn ask(&mut self, registry: &Registry, id: ItemId) -> io::Result<()> {
        if self.blocked && !self.asked {
            reregister(registry, self.socket.as_fd(), token(id), Interest::READABLE | Interest::WRITABLE)?;
            self.asked = true;
        }
        Ok(())
    }

    /// The socket takes more, or may do so.
    pub(super) fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Ends the connection: the client reads to the end of what was sent, and there is an end-of-file.
    ///
    /// Somebody else may hold a duplicate, which a mere close would leave open.
    pub(super) fn end(self, registry: &Registry) {
        let _ = deregister(registry, self.socket.as_fd());
        end(&self.socket);
    }

    /// Ends the connection in the middle: the client gets an error, so that it does not take what it has for everything.
    pub(super) fn reset(self, registry: &Registry) {
        let _ = deregister(registry, self.socket.as_fd());
        reset(&self.socket);
    }
}

/// Ends a connection, whoever holds a duplicate.
pub(super) fn end(socket: &TcpStream) {
    // It fails where the client has reset the connection: that one has ended as it is.
    let _ = socket.shutdown(Shutdown::Both);
}

/// Resets a connection.
///
/// Disconnecting does that, whoever holds a duplicate (tcp_disconnect in the kernel). SO_LINGER would only act at the close of
/// the last one.
pub(super) fn reset(socket: &TcpStream) {
    let _ = connect_unspec(socket);
}

/// The token of an item is its id.
pub(super) fn token(id: ItemId) -> Token {
    Token(id.0 as usize)
}
