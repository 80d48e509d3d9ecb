//! One client: its connection, what it has begun to say, and what it is still to hear.
//!
//! The socket is never waited for: what does not go at once is tried again when the poller tells of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use heirloom::ItemId;
use heirloom::runtime::mio::{deregister, register, reregister};
use mio::{Interest, Registry, Token};
use rustix::net::connect_unspec;

use super::escape::escape;
use super::lines::Lines;
use super::outbox::Outbox;

/// Who is connected.
pub(super) struct Client {
    id: ItemId,
    socket: TcpStream,
    /// Where it comes from, as the others are told.
    address: String,
    lines: Lines,
    outbox: Outbox,
    /// The kernel takes no more for now; the poller tells when it does.
    blocked: bool,
    /// Whether the poller has been asked to tell that.
    asked: bool,
    /// Nothing can be sent to it any more. What it has sent can still be read.
    deaf: bool,
}

/// What one read has brought.
pub(super) enum Heard {
    /// Nothing for now: the poller tells when there is more.
    Nothing,
    /// So many bytes, and with them so many whole lines. `text` is what the others get.
    Said { bytes: usize, lines: u64, text: Vec<u8> },
    /// It says no more; the error if that is why.
    Ended(Option<io::Error>),
}

/// What became of a text for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offered {
    /// It is queued.
    Kept,
    /// There is too much in the queue already.
    TooSlow,
}

impl Client {
    /// A client that has said and heard nothing yet. Its socket is to be non-blocking.
    pub(super) fn new(id: ItemId, socket: TcpStream, address: String) -> Client {
        Client::resume(id, socket, address, Vec::new(), Vec::new())
    }

    /// A client that has begun a line, and is still to hear something.
    pub(super) fn resume(
        id: ItemId,
        socket: TcpStream,
        address: String,
        half_line: Vec<u8>,
        unsent: Vec<u8>,
    ) -> Client {
        Client {
            id,
            socket,
            address,
            lines: Lines::resume(half_line),
            outbox: Outbox::resume(unsent),
            blocked: false,
            asked: false,
            deaf: false,
        }
    }

    /// What it is called, by the others and among the items.
    pub(super) fn name(&self) -> String {
        name(self.id)
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What it has said of a line that has not ended.
    pub(super) fn half_line(&self) -> &[u8] {
        self.lines.half()
    }

    /// What it is still to hear.
    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Asks the poller to tell when there is something to read.
    pub(super) fn register(&self, registry: &Registry) -> io::Result<()> {
        register(registry, self.socket.as_fd(), token(self.id), Interest::READABLE)
    }

    /// Reads once.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Heard {
        match (&self.socket).read(buffer) {
            Ok(0) => Heard::Ended(None),
            Ok(bytes) => {
                let (mut text, mut count) = (Vec::with_capacity(bytes + 64), 0);
                self.lines.push(&buffer[..bytes], |line| {
                    count += 1;
                    spoken(self.id, line, &mut text);
                });
                Heard::Said { bytes, lines: count, text }
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock if self.deaf => Heard::Ended(None),
                ErrorKind::WouldBlock => Heard::Nothing,
                ErrorKind::Interrupted => Heard::Said { bytes: 0, lines: 0, text: Vec::new() },
                _ => Heard::Ended(Some(error)),
            },
        }
    }

    /// Reads what has come by now, and drops it: a connection that is closed with something unread is reset, and the
    /// client might lose what it was sent last.
    pub(super) fn drain(&mut self, buffer: &mut [u8]) {
        // A client that sends all the time does not hold up the end for ever.
        let mut reads = 0..64;
        while reads.next().is_some() && matches!((&self.socket).read(buffer), Ok(1..)) {}
    }

    /// What the others get of a line that has not ended, when it will not end any more. Nothing if there is none.
    pub(super) fn last_words(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        self.lines.finish(|line| spoken(self.id, line, &mut text));
        text
    }

    /// Queues a text, unless more than `backlog` bytes are queued already that cannot be sent at once.
    pub(super) fn offer(&mut self, text: &Arc<[u8]>, backlog: usize, sent: &mut u64) -> Offered {
        if self.outbox.len() > backlog && !self.deaf {
            // The poller may not have been asked for a while. An error shows at the next flush.
            self.blocked = false;
            let _ = self.flush(sent);
        }
        if self.outbox.len() > backlog {
            return Offered::TooSlow;
        }
        if !self.deaf {
            self.outbox.push(text);
        }
        Offered::Kept
    }

    /// Sends what the kernel takes.
    pub(super) fn flush(&mut self, sent: &mut u64) -> io::Result<()> {
        while !self.blocked && !self.outbox.is_empty() {
            match (&self.socket).write_vectored(&self.outbox.front()) {
                Ok(count) => {
                    self.outbox.consume(count);
                    *sent = sent.saturating_add(count as u64);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.blocked = true,
                    ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Asks the poller to tell when a full socket takes more.
    pub(super) fn ask(&mut self, registry: &Registry) -> io::Result<()> {
        if self.blocked && !self.asked {
            reregister(
                registry,
                self.socket.as_fd(),
                token(self.id),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            self.asked = true;
        }
        Ok(())
    }

    /// The poller has told that the socket takes more.
    pub(super) fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Nothing can be sent any more.
    pub(super) fn deafen(&mut self) {
        self.deaf = true;
        self.outbox = Outbox::default();
    }

    /// Ends the connection: the client reads to the end of what was sent, and there is an end-of-file.
    ///
    /// A process that is about to take over may hold a duplicate, which a mere close would leave open.
    pub(super) fn end(self, registry: &Registry) {
        let _ = deregister(registry, self.socket.as_fd());
        // It fails where the client has reset the connection: that one has ended as it is.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the connection in the middle: the client gets an error, so that it does not take what it has for everything.
    ///
    /// Disconnecting resets the connection itself, whoever holds a duplicate (tcp_disconnect in the kernel). SO_LINGER
    /// would only act at the close of the last one.
    pub(super) fn reset(self, registry: &Registry) {
        let _ = deregister(registry, self.socket.as_fd());
        let _ = connect_unspec(&self.socket);
    }
}

/// The name of the client with this id.
pub(super) fn name(id: ItemId) -> String {
    format!("user{id}")
}

/// The token of an item is its id.
pub(super) fn token(id: ItemId) -> Token {
    Token(id.0 as usize)
}

/// Appends a line as the others get it.
fn spoken(id: ItemId, line: &[u8], text: &mut Vec<u8>) {
    text.extend_from_slice(format!("<user{id}> ").as_bytes());
    escape(line, text);
    text.push(b'\n');
}
