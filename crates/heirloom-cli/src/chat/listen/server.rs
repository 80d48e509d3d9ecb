//! The server as it serves: one loop over the [house](House), the control socket and the signals.
//!
//! It promises that nothing is touched between a freeze and its end, and that an idle server does nothing.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use heirloom::runtime::mio::timeout;
use heirloom::upgrade::Upgrade;
use heirloom::{HandoverError, Incumbent, ItemId, NoRequests, Outcome, Taken, Turn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::connection::token;
use super::handover::{self, Ahead};
use super::house::House;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::Signals;

/// Items have the tokens of their ids; the incumbent has that of the control listener, which is no item of ours.
const INCUMBENT: Token = Token(ItemId::CONTROL.0 as usize);
/// Ids that no item will ever have.
const SIGNALS: Token = Token(usize::MAX);
const STORE: Token = Token(usize::MAX - 1);
/// How many events are taken from the poller at once.
const EVENTS: usize = 1024;
/// How long outboxes may take to empty when the server is told to stop.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// What a successor is told that comes too early.
const WAITING: &str = "the supervisor has not taken everything into its store yet; try again";
/// What a successor is told that comes too late.
const STOPPING: &str = "the incumbent is stopping";

pub(super) struct Server {
    poll: Poll,
    incumbent: Incumbent<NoRequests>,
    signals: Signals,
    house: House,
    /// A stop was asked for: until then outboxes are emptied.
    stopping: Option<Instant>,
}

/// The loop goes on, or the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Go,
    /// Ends; nobody serves any more.
    Stop,
    /// Ends; the next process goes on with everything.
    Leave,
    /// Ends; everything is somebody else's, and is closed plainly.
    Replaced,
}

/// What came of a turn of the incumbent, once it is over.
enum Notice {
    Thawed(Result<Outcome, HandoverError>),
    Quit,
}

impl Server {
    /// A server that nobody hands over: with what a store has kept of the last one, or without clients, at the first of these
    /// addresses that is free.
    pub(super) fn fresh(
        incumbent: Incumbent<NoRequests>,
        service: &str,
        addresses: &[SocketAddr],
        signals: Signals,
        backlog: usize,
    ) -> anyhow::Result<Server> {
        match House::restored(incumbent.path(), service, addresses, backlog) {
            Ok((poll, house)) => Server::new(incumbent, signals, poll, house),
            Err(error) => {
                incumbent.retire();
                Err(error)
            }
        }
    }

    /// Goes on with everything that was taken over, whatever of it was registered ahead.
    pub(super) fn resume(
        taken: Taken<NoRequests>,
        service: &str,
        ahead: Ahead,
        signals: Signals,
        backlog: usize,
    ) -> anyhow::Result<Server> {
        let Taken { bundle, incumbent, from, pause } = taken;
        let (poll, house) = House::resume(bundle, service, &incumbent, ahead, backlog)?;
        tracing::info!(
            %from,
            peer_pid = from.pid,
            generation = incumbent.generation(),
            pause_us = pause.as_micros() as u64,
            clients = house.clients(),
            "took over"
        );
        Server::new(incumbent, signals, poll, house)
    }

    fn new(
        mut incumbent: Incumbent<NoRequests>,
        signals: Signals,
        poll: Poll,
        mut house: House,
    ) -> anyhow::Result<Server> {
        let registry = poll.registry();
        registry.register(&mut incumbent, INCUMBENT, Interest::READABLE)?;
        for signal in [signals.stop(), signals.upgrade()] {
            registry.register(&mut SourceFd(&signal.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        }
        house.ready();
        let address = house.door.address()?;
        tracing::info!(%address, control = %incumbent.path().display(), "listening");
        Ok(Server { poll, incumbent, signals, house, stopping: None })
    }

    /// Serves until the server is replaced, stopped, or fails.
    pub(super) fn run(mut self) -> Result<Exit, Failure> {
        let next = self.serve();
        match next {
            Ok(Next::Stop) => self.house.end(),
            Ok(Next::Leave) => self.house.leave(),
            _ => {}
        }
        // Does nothing if somebody else serves by now.
        self.incumbent.retire();
        next.map(|_| Exit::Done)
    }

    fn serve(&mut self) -> Result<Next, Failure> {
        let mut events = Events::with_capacity(EVENTS);
        // Bytes in outboxes raise no event: they are tried before anything is waited for.
        self.house.work(Instant::now(), true);
        self.show();
        loop {
            self.wait(&mut events)?;
            let mut next = self.look(&events);
            self.house.work(Instant::now(), self.stopping.is_none() && next == Next::Go);
            if next == Next::Go {
                next = self.answer(&events)?;
            }
            if next == Next::Go && self.stopping.is_none() {
                self.house.tell(&self.incumbent);
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
        let timers = [self.house.deadline(), self.stopping];
        let timer = timers.into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
        let work = self.house.has_more().then_some(Duration::ZERO);
        let patience = [work, timer, timeout(&self.incumbent)].into_iter().flatten().min();
        self.house.wait_for_store(self.poll.registry(), STORE).context("cannot wait for the store")?;
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
                // The store takes more: it is tried in each turn.
                INCUMBENT | STORE => {}
                SIGNALS => match self.signalled() {
                    Next::Go => {}
                    end => return end,
                },
                listener if listener == token(self.house.listener) => self.house.door.knock(),
                Token(id) => {
                    let readable = event.is_readable() || event.is_read_closed() || event.is_error();
                    let writable = event.is_writable() || event.is_write_closed();
                    self.house.switchboard.hear_of(ItemId(id as u64), readable, writable);
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
            let generation = self.incumbent.generation();
            tracing::warn!(generation, reason = refusal.message, "no upgrade");
        }
        if !self.signals.take_stop() {
            return Next::Go;
        }
        if self.stopping.is_none() && self.house.is_kept() {
            // Whoever keeps it decides whether there is a next process.
            self.incumbent.withdraw(Instant::now(), STOPPING);
            return Next::Leave;
        }
        self.stop()
    }

    /// The end for good was asked for: empties the outboxes first; a second request ends the server at once.
    fn stop(&mut self) -> Next {
        if self.stopping.is_some() {
            return Next::Stop;
        }
        let now = Instant::now();
        self.incumbent.withdraw(now, STOPPING);
        self.house.close(self.poll.registry());
        self.stopping = Some(now + STOP_WITHIN);
        Next::Go
    }

    /// What is due after a turn.
    fn go_on(&mut self) -> Next {
        let Some(until) = self.stopping else { return Next::Go };
        let unsent = self.house.switchboard.unsent();
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
                    match self.house.manifest() {
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
                    batch.send(|id| self.house.descriptor(id));
                    continue;
                }
                // A stop would be lost in an upgrade in place: the new program knows nothing of it.
                Turn::Freeze(freeze) if self.stopping.is_some() || self.signals.stop_waits() => {
                    freeze.resume(STOPPING);
                    continue;
                }
                // The successor does not know what waits.
                Turn::Freeze(freeze) if self.house.waits_for_store() => {
                    freeze.resume(WAITING);
                    continue;
                }
                // From here to the outcome nothing is touched: this thread is the only one, and it is here.
                Turn::Freeze(freeze) => match self.house.manifest() {
                    Ok(now) => {
                        self.house.switchboard.hand_over();
                        Notice::Thawed(freeze.release_all(now, |id| self.house.descriptor(id)))
                    }
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
                Notice::Thawed(outcome) => self.thaw(outcome)?,
                Notice::Quit => self.stop(),
            };
            if next != Next::Go {
                return Ok(next);
            }
        }
    }

    /// What comes after a freeze.
    fn thaw(&mut self, outcome: Result<Outcome, HandoverError>) -> Result<Next, Failure> {
        match outcome {
            Ok(Outcome::Taken(by)) => {
                self.house.replaced(&by);
                let generation = self.incumbent.generation();
                tracing::info!(peer_pid = by.pid, generation, items = by.items, "replaced by {by}");
                return Ok(Next::Replaced);
            }
            Ok(Outcome::Superseded(reason)) => {
                let what = "another process holds the service lock, so that this one may not serve; the takeover ended";
                return Err(Failure::new(Exit::Failed, anyhow!("{what} {reason}")));
            }
            Ok(Outcome::Resumed(reason)) => {
                let generation = self.incumbent.generation();
                tracing::warn!(generation, step = %reason.step, reason = %reason.cause, "serving on");
            }
            Err(error) => tracing::error!("serving on: {error}"),
        }
        self.house.switchboard.keep();
        Ok(Next::Go)
    }

    /// Tells status and successors what there is.
    fn show(&mut self) {
        handover::set_counters(&mut self.incumbent, self.house.switchboard.room().counters());
        if self.house.switchboard.take_changed() {
            self.incumbent.set_items(self.house.items());
        }
    }
}
