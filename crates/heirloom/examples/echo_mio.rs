//! An echo server on mio that is replaced together with its connections.
//!
//! Start it, connect to it, and start it again while you type. The second process takes everything over, the first
//! exits, and the connection goes on:
//!
//! ```text
//! cargo run --example echo_mio -- /tmp/echo/echo.sock 127.0.0.1:7007
//! ncat 127.0.0.1 7007
//! cargo run --example echo_mio -- /tmp/echo/echo.sock
//! ```
//!
//! What it shows: descriptors are registered with the new poller while the old process still serves; bytes that were
//! read but not yet sent back travel as the state of their connection; and at the freeze nothing is done for a
//! connection that has not changed since the offer.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use heirloom::manifest::{Base, Change, Delta};
use heirloom::runtime::mio::{deregister, register, reregister, timeout};
use heirloom::{
    Config, Entry, Incumbent, ItemId, Kind, NoRequests, Outcome, Replace, Service, Start, Successor, Taken,
    Turn,
};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

/// The listener is the first item of the first process, and keeps its id for ever.
const LISTENER: ItemId = ItemId::FIRST;
/// How often a connection may read before the others have their turn.
const SHARE: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let control = arguments.next().ok_or("usage: echo_mio CONTROL_SOCKET [ADDRESS]")?;
    let address = arguments.next().unwrap_or("127.0.0.1:0".into());
    heirloom::descriptors::raise_limit()?;

    let service = Service::new("echo").program("echo_mio", env!("CARGO_PKG_VERSION"));
    let (echo, incumbent) = match heirloom::start(control.as_ref(), service, Config::default(), Replace::Try)?
    {
        Start::Fresh(incumbent) => (Echo::fresh(&address)?, incumbent),
        Start::Successor(successor) => Echo::take_over(successor)?,
        Start::InPlace(taken) => Echo::go_on(Poll::new()?, ItemId::CONTROL, *taken)?,
        // All that this program needs is in each connection's bytes: there is nothing that it could not decode.
        Start::Preflight(preflight) => return Ok(preflight.pass()?),
        Start::Older(_) => return Err("the incumbent is no echo server".into()),
    };
    println!("serving {}, {} connections", echo.listener.local_addr()?, echo.connections.len());
    echo.run(incumbent)
}

struct Echo {
    poll: Poll,
    listener: TcpListener,
    connections: BTreeMap<ItemId, Connection>,
    next_id: ItemId,
    /// While a takeover goes on: what is no longer as it was offered.
    since_offer: Option<Since>,
}

struct Connection {
    socket: TcpStream,
    /// What was read and not yet sent back: the state that travels.
    unsent: Vec<u8>,
    interest: Interest,
}

struct Since {
    /// From here on, ids are those of new connections.
    next_id: ItemId,
    changed: BTreeSet<ItemId>,
    ended: BTreeSet<ItemId>,
}

/// Whether to go on serving.
enum Next {
    Serve,
    Replaced,
    Quit,
}

impl Echo {
    fn fresh(address: &str) -> Result<Echo, Box<dyn Error>> {
        let listener = TcpListener::bind(address.parse()?)?;
        let poll = Poll::new()?;
        register(poll.registry(), listener.as_fd(), token(LISTENER), Interest::READABLE)?;
        Ok(Echo {
            poll,
            listener,
            connections: BTreeMap::new(),
            next_id: ItemId(LISTENER.0 + 1),
            since_offer: None,
        })
    }

    fn take_over(successor: Successor) -> Result<(Echo, Incumbent<NoRequests>), Box<dyn Error>> {
        let poll = Poll::new()?;
        // The costly part, while the other process serves. This poller must not be polled before the takeover.
        let mut registered = ItemId::CONTROL;
        let offered = successor.receive_each(|item| {
            registered = registered.max(item.id());
            register(poll.registry(), item.descriptor(), token(item.id()), Interest::READABLE)
        })?;

        Echo::go_on(poll, registered, offered.ready()?.accept()?)
    }

    /// Serves what was handed over. Items up to `registered` are with this poller already.
    fn go_on(
        poll: Poll,
        registered: ItemId,
        taken: Taken<NoRequests>,
    ) -> Result<(Echo, Incumbent<NoRequests>), Box<dyn Error>> {
        println!("took over from {}, nobody served for {:?}", taken.from, taken.pause);
        let mut bundle = taken.bundle;
        let next_id = bundle.next_id();
        let listener = bundle.take::<std::net::TcpListener>("listener")?.descriptor;
        if LISTENER > registered {
            register(poll.registry(), listener.as_fd(), token(LISTENER), Interest::READABLE)?;
        }
        let mut connections = BTreeMap::new();
        for item in bundle.take_all::<std::net::TcpStream>("connection") {
            if item.id > registered {
                register(poll.registry(), item.descriptor.as_fd(), token(item.id), Interest::READABLE)?;
            }
            let socket = TcpStream::from_std(item.descriptor);
            let connection = Connection { socket, unsent: item.state, interest: Interest::READABLE };
            connections.insert(item.id, connection);
        }
        for unknown in bundle.close_rest() {
            eprintln!("closed {unknown}, which is nothing that this program knows");
        }

        let listener = TcpListener::from_std(listener);
        let mut echo = Echo { poll, listener, connections, next_id, since_offer: None };
        // Bytes in a buffer raise no event: look at the buffers first.
        let waiting = echo.connections.iter().filter(|(_, connection)| !connection.unsent.is_empty());
        for id in waiting.map(|(&id, _)| id).collect::<Vec<_>>() {
            echo.serve(id)?;
        }
        Ok((echo, taken.incumbent))
    }

    fn run(mut self, mut incumbent: Incumbent<NoRequests>) -> Result<(), Box<dyn Error>> {
        let its_token = token(ItemId::CONTROL);
        self.poll.registry().register(&mut incumbent, its_token, Interest::READABLE)?;
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, timeout(&incumbent)) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
            let mut due = incumbent.deadline().is_some_and(|at| at <= Instant::now());
            for event in &events {
                match ItemId(event.token().0 as u64) {
                    ItemId::CONTROL => due = true,
                    LISTENER => self.accept()?,
                    id => self.serve(id)?,
                }
            }
            match if due { self.turns(&mut incumbent)? } else { Next::Serve } {
                Next::Serve => {}
                // Everything is closed plainly, by exiting: the connections are the successor's.
                Next::Replaced => return Ok(()),
                Next::Quit => {
                    incumbent.retire();
                    return Ok(());
                }
            }
        }
    }

    /// Lets the incumbent do what it has to do.
    fn turns(&mut self, incumbent: &mut Incumbent<NoRequests>) -> Result<Next, Box<dyn Error>> {
        // Not in a takeover: it would be work for each connection in the freeze.
        if !incumbent.takeover_running() {
            incumbent.set_items(self.entries().map(|entry| (entry.id, entry.name, entry.kind)));
        }
        loop {
            match incumbent.turn(Instant::now())? {
                Turn::Idle => break,
                Turn::Offer(offer) => {
                    self.since_offer = Some(Since {
                        next_id: self.next_id,
                        changed: BTreeSet::new(),
                        ended: BTreeSet::new(),
                    });
                    if let Err(error) = offer.begin(self.base()) {
                        eprintln!("serving on: {error}");
                    }
                }
                Turn::Batch(batch) => batch.send(|id| self.descriptor(id)),
                // From here to the outcome nothing is touched: this thread is the only one, and it is here.
                Turn::Freeze(freeze) => match freeze.release(self.delta(), |id| self.descriptor(id)) {
                    Ok(Outcome::Taken(_)) => return Ok(Next::Replaced),
                    Ok(Outcome::Superseded(why)) => return Err(why.into()),
                    Ok(Outcome::Resumed(why)) => eprintln!("serving on: {why}"),
                    Err(error) => eprintln!("serving on: {error}"),
                },
                Turn::Request(asked) => asked.refuse("this program has no requests of its own"),
                Turn::Quit(_) => return Ok(Next::Quit),
                Turn::Closed(_) | Turn::Delegated(_) => {}
            }
        }
        if !incumbent.takeover_running() {
            self.since_offer = None;
        }
        Ok(Next::Serve)
    }

    /// Everything as it is now.
    fn base(&self) -> Base {
        Base { items: self.entries().collect(), next_id: self.next_id.0, ..Base::default() }
    }

    /// What is no longer as it was offered: as much work as there are changes, not as there are connections.
    fn delta(&self) -> Delta {
        let mut delta = Delta { next_id: self.next_id.0, ..Delta::default() };
        if let Some(since) = &self.since_offer {
            let state = |id| self.connections.get(id).map(|connection| connection.unsent.clone());
            delta.changed =
                since.changed.iter().filter_map(|id| Some(Change { id: *id, state: state(id)? })).collect();
            delta.added = self.connections.range(since.next_id..).map(|(&id, c)| c.entry(id)).collect();
            delta.ended = since.ended.iter().copied().collect();
        }
        delta
    }

    fn entries(&self) -> impl Iterator<Item = Entry> {
        let listener =
            Entry { id: LISTENER, name: "listener".into(), kind: Kind::TcpListener, state: Vec::new() };
        std::iter::once(listener).chain(self.connections.iter().map(|(&id, c)| c.entry(id)))
    }

    fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        match id {
            LISTENER => Some(self.listener.as_fd()),
            id => self.connections.get(&id).map(|connection| connection.socket.as_fd()),
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let (socket, _) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    eprintln!("cannot accept: {error}");
                    return Ok(());
                }
            };
            let id = self.next_id;
            self.next_id = ItemId(id.0 + 1);
            register(self.poll.registry(), socket.as_fd(), token(id), Interest::READABLE)?;
            let connection = Connection { socket, unsent: Vec::new(), interest: Interest::READABLE };
            self.connections.insert(id, connection);
        }
    }

    /// Echoes on one connection, and sees to it that it is heard of again.
    fn serve(&mut self, id: ItemId) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let had_state = !connection.unsent.is_empty();
        let echoed = connection.echo();
        if had_state || !connection.unsent.is_empty() {
            self.since_offer.iter_mut().for_each(|since| since.changed(id));
        }
        match echoed {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let blocked_writing = !connection.unsent.is_empty();
                let interest = if blocked_writing { Interest::WRITABLE } else { Interest::READABLE };
                if interest == connection.interest {
                    return Ok(());
                }
                connection.interest = interest;
            }
            Err(_) => return self.end(id),
            // There may be more, of which no edge would tell. A re-registration does.
            Ok(()) => connection.interest = Interest::READABLE,
        }
        reregister(self.poll.registry(), connection.socket.as_fd(), token(id), connection.interest)
    }

    /// Ends a connection of which a successor may hold a duplicate already: that alone would keep it open.
    fn end(&mut self, id: ItemId) -> io::Result<()> {
        let Some(connection) = self.connections.remove(&id) else { return Ok(()) };
        self.since_offer.iter_mut().for_each(|since| since.ended(id));
        deregister(self.poll.registry(), connection.socket.as_fd())?;
        // It fails where the client has reset the connection: that one has ended as it is.
        let _ = connection.socket.shutdown(Shutdown::Both);
        Ok(())
    }
}

impl Connection {
    /// Sends back what arrives, until its share is used up (`Ok`), one side would block, or it has ended.
    fn echo(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        self.send()?;
        for _ in 0..SHARE {
            match self.socket.read(&mut buffer)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => self.unsent.extend_from_slice(&buffer[..n]),
            }
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let sent = self.socket.write(&self.unsent)?;
            self.unsent.drain(..sent);
        }
        Ok(())
    }

    fn entry(&self, id: ItemId) -> Entry {
        Entry { id, name: "connection".into(), kind: Kind::TcpStream, state: self.unsent.clone() }
    }
}

impl Since {
    fn changed(&mut self, id: ItemId) {
        if id < self.next_id {
            self.changed.insert(id);
        }
    }

    fn ended(&mut self, id: ItemId) {
        self.changed.remove(&id);
        if id < self.next_id {
            self.ended.insert(id);
        }
    }
}

/// Items have the tokens of their ids; the incumbent has that of the control listener, which is no item of ours.
fn token(id: ItemId) -> Token {
    Token(id.0 as usize)
}
