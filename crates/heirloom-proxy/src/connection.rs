//! A connection that is relayed: a client's socket, a backend's, and a flow each way.
//!
//! It promises: what a side has sent before it ends comes before its end; an end of one direction leaves the other as it is; a reset
//! is passed on as a reset. A reset overtakes what the other side does not take at once, as it does without a relay. Whose bytes were
//! lost hears a reset and no orderly end before it; a UNIX socket, which knows no reset, is shut down then.

use std::net::SocketAddr;

use crate::clock::Time;
use crate::flow::{Flow, Turned};
use crate::id::Side;
use crate::pipes::Pipes;
use crate::socket::Socket;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) listener: usize,
    /// The backend to which it is counted.
    pub(crate) backend: Option<usize>,
    pub(crate) stage: Stage,
    pub(crate) client: Socket,
    pub(crate) server: Option<Socket>,
    /// From the client to the backend.
    pub(crate) up: Flow,
    pub(crate) down: Flow,
    /// Backends that have failed.
    pub(crate) tried: Vec<usize>,
    /// Where the client comes from, if that can be said.
    pub(crate) from: Option<SocketAddr>,
    pub(crate) accepted: Time,
    pub(crate) connected: Option<Time>,
    /// When something was moved last.
    pub(crate) active: Time,
    /// Until when it may connect, or has to end.
    pub(crate) until: Option<Time>,
    /// Its moment among the timers.
    pub(crate) timer: Option<Time>,
    /// Which sockets have reported a failure.
    pub(crate) failed: Sides,
    /// Which sockets are registered for writing, too.
    pub(crate) watched: Sides,
    /// It is among those that have their turn next.
    pub(crate) queued: bool,
    /// A successor was offered it.
    pub(crate) offered: bool,
    /// Something has changed since a successor was offered what there was.
    pub(crate) touched: bool,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// All backends are full.
    Waiting,
    Connecting,
    Relaying,
}

/// Something of each side.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sides {
    client: bool,
    backend: bool,
}

impl Sides {
    pub(crate) fn has(self, side: Side) -> bool {
        match side {
            Side::Client => self.client,
            Side::Backend => self.backend,
        }
    }

    pub(crate) fn set(&mut self, side: Side) {
        match side {
            Side::Client => self.client = true,
            Side::Backend => self.backend = true,
        }
    }
}

/// How a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Both sides have said everything.
    Closed,
    /// This side has failed, or takes nothing any more.
    Failed(Side),
    /// Nothing was said for too long.
    Idle,
    /// Its backend is no longer configured, and it had its time.
    Drained,
    /// No backend could be had.
    Refused,
    /// The proxy ends.
    Stopped,
}

/// What is next after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// An event tells.
    Wait,
    /// Another turn, after the others.
    Again,
    /// Another turn, once there is a pipe.
    Starve,
    End(How),
}

impl Connection {
    /// Just accepted.
    pub(crate) fn new(listener: usize, client: Socket, from: Option<SocketAddr>, now: Time) -> Connection {
        Connection {
            listener,
            backend: None,
            stage: Stage::Waiting,
            client,
            server: None,
            up: Flow::default(),
            down: Flow::default(),
            tried: Vec::new(),
            from,
            accepted: now,
            connected: None,
            active: now,
            until: None,
            timer: None,
            failed: Sides::default(),
            watched: Sides::default(),
            queued: false,
            offered: false,
            touched: false,
        }
    }

    pub(crate) fn socket(&self, side: Side) -> Option<&Socket> {
        match side {
            Side::Client => Some(&self.client),
            Side::Backend => self.server.as_ref(),
        }
    }

    /// The flow that comes from a side.
    pub(crate) fn flow_from(&mut self, side: Side) -> &mut Flow {
        match side {
            Side::Client => &mut self.up,
            Side::Backend => &mut self.down,
        }
    }

    /// Takes in what the poller tells of a socket.
    pub(crate) fn hear(&mut self, side: Side, readable: bool, writable: bool, failed: bool) {
        self.flow_from(side).readable |= readable;
        self.flow_from(side.other()).writable |= writable;
        if failed {
            self.failed.set(side);
        }
    }

    /// Both flows are to be tried: nobody knows what their sockets would say.
    pub(crate) fn try_everything(&mut self) {
        for flow in [&mut self.up, &mut self.down] {
            (flow.readable, flow.writable) = (!flow.ended, true);
        }
    }

    /// Moves what can be moved, each way.
    pub(crate) fn relay(&mut self, now: Time, pipes: &mut Pipes) -> Next {
        let Some(server) = &self.server else { return Next::Wait };
        let before = (self.up.moved, self.down.moved);
        let up = self.up.turn(&self.client, server, pipes);
        let down = self.down.turn(server, &self.client, pipes);
        if before != (self.up.moved, self.down.moved) {
            self.active = now;
        }
        if matches!(up, Turned::Ended) && !self.down.lost {
            server.finish();
        }
        if matches!(down, Turned::Ended) && !self.up.lost {
            self.client.finish();
        }
        for (side, turned) in [(Side::Client, &up), (Side::Backend, &down)] {
            let has_failed = match turned {
                Turned::SourceFailed => true,
                // What came before the failure is passed on first, as far as it is taken.
                Turned::Waits | Turned::Ended => self.failed.has(side),
                Turned::More | Turned::NoPipe => false,
            };
            if has_failed {
                return Next::End(How::Failed(side));
            }
        }
        if self.up.done && self.down.done {
            return Next::End(match (self.up.lost, self.down.lost) {
                (true, _) => How::Failed(Side::Backend),
                (_, true) => How::Failed(Side::Client),
                _ => How::Closed,
            });
        }
        if matches!(up, Turned::More) || matches!(down, Turned::More) {
            return Next::Again;
        }
        if matches!(up, Turned::NoPipe) || matches!(down, Turned::NoPipe) {
            return Next::Starve;
        }
        Next::Wait
    }

    /// What each side is to see of the end, whoever else holds duplicates.
    pub(crate) fn end(&mut self, how: How, pipes: &mut Pipes) {
        self.up.drop_pipe(pipes);
        self.down.drop_pipe(pipes);
        match how {
            How::Closed | How::Stopped => {}
            How::Failed(side) => {
                if let Some(other) = self.socket(side.other()) {
                    other.reset();
                }
            }
            How::Refused => self.client.reset(),
            How::Idle | How::Drained => {
                self.client.end();
                self.server.iter().for_each(Socket::end);
            }
        }
    }

    /// What a successor would have to be told.
    pub(crate) fn mark(&self) -> Mark {
        let of = |flow: &Flow| (flow.moved, flow.held, flow.ended, flow.done);
        (of(&self.up), of(&self.down))
    }
}

type FlowMark = (u64, usize, bool, bool);
/// See [`Connection::mark`].
pub(crate) type Mark = (FlowMark, FlowMark);

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use heirloom::Kind;

    use super::*;

    /// A connection that is relayed, and its peers: the client and the backend.
    fn relayed() -> (Connection, UnixStream, UnixStream) {
        let [(ours, client), (to, backend)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        for stream in [&ours, &client, &to, &backend] {
            stream.set_nonblocking(true).unwrap();
        }
        let socket = |stream: UnixStream| Socket::new(stream.into(), Kind::UnixStream);
        let mut connection = Connection::new(0, socket(ours), None, 0);
        (connection.stage, connection.server) = (Stage::Relaying, Some(socket(to)));
        (connection, client, backend)
    }

    #[test]
    fn an_end_is_passed_on_after_all_that_came_before() {
        let (mut connection, mut client, mut backend) = relayed();
        let mut pipes = Pipes::new(4, 1);
        backend.write_all(b"all").unwrap();
        backend.shutdown(std::net::Shutdown::Write).unwrap();
        connection.try_everything();
        assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"all");
        client.shutdown(std::net::Shutdown::Write).unwrap();
        connection.try_everything();
        assert_eq!(connection.relay(0, &mut pipes), Next::End(How::Closed));
        assert_eq!(backend.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn whose_bytes_were_lost_hears_no_orderly_end() {
        let (mut connection, mut client, mut backend) = relayed();
        let mut pipes = Pipes::new(4, 1);
        client.write_all(b"nobody reads this").unwrap();
        backend.shutdown(std::net::Shutdown::Read).unwrap();
        backend.write_all(b"all").unwrap();
        connection.try_everything();
        assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
        assert!(connection.up.lost);
        drop(backend);
        connection.try_everything();
        assert_eq!(connection.relay(0, &mut pipes), Next::End(How::Failed(Side::Backend)));
        let mut heard = [0; 4];
        assert_eq!(client.read(&mut heard).unwrap(), 3);
        // What comes now is for `end` to say.
        assert_eq!(client.read(&mut heard).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}
