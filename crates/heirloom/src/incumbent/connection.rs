//! One connection at the control socket: lines in, lines out, and nothing that it does can hold up the rest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use crate::control::line::LineReader;
use crate::control::request::{Failure, FailureCode, Reply};
use crate::descriptors::{Wait, receive_with, send_with};
use crate::limits::Limits;
use crate::peer::Peer;

/// How much may wait to be sent to a client that does not read, in bytes. One reply may be longer.
const MAX_UNSENT: usize = 1 << 20;

/// Names a connection at the control socket, for as long as it lives.
///
/// ```
/// fn same(a: heirloom::ConnectionId, b: heirloom::ConnectionId) -> bool {
///     a == b
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub(super) u64);

pub(super) struct Connection {
    stream: UnixStream,
    pub(super) peer: Peer,
    lines: LineReader,
    unsent: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    bad_lines: usize,
    /// No further line is read while the application owes a reply.
    pub(super) waiting: bool,
    /// The application wants to know when this connection ends.
    pub(super) watched: bool,
    eof: bool,
    ended: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, peer: Peer, limits: &Limits) -> Self {
        Connection {
            stream,
            peer,
            lines: LineReader::new(limits.control_line_bytes),
            unsent: VecDeque::new(),
            bad_lines: 0,
            waiting: false,
            watched: false,
            eof: false,
            ended: false,
        }
    }

    /// Reads what has arrived, at most one buffer; descriptors that nobody asked for are closed.
    pub(super) fn fill(&mut self) {
        let mut buffer = [0; 8192];
        match receive_with(&self.stream, &mut buffer, Wait::DontWait) {
            Ok(received) if received.bytes == 0 => self.eof = true,
            Ok(received) => self.lines.feed(&buffer[..received.bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => self.ended = true,
        }
    }

    /// The client has closed its end, so that nothing can reach it. Once all that it sent is read there is nothing left
    /// to do for it, even if a reply is owed.
    pub(super) fn hang_up(&mut self) {
        self.ended |= self.eof;
    }

    /// The next whole line, if the connection is not waiting for a reply. `Err` is a line that is too long.
    pub(super) fn next_line(&mut self) -> Option<Result<Vec<u8>, String>> {
        if self.waiting {
            return None;
        }
        match self.lines.next_line() {
            Ok(line) => line.map(Ok),
            Err(error) => {
                self.ended = true;
                Some(Err(error.to_string()))
            }
        }
    }

    /// Counts a line that was no request; a peer that sends too many is cut off.
    pub(super) fn count_bad_line(&mut self, limits: &Limits) {
        self.bad_lines += 1;
        if self.bad_lines >= limits.bad_lines {
            self.ended = true;
        }
    }

    /// Queues bytes, with descriptors beside the first of them, and sends what can be sent at once.
    pub(super) fn send(&mut self, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) {
        let waiting: usize = self.unsent.iter().map(|(bytes, _)| bytes.len()).sum();
        if waiting > 0 && waiting + bytes.len() > MAX_UNSENT {
            self.ended = true;
            return;
        }
        self.unsent.push_back((bytes, descriptors));
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        while let Some((bytes, descriptors)) = self.unsent.front_mut() {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match send_with(&self.stream, bytes, &borrowed, Wait::DontWait) {
                Ok(sent) if sent < bytes.len() => {
                    bytes.drain(..sent);
                    descriptors.clear();
                }
                Ok(_) => drop(self.unsent.pop_front()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                // The user has too many descriptors in flight, for which there is no event to wait for. Whoever asked is told, and
                // may ask again; what is no line can only be ended.
                Err(error) if is(&error, Errno::TOOMANYREFS) && bytes.ends_with(b"\n") => {
                    *bytes = failure(FailureCode::Failed, IN_FLIGHT);
                    descriptors.clear();
                }
                Err(_) => {
                    self.ended = true;
                    return;
                }
            }
        }
    }

    /// What to wait for: nothing is read while a reply is owed.
    pub(super) fn interest(&self) -> EventFlags {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, !self.eof && !self.waiting);
        interest.set(EventFlags::OUT, !self.unsent.is_empty());
        interest
    }

    /// Whether it can be closed: it failed, or the client is done and has had all its replies.
    pub(super) fn has_ended(&self) -> bool {
        self.ended || self.eof && !self.waiting && self.unsent.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Why a reply cannot be given (`ETOOMANYREFS`, `unix(7)`).
const IN_FLIGHT: &str = "the answer needs a descriptor, and too many of this user's are in flight: sent, but not yet received. Try again, or raise \
                         the limit on open files (ulimit -n, LimitNOFILE=)";

fn is(error: &std::io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}

/// The line that refuses a request.
pub(super) fn failure(code: FailureCode, message: impl ToString) -> Vec<u8> {
    Reply::Error(Failure { code, message: message.to_string() }).to_line()
}
