//! A connection that is relayed: a client's socket, a backend's, and a flow each way.
//!
//! It promises: what a side has sent before it ends comes before its end; an end of one direction leaves the other as it is; a reset
//! is passed on as a reset. A reset overtakes what the other side does not take at once, as it does without a relay. Whose bytes were
//! lost hears a reset and no orderly end before it; a UNIX socket, which knows no reset, is shut down then.

use std::mem;
use std::net::SocketAddr;

use mio::Interest;

use crate::clock::Time;
use crate::each::Each;
use crate::flow::{Flow, Turned};
use crate::id::Side;
use crate::pipes::Pipes;
use crate::socket::{BOTH, READING, Socket, WRITING};

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
    pub(crate) failed: Each<bool>,
    /// What the poller tells of the sockets, as far as they are registered.
    pub(crate) watched: Each<Option<Interest>>,
    /// Of which it has told that there is more when that was known, and nothing could be done.
    pub(crate) in_vain: Each<bool>,
    /// It cannot be connected for want of a descriptor.
    pub(crate) lacks: bool,
    /// It is among those that have their turn next.
    pub(crate) queued: bool,
    /// It is counted to its loop.
    pub(crate) settled: bool,
    /// A successor was offered it.
    pub(crate) offered: bool,
    /// Something has changed since a successor was offered what there was.
    pub(crate) touched: bool,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// There is no backend for it: the one that it would have had has failed or gone with the configuration, and all others are full.
    Waiting,
    Connecting,
    Relaying,
}

/// What a poller tells of a socket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Told {
    pub(crate) readable: bool,
    /// There is an [urgent byte](crate::urgent).
    pub(crate) urgent: bool,
    /// The peer sends nothing more.
    pub(crate) ended: bool,
    pub(crate) writable: bool,
    pub(crate) failed: bool,
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
    /// Just accepted, and not connected yet.
    pub(crate) fn new(listener: usize, client: Socket, from: Option<SocketAddr>, now: Time) -> Connection {
        Connection {
            listener,
            backend: None,
            stage: Stage::Connecting,
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
            failed: Each::default(),
            watched: Each::default(),
            in_vain: Each::default(),
            lacks: false,
            queued: false,
            settled: false,
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
    pub(crate) fn hear(&mut self, side: Side, told: Told) {
        let is_due = self.queued;
        let from = self.flow_from(side);
        let in_vain = told.readable && from.readable && !is_due;
        from.readable |= told.readable || told.ended || told.failed;
        from.urgent |= told.urgent;
        from.ends |= told.ended;
        from.may_fail |= told.failed;
        self.in_vain[side] |= in_vain;
        self.flow_from(side.other()).writable |= told.writable;
        if told.failed {
            self.failed[side] = true;
        }
    }

    /// Both flows are to be tried: nobody knows what their sockets would say.
    pub(crate) fn try_everything(&mut self) {
        for flow in [&mut self.up, &mut self.down] {
            let may = !flow.ended;
            (flow.readable, flow.urgent, flow.may_fail, flow.writable) = (may, may, may, true);
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
        for (turned, sink, other) in [(&up, server, &self.down), (&down, &self.client, &self.up)] {
            match turned {
                // Who is to hear no orderly end hears what comes before.
                Turned::Ended if other.lost => sink.flush(),
                Turned::Ended => sink.finish(),
                _ => {}
            }
        }
        for (side, turned) in [(Side::Client, &up), (Side::Backend, &down)] {
            let has_failed = match turned {
                Turned::SourceFailed => true,
                // What came before the failure is passed on first, as far as it is taken.
                Turned::Waits | Turned::Ended => self.failed[side],
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

    /// What the poller is to tell of a socket from now on, if that is not what it tells already.
    ///
    /// As long as nothing can be done with what a source has, it is not heard: each packet more would wake the loop in vain, and who
    /// sends it would have to do that. That is so from the first one that did, until there is nothing known of the source. What it
    /// has by then, the poller tells when it is asked to.
    pub(crate) fn change_of_interest(&mut self, side: Side) -> Option<Interest> {
        let watched = self.watched[side]?;
        let in_vain = mem::take(&mut self.in_vain[side]);
        let from = self.flow_from(side);
        let is_known = from.readable || from.ended || from.done;
        let reading = !is_known || watched.is_readable() && !in_vain;
        let writing = watched.is_writable() || !reading || self.flow_from(side.other()).waits_for_sink();
        let wanted = match (reading, writing) {
            (true, false) => READING,
            (true, true) => BOTH,
            (false, _) => WRITING,
        };
        (wanted != watched).then_some(wanted)
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
    use std::fs::File;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use heirloom::Kind;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{MemfdFlags, memfd_create, sendfile};
    use rustix::io::ioctl_fionread;
    use rustix::net::{SendFlags, send, sockopt};

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

    /// The same with a client that comes by TCP.
    fn relayed_from_tcp() -> (Connection, TcpStream, UnixStream) {
        let (mut connection, _, backend) = relayed();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nodelay(true).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        connection.client = Socket::new(ours.into(), Kind::TcpStream);
        (connection, client, backend)
    }

    fn wait_until(mut holds: impl FnMut() -> bool) {
        let give_up = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < give_up);
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_came_in_many_pieces_is_passed_on_when_it_is_told_of_once() {
        // A byte of each of these pages: whatever the kernel joins, that are as many slots of a pipe.
        let pages = 600;
        let page = rustix::param::page_size();
        let file = memfd_create("pages", MemfdFlags::CLOEXEC).unwrap();
        let contents: Vec<u8> = (0..pages * page).map(|place| (place / page) as u8).collect();
        File::from(file.try_clone().unwrap()).write_all(&contents).unwrap();
        for count in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, pages] {
            let (mut connection, client, mut backend) = relayed_from_tcp();
            let mut pipes = Pipes::new(4, 1);
            connection.up.writable = true;
            for place in 0..count {
                let mut offset = (place * page) as u64;
                assert_eq!(sendfile(&client, &file, Some(&mut offset), 1).unwrap(), 1);
            }
            wait_until(|| ioctl_fionread(&connection.client).unwrap() == count as u64);
            connection.hear(Side::Client, Told { readable: true, ..Told::default() });
            while connection.relay(0, &mut pipes) != Next::Wait {}
            let mut heard = vec![0; count + 1];
            assert_eq!(backend.read(&mut heard).unwrap(), count);
            assert!(heard[..count].iter().enumerate().all(|(place, byte)| *byte == place as u8));
        }
    }

    #[test]
    fn an_end_that_is_told_of_with_the_last_bytes_is_passed_on() {
        let (mut connection, mut client, mut backend) = relayed_from_tcp();
        let mut pipes = Pipes::new(4, 1);
        connection.up.writable = true;
        client.write_all(b"bye").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let is_end = || {
            let mut polled = [PollFd::new(&connection.client, PollFlags::RDHUP)];
            poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
        };
        wait_until(is_end);
        connection.hear(Side::Client, Told { readable: true, ended: true, ..Told::default() });
        assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
        let mut heard = Vec::new();
        backend.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"bye");
    }

    #[test]
    fn an_urgent_byte_stays_where_it_is_until_it_is_taken() {
        let (mut connection, mut client, mut backend) = relayed_from_tcp();
        let mut pipes = Pipes::new(4, 1);
        connection.up.writable = true;
        let into = connection.server.clone().unwrap();
        let mut filled = 0;
        while let Ok(count) = send(&into, &[7; 4096], SendFlags::empty()) {
            filled += count;
        }
        send(&client, b"!", SendFlags::OOB).unwrap();
        client.write_all(b"after").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let is_told = PollFlags::PRI | PollFlags::RDHUP;
        wait_until(|| {
            let mut polled = [PollFd::new(&connection.client, is_told)];
            poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
                && polled[0].revents().contains(is_told)
        });
        let told = Told { readable: true, urgent: true, ended: true, ..Told::default() };
        connection.hear(Side::Client, told);
        for _ in 0..3 {
            assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
            assert!(connection.up.waits_for_sink() && connection.up.pipe.is_none());
            assert_eq!((connection.up.moved, connection.up.ended), (0, false));
            connection.hear(Side::Backend, Told { writable: true, ..Told::default() });
        }
        backend.read_exact(&mut vec![0; filled]).unwrap();
        assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
        let mut heard = Vec::new();
        backend.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"!after");
        assert_eq!((connection.up.moved, connection.up.done), (6, true));
    }

    #[test]
    fn who_is_held_up_is_not_heard_from_the_first_time_in_vain_until_nothing_is_known() {
        let (mut connection, mut client, mut backend) = relayed_from_tcp();
        let mut pipes = Pipes::new(4, 1);
        let readable = Told { readable: true, ..Told::default() };
        connection.watched = Each::both(Some(READING));
        connection.up.writable = true;
        let into = connection.server.clone().unwrap();
        while send(&into, &[7; 4096], SendFlags::empty()).is_ok() {}
        client.write_all(b"one").unwrap();
        connection.hear(Side::Client, readable);
        wait_until(|| {
            connection.up.readable = true;
            assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
            connection.up.waits_for_sink()
        });
        let changes = |connection: &mut Connection| {
            [Side::Client, Side::Backend].map(|side| {
                let change = connection.change_of_interest(side);
                connection.watched[side] = change.or(connection.watched[side]);
                change
            })
        };
        // Of the backend it is to be known when it takes more.
        assert_eq!(changes(&mut connection), [None, Some(BOTH)]);
        client.write_all(b"two").unwrap();
        connection.hear(Side::Client, readable);
        assert_eq!(changes(&mut connection), [None, None], "that was news");
        connection.hear(Side::Client, readable);
        assert_eq!(changes(&mut connection), [Some(WRITING), None]);
        let mut heard = Vec::new();
        backend.read_to_end(&mut heard).unwrap_err();
        connection.hear(Side::Backend, Told { writable: true, ..Told::default() });
        wait_until(|| {
            assert_eq!(connection.relay(0, &mut pipes), Next::Wait);
            let is_over = connection.up.moved == 6;
            connection.up.readable |= !is_over;
            is_over
        });
        assert_eq!(changes(&mut connection), [Some(BOTH), None]);
        backend.read_to_end(&mut heard).unwrap_err();
        assert!(heard.ends_with(b"onetwo"));
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
    fn what_waits_for_an_end_that_does_not_come_is_sent() {
        let (mut connection, client, _) = relayed_from_tcp();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        to.set_nonblocking(true).unwrap();
        let (mut backend, _) = listener.accept().unwrap();
        connection.server = Some(Socket::new(to.into(), Kind::TcpStream));
        let mut pipes = Pipes::new(4, 1);
        (connection.up.writable, connection.down.writable) = (true, true);
        backend.write_all(b"nobody reads this").unwrap();
        send(&client, b"bye", SendFlags::empty()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        wait_until(|| {
            let mut polled = [PollFd::new(&connection.client, PollFlags::RDHUP)];
            poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
        });
        connection.hear(Side::Client, Told { readable: true, ended: true, ..Told::default() });
        connection.hear(Side::Backend, Told { readable: true, ..Told::default() });
        // The reset comes when that is known.
        sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        let next = connection.relay(0, &mut pipes);
        assert_eq!((connection.up.moved, connection.up.done, connection.down.lost), (3, true, true));
        assert_eq!(next, Next::End(How::Failed(Side::Client)));
        connection.end(How::Failed(Side::Client), &mut pipes);
        let mut heard = [0; 4];
        assert_eq!(backend.read(&mut heard).unwrap(), 3);
        assert_eq!(backend.read(&mut heard).unwrap_err().kind(), ErrorKind::ConnectionReset);
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
