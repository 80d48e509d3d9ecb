//! The clients of the control socket: who is accepted, and what their lines are answered with.
//!
//! A client is never waited for: what it has not sent is not there, and what it does not read is kept for it, up to the
//! [limits](crate::limits::Limits).

use std::io;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::connection::{Connection, ConnectionId, failure};
use super::{Incumbent, LISTENER, Notice};
use crate::control::request::{FailureCode, Reply, Request, RequestError};
use crate::descriptors::{Wait, send_with};
use crate::peer::Peer;

/// How long the control socket rests when a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl<A> Incumbent<A> {
    pub(super) fn accept(&mut self, now: Instant) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, most likely: looking again at once would be a busy loop.
                    tracing::warn!(%error, "cannot accept at the control socket for now");
                    self.set_listening(false);
                    self.listen_again = Some(now + ACCEPT_PAUSE);
                    return;
                }
            };
            let peer = match Peer::of(&stream) {
                Ok(peer) => peer,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell who connected to the control socket");
                    let line = failure(FailureCode::Failed, format_args!("it cannot tell who asks: {error}"));
                    let _ = send_with(&stream, &line, &[], Wait::DontWait);
                    continue;
                }
            };
            let refused = self.config.peers.check(&peer).err();
            let mut connection = Connection::new(stream, peer, &self.config.limits);
            if let Some(refused) = refused {
                tracing::warn!(peer = %connection.peer, "refused at the control socket");
                connection.send(failure(FailureCode::Permission, refused), Vec::new());
                continue;
            }
            if self.connections.len() >= self.config.limits.control_connections {
                self.make_room();
            }
            let id = ConnectionId(self.next_connection);
            self.next_connection += 1;
            let flags = epoll::EventFlags::IN;
            if epoll::add(&self.epoll, &connection, epoll::EventData::new_u64(id.0), flags).is_ok() {
                self.connections.insert(id, connection);
                self.connection_ready(now, id, flags);
            }
        }
    }

    pub(super) fn set_listening(&self, listening: bool) {
        let interest = if listening { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        let _ = epoll::modify(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), interest);
    }

    /// Closes the oldest connection that nothing is owed to, so that idle clients cannot keep others out.
    fn make_room(&mut self) {
        let idle = self.connections.iter().find(|(_, connection)| !connection.waiting && !connection.watched);
        if let Some((&id, _)) = idle
            && let Some(mut connection) = self.connections.remove(&id)
        {
            let _ = epoll::delete(&self.epoll, &connection);
            connection.send(
                failure(FailureCode::Busy, "too many control connections: this was the oldest"),
                Vec::new(),
            );
        }
    }

    pub(super) fn connection_ready(&mut self, now: Instant, id: ConnectionId, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if flags.contains(epoll::EventFlags::OUT) {
            connection.flush();
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            connection.fill();
        }
        if flags.contains(epoll::EventFlags::HUP) {
            connection.hang_up();
        }
        self.answer(now, id);
    }

    /// Answers the whole lines that a connection has sent.
    pub(super) fn answer(&mut self, now: Instant, id: ConnectionId) {
        while let Some(line) = self.connections.get_mut(&id).and_then(Connection::next_line) {
            self.hear_successor(now);
            // Somebody else serves; not even a Ping is answered: a Pong alone would say that protocol 0 is spoken here.
            if self.is_over() {
                return;
            }
            let request = match line {
                Ok(line) => (self.parse)(&line),
                Err(too_long) => {
                    self.reply(id, failure(FailureCode::TooLong, too_long));
                    break;
                }
            };
            match request {
                Ok(Request::Ping) => self.reply(id, Reply::Pong.to_line()),
                Ok(Request::Status) if self.config.delegate.status => self.delegate(id, Notice::Status(id)),
                Ok(Request::Upgrade(request)) if self.config.delegate.upgrade => {
                    self.delegate(id, Notice::Upgrade(id, request));
                }
                Ok(Request::Status) => {
                    let status = self.status();
                    self.reply(id, Reply::Status(status).to_line());
                }
                Ok(Request::Quit) => {
                    self.reply(id, Reply::Bye.to_line());
                    self.notices.push_back(Notice::Quit(id));
                }
                Ok(Request::Takeover(hello)) => self.hello(now, id, hello),
                Ok(Request::Upgrade(request)) => self.upgrade_asked(id, &request),
                Ok(Request::Inspect) => {
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.waiting = true;
                    }
                    self.inspectors.push(id);
                }
                Ok(Request::Application(request)) => {
                    self.delegate(id, Notice::Request(id, request));
                }
                Err(error) => {
                    let code = match &error {
                        RequestError::Unknown { .. } => FailureCode::Unknown,
                        _ => FailureCode::Malformed,
                    };
                    self.reply(id, failure(code, error));
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.count_bad_line(&self.config.limits);
                        if connection.has_ended() {
                            break;
                        }
                    }
                }
            }
        }
        self.settle(id);
    }

    /// Leaves the answer to the application. Until it comes the connection's further lines wait.
    fn delegate(&mut self, id: ConnectionId, notice: Notice<A>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.waiting = true;
        }
        self.notices.push_back(notice);
    }

    /// Closes a connection that has ended, or waits for what it wants next.
    fn settle(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else { return };
        let data = epoll::EventData::new_u64(id.0);
        if !connection.has_ended()
            && epoll::modify(&self.epoll, connection, data, connection.interest()).is_ok()
        {
            return;
        }
        let _ = epoll::delete(&self.epoll, connection);
        if connection.watched {
            self.notices.push_back(Notice::Closed(id));
        }
        self.connections.remove(&id);
    }

    pub(super) fn reply(&mut self, id: ConnectionId, line: Vec<u8>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.send(line, Vec::new());
        }
    }
}
