//! The library's side of a measurement: a program that keeps its connections in a bundle, as a chat client does its one,
//! and a small state that is written anew at the freeze.

use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use heirloom::manifest::Delta;
use heirloom::runtime::blocking;
use heirloom::{
    Bundle, Cbor, Codec, Config, Incumbent, ItemId, NoRequests, Outcome, Replace, Service, Start, Turn,
};
use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use crate::chain::{Came, Left, connections, now, say};

const NAME: &str = "connection";

/// The state that travels: about what a chat client has.
#[derive(Serialize, Deserialize)]
struct State {
    unwritten: String,
    bytes_in: u64,
    bytes_out: u64,
}

/// The first incumbent of the chain.
pub(crate) fn first(control: &Path, count: usize) -> anyhow::Result<()> {
    let Start::Fresh(incumbent) = ask(control, Replace::Never)? else { bail!("somebody is there") };
    let mut bundle = Bundle::new();
    for connection in connections(count)? {
        bundle.add_plain(NAME, connection)?;
    }
    let state = State { unwritten: "x".repeat(100), bytes_in: 1, bytes_out: 1 };
    bundle.set_state(&state)?;
    say(&"serving")?;
    serve(incumbent, &bundle, &state)
}

/// A successor of the chain.
pub(crate) fn successor(control: &Path) -> anyhow::Result<()> {
    let began = now();
    let Start::Successor(successor) = ask(control, Replace::Must)? else { bail!("nobody hands over") };
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let offered = successor.receive()?;
    let bundle = offered.bundle();
    let mut last = ItemId::CONTROL;
    for entry in bundle.entries().filter(|entry| entry.id != ItemId::CONTROL) {
        let descriptor = bundle.descriptor(entry.id).context("an item without descriptor")?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&poller, descriptor, epoll::EventData::new_u64(entry.id.0), flags)?;
        last = entry.id;
    }
    let registered = now();
    let complete = offered.ready()?;
    let state: State = complete.bundle().state()?.context("no state came")?;
    let mut taken = complete.accept::<NoRequests>()?;
    let serving = now();
    let mut connection = taken.bundle.take_id::<TcpStream>(last)?.descriptor;
    connection.read_exact(&mut [0])?;
    let read = now();
    taken.bundle.add_plain(NAME, connection)?;
    say(&Came { began, registered, serving, read })?;
    serve(taken.incumbent, &taken.bundle, &state)
}

fn ask(control: &Path, replace: Replace) -> anyhow::Result<Start<NoRequests>> {
    Ok(heirloom::start(control, Service::new("measurement"), Config::default(), replace)?)
}

fn serve(mut incumbent: Incumbent, bundle: &Bundle, state: &State) -> anyhow::Result<()> {
    incumbent.set_items(bundle.entries().map(|entry| (entry.id, entry.name.clone(), entry.kind)));
    loop {
        blocking::wait(&incumbent, &mut Vec::new(), None)?;
        loop {
            match incumbent.turn(Instant::now())? {
                Turn::Idle => break,
                Turn::Offer(offer) => offer.begin_bundle(bundle)?,
                Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
                Turn::Freeze(freeze) => {
                    let frozen = now();
                    let state = Some(Cbor::encode(state)?);
                    let delta = Delta { state, next_id: bundle.next_id().0, ..Delta::default() };
                    return match freeze.release(delta, |id| bundle.descriptor(id))? {
                        Outcome::Taken(_) => say(&Left { frozen }),
                        outcome => bail!("a measurement failed: {outcome:?}"),
                    };
                }
                Turn::Request(asked) => asked.refuse("nothing to say"),
                Turn::Quit(_) | Turn::Closed(_) => {}
            }
        }
    }
}
