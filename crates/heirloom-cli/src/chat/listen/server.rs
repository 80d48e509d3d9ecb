//! The server as it serves: one loop over the door, the room, the control socket and the signals.
//!
//! It promises that nothing is touched between a freeze and its end, and that an idle server does nothing.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use heirloom::runtime::mio::timeout;
use heirloom::upgrade::Upgrade;
use heirloom::{HandoverError, Incumbent, ItemId, NoRequests, Outcome, Taken, Turn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::client::token;
use super::door::Door;
use super::handover::{self, Ahead, Parts};
use super::room::{Counters, Room};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::Signals;

/// The listener is the first item of the first process, and keeps its id for ever.
const LISTENER: ItemId = ItemId::FIRST;
/// Items have the tokens of their ids; the incumbent has that of the control listener, which is no item of ours.
const INCUMBENT: Token = Token(ItemId::CONTROL.0 as usize);
/// An id that no item will ever have.
const SIGNALS: Token = Token(usize::MAX);
/// How many events are taken from the poller at once.
const EVENTS: usize = 1024;
/// How long outboxes may take to empty when the server is told to stop.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// What a successor is told that comes too late.
const STOPPING: &str = "the incumbent is stopping";

pub(super) struct Server {
    poll: Poll,
    incumbent: Incumbent<NoRequests>,
    signals: Signals,
    listener: ItemId,
    door: Door,
    room: Room,
    /// A stop was asked for: until then outboxes are emptied.
    stopping: Option<Instant>,
}

/// The loop goes on, or the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Go,
    /// Ends; nobody serves any more.
    Stop,
    /// Ends; everything is somebody else's, and is closed plainly.
    Replaced,
}

/// What came of a turn of the incumbent, once it is over.
enum Notice {
    Thawed(Result<Outcome, HandoverError>),
    Quit,
}

impl Server {
    /// A server without clients, that listens at the first of these addresses that is free.
    pub(super) fn fresh(
        incumbent: Incumbent<NoRequests>,
        addresses: &[SocketAddr],
        signals: Signals,
        backlog: usize,
    ) -> anyhow::Result<Server> {
        match open(addresses, backlog) {
            Ok(opened) => Server::new(incumbent, signals, opened),
            Err(error) => {
                incumbent.retire();
                let places: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
                let error = anyhow!(
                    "cannot listen at {}: {error:#}; give an address of this machine whose port is free",
                    places.join(" or ")
                );
                Err(error)
            }
        }
    }

    /// Goes on with everything that was taken over, whatever of it was registered ahead.
    pub(super) fn resume(
        taken: Taken<NoRequests>,
        ahead: Ahead,
        signals: Signals,
        backlog: usize,
    ) -> anyhow::Result<Server> {
        let Taken { bundle, incumbent, from, pause } = taken;
        let parts = handover::resume(bundle, &incumbent, ahead, backlog)?;
        tracing::info!(
            %from,
            generation = incumbent.generation(),
            pause_us = pause.as_micros() as u64,
            clients = parts.room.len(),
            "took over"
        );
        Server::new(incumbent, signals, parts)
    }

    fn new(mut incumbent: Incumbent<NoRequests>, signals: Signals, parts: Parts) -> anyhow::Result<Server> {
        let Parts { poll, listener, door, room } = parts;
        let registry = poll.registry();
        registry.register(&mut incumbent, INCUMBENT, Interest::READABLE)?;
        for signal in [signals.stop(), signals.upgrade()] {
            registry.register(&mut SourceFd(&signal.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        }
        tracing::info!(address = %door.address()?, control = %incumbent.path().display(), "listening");
        Ok(Server { poll, incumbent, signals, listener, door, room, stopping: None })
    }

    /// Serves until the server is replaced, stopped, or fails.
    pub(super) fn run(mut self) -> Result<Exit, Failure> {
        let next = self.serve();
        if let Ok(Next::Stop) = next {
            self.room.end();
        }
        // Does nothing if somebody else serves by now.
        self.incumbent.retire();
        next.map(|_| Exit::Done)
    }

    fn serve(&mut self) -> Result<Next, Failure> {
        let mut events = Events::with_capacity(EVENTS);
        // Bytes in outboxes raise no event: they are tried before anything is waited for.
        self.room.turn(Instant::now());
        self.show();
        loop {
            self.wait(&mut events)?;
            let mut next = self.look(&events);
            self.work();
            if next == Next::Go {
                next = self.answer(&events)?;
            }
            if next == Next::Go {
                next = self.go_on();
            }
            if next != Next::Go {
                return Ok(next);
            }
        }
    }

    fn wait(&mut self, events: &mut Events) -> Result<(), Failure> {
        let now = Instant::now();
        let timers = [self.door.deadline(), self.room.deadline(), self.stopping];
        let timer = timers.into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
        let busy = self.room.has_more() || self.door.is_ready();
        let work = busy.then_some(Duration::ZERO);
        let patience = [work, timer, timeout(&self.incumbent)].into_iter().flatten().min();
        match self.poll.poll(events, patience) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                Err(anyhow!(error).context("cannot wait").into())
            }
            _ => Ok(()),
        }
    }

    /// Takes in what the poller tells.
    fn look(&mut self, events: &Events) -> Next {
        for event in events {
            match event.token() {
                INCUMBENT => {}
                SIGNALS => {
                    if self.signalled() == Next::Stop {
                        return Next::Stop;
                    }
                }
                listener if listener == token(self.listener) => self.door.knock(),
                Token(id) => {
                    let readable = event.is_readable() || event.is_read_closed() || event.is_error();
                    let writable = event.is_writable() || event.is_write_closed();
                    self.room.hear_of(ItemId(id as u64), readable, writable);
                }
            }
        }
        Next::Go
    }

    /// Does what signals ask for.
    fn signalled(&mut self) -> Next {
        if self.signals.take_upgrade()
            && let Err(refusal) = self.incumbent.upgrade(Upgrade::default())
        {
            tracing::warn!("no upgrade: {refusal}");
        }
        if self.signals.take_stop() {
            return self.stop();
        }
        Next::Go
    }

    /// Lets in who waits, hears who has something to say, and sends.
    fn work(&mut self) {
        let now = Instant::now();
        if self.stopping.is_none() {
            self.door.accept(now, |socket, address| {
                if let Err(error) = self.room.join(socket, address) {
                    tracing::warn!(%error, "cannot let a client in");
                }
            });
        }
        self.room.turn(now);
    }

    /// A stop was asked for: empties the outboxes first; a second request ends the server at once.
    fn stop(&mut self) -> Next {
        if self.stopping.is_some() {
            return Next::Stop;
        }
        let now = Instant::now();
        self.incumbent.withdraw(now, STOPPING);
        self.door.close(self.poll.registry());
        self.room.close();
        self.stopping = Some(now + STOP_WITHIN);
        Next::Go
    }

    /// What is due after a turn.
    fn go_on(&mut self) -> Next {
        let Some(until) = self.stopping else { return Next::Go };
        let unsent = self.room.unsent();
        if unsent == 0 {
            return Next::Stop;
        }
        if Instant::now() >= until {
            tracing::warn!(unsent, "stopping with bytes that nobody took");
            return Next::Stop;
        }
        Next::Go
    }

    /// Answers at the control socket, if somebody may have asked something, until there is nothing more to answer.
    fn answer(&mut self, events: &Events) -> Result<Next, Failure> {
        let due = self.incumbent.deadline().is_some_and(|at| at <= Instant::now());
        if !due && !events.iter().any(|event| event.token() == INCUMBENT) {
            return Ok(Next::Go);
        }
        self.show();
        loop {
            let notice = match self.incumbent.turn(Instant::now()).context("the control socket fails")? {
                Turn::Idle => return Ok(Next::Go),
                Turn::Offer(offer) if self.stopping.is_some() => {
                    offer.refuse(STOPPING);
                    continue;
                }
                Turn::Offer(offer) => {
                    match handover::manifest(self.listener, &self.room) {
                        Ok(base) => {
                            if let Err(error) = offer.begin(base) {
                                tracing::error!("serving on: {error}");
                            }
                        }
                        Err(error) => offer.refuse(&error.to_string()),
                    }
                    continue;
                }
                Turn::Batch(batch) => {
                    batch.send(|id| descriptor(self.listener, &self.door, &self.room, id));
                    continue;
                }
                // A stop would be lost in an upgrade in place: the new program knows nothing of it.
                Turn::Freeze(freeze) if self.stopping.is_some() || self.signals.stop_waits() => {
                    freeze.resume(STOPPING);
                    continue;
                }
                // From here to the outcome nothing is touched: this thread is the only one, and it is here.
                Turn::Freeze(freeze) => match handover::manifest(self.listener, &self.room) {
                    Ok(now) => Notice::Thawed(
                        freeze.release_all(now, |id| descriptor(self.listener, &self.door, &self.room, id)),
                    ),
                    Err(error) => {
                        freeze.resume(&error.to_string());
                        continue;
                    }
                },
                Turn::Request(asked) => {
                    asked.refuse("a chat server has no requests of its own");
                    continue;
                }
                Turn::Quit(_) => Notice::Quit,
                Turn::Closed(_) | Turn::Delegated(_) => continue,
            };
            let next = match notice {
                Notice::Thawed(outcome) => thaw(outcome)?,
                Notice::Quit => self.stop(),
            };
            if next != Next::Go {
                return Ok(next);
            }
        }
    }

    /// Tells status and successors what there is.
    fn show(&mut self) {
        handover::set_counters(&mut self.incumbent, self.room.counters());
        if self.room.take_changed() {
            self.incumbent.set_items(handover::items(self.listener, &self.room));
        }
    }
}

/// Listens at the first of these addresses that is free.
fn open(addresses: &[SocketAddr], backlog: usize) -> anyhow::Result<Parts> {
    let listener = TcpListener::bind(addresses)?;
    listener.set_nonblocking(true)?;
    let poll = Poll::new()?;
    let door = Door::new(listener);
    door.register(poll.registry(), token(LISTENER))?;
    let next_id = ItemId(LISTENER.0 + 1);
    let room = Room::new(poll.registry().try_clone()?, backlog, next_id, Counters::default());
    Ok(Parts { poll, listener: LISTENER, door, room })
}

/// What comes after a freeze.
fn thaw(outcome: Result<Outcome, HandoverError>) -> Result<Next, Failure> {
    match outcome {
        Ok(Outcome::Taken(by)) => {
            tracing::info!("replaced by {by}");
            return Ok(Next::Replaced);
        }
        Ok(Outcome::Resumed(reason)) => tracing::warn!("serving on; the takeover ended {reason}"),
        Ok(Outcome::Superseded(reason)) => {
            let what =
                "another process holds the service lock, so that this one may not serve; the takeover ended";
            return Err(Failure::new(Exit::Failed, anyhow!("{what} {reason}")));
        }
        Err(error) => tracing::error!("serving on: {error}"),
    }
    Ok(Next::Go)
}

fn descriptor<'s>(listener: ItemId, door: &'s Door, room: &'s Room, id: ItemId) -> Option<BorrowedFd<'s>> {
    if id == listener { Some(door.descriptor()) } else { room.descriptor(id) }
}
