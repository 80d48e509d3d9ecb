//! The library's side of a measurement: an echo server on mio that keeps its connections in the bundle.
//!
//! A connection is borrowed from the bundle when it has something to read, so that a takeover leaves nothing to be done
//! for one that has not.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use heirloom::manifest::Delta;
use heirloom::runtime::mio::{register, timeout};
use heirloom::{Bundle, Config, Incumbent, ItemId, NoRequests, Outcome, Replace, Service, Start, Turn};
use mio::{Events, Interest, Poll, Token};

use crate::echo::echo;
use crate::member::{Came, connections, leave};
use crate::process::{now, say};

const NAME: &str = "connection";

/// The first incumbent of the chain.
pub(crate) fn first(control: &Path, count: usize, state_bytes: usize) -> anyhow::Result<()> {
    let Start::Fresh(mut incumbent) = ask(control, Replace::Never)? else { bail!("somebody is there") };
    let poll = Poll::new()?;
    let mut bundle = Bundle::new();
    for connection in connections(count)? {
        let id = bundle.add_encoded(NAME, connection, vec![b'x'; state_bytes])?;
        register(poll.registry(), descriptor(&bundle, id)?, token(id), Interest::READABLE)?;
    }
    poll.registry().register(&mut incumbent, token(ItemId::CONTROL), Interest::READABLE)?;
    say(&"serving")?;
    Server { poll, bundle, incumbent }.serve()
}

/// A successor of the chain.
pub(crate) fn successor(control: &Path) -> anyhow::Result<()> {
    let began = now();
    let Start::Successor(successor) = ask(control, Replace::Must)? else { bail!("nobody hands over") };
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    // Without the control listener, which is not lent.
    let (mut left, mut registered) = (successor.welcome().items - 1, 0);
    let offered = successor.receive_each(|item| {
        register(poll.registry(), item.descriptor(), token(item.id()), Interest::READABLE)?;
        left -= 1;
        if left == 0 {
            registered = now();
        }
        Ok(())
    })?;
    let checked = now();
    let ready = offered.ready()?;
    let complete = now();
    let mut came = ready.accept::<NoRequests>()?;
    let taken = now();
    poll.registry().register(&mut came.incumbent, token(ItemId::CONTROL), Interest::READABLE)?;
    poll.poll(&mut events, None)?;
    let polled = now();
    let server = Server { poll, bundle: came.bundle, incumbent: came.incumbent };
    for event in &events {
        server.answer(id(event.token()))?;
    }
    say(&Came { began, registered, checked, complete, taken, polled })?;
    server.serve()
}

struct Server {
    poll: Poll,
    bundle: Bundle,
    incumbent: Incumbent,
}

impl Server {
    fn serve(mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        // What is sent on the last connection from now on is for the successor's first poll to find.
        let last = self.bundle.entries().last().map(|entry| entry.id);
        let connections = self.bundle.entries().filter(|entry| entry.id != ItemId::CONTROL);
        self.incumbent.set_items(connections.map(|entry| (entry.id, entry.name.clone(), entry.kind)));
        loop {
            self.poll.poll(&mut events, timeout(&self.incumbent))?;
            let mut due = self.incumbent.deadline().is_some_and(|at| at <= Instant::now());
            for event in &events {
                match id(event.token()) {
                    ItemId::CONTROL => due = true,
                    id if Some(id) == last => {}
                    id => self.answer(id)?,
                }
            }
            if due && let Some(frozen) = self.turns()? {
                return leave(frozen);
            }
        }
    }

    fn answer(&self, id: ItemId) -> anyhow::Result<()> {
        if id == ItemId::CONTROL { Ok(()) } else { echo(descriptor(&self.bundle, id)?) }
    }

    /// Lets the incumbent do what it has to do; when its last turn began, once this process was replaced.
    fn turns(&mut self) -> anyhow::Result<Option<u64>> {
        loop {
            let began = now();
            match self.incumbent.turn(Instant::now())? {
                Turn::Idle => return Ok(None),
                Turn::Offer(offer) => offer.begin_bundle(&self.bundle)?,
                Turn::Batch(batch) => {
                    batch.send(|id| self.bundle.descriptor(id));
                    // The connections have their turn between two batches.
                    return Ok(None);
                }
                Turn::Freeze(freeze) => {
                    let delta = Delta { next_id: self.bundle.next_id().0, ..Delta::default() };
                    return match freeze.release(delta, |id| self.bundle.descriptor(id))? {
                        Outcome::Taken(_) => Ok(Some(began)),
                        outcome => bail!("a measurement failed: {outcome:?}"),
                    };
                }
                Turn::Request(asked) => asked.refuse("nothing to say"),
                Turn::Quit(_) | Turn::Closed(_) | Turn::Delegated(_) => {}
            }
        }
    }
}

fn ask(control: &Path, replace: Replace) -> anyhow::Result<Start<NoRequests>> {
    Ok(heirloom::start(control, Service::new("measurement"), Config::default(), replace)?)
}

fn descriptor(bundle: &Bundle, id: ItemId) -> anyhow::Result<BorrowedFd<'_>> {
    bundle.descriptor(id).context("an item without descriptor")
}

fn token(id: ItemId) -> Token {
    Token(id.0 as usize)
}

fn id(token: Token) -> ItemId {
    ItemId(token.0 as u64)
}
