//! `heirloom chat --listen`: a chat server that can be replaced with every client connected.
//!
//! It speaks as `ncat -l --chat` does: everybody hears who comes and goes, and what each says, marked with the name of who
//! says it. Where it differs:
//!
//! - What a client says is passed on line by line. ncat passes on what each of its reads has brought, so that a line may be
//!   marked more than once in its middle, or not end before the next one.
//! - UTF-8 passes; ncat escapes every byte from 128 on. See [`escape`].
//! - Only who comes is told who is there already; ncat tells everybody, each time.
//! - A client that does not read is cut off when more than a backlog is unsent. In the meantime nobody waits for it.
//! - User numbers are not used again.
//!
//! Under a supervisor with a store it can also be killed, and the next process goes on with every client connected and no line
//! lost: see [`switchboard`], [`recovery`] and [`keeper`].

mod client;
mod connection;
mod door;
mod escape;
mod event;
mod handover;
mod house;
mod ids;
mod journal;
mod keeper;
#[cfg(test)]
mod killed;
mod lines;
mod outbox;
mod recovery;
mod room;
mod server;
pub(super) mod size;
mod switchboard;

use anyhow::{Context, anyhow};
use heirloom::{Config, NoRequests, Replace, Service, Start, Successor, Taken};

use super::{Args, resolve};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::{Hangup, Signals};
use handover::Ahead;
use server::Server;

/// Runs until the server is replaced, stopped, or fails.
pub(super) fn run(args: &Args) -> Result<Exit, Failure> {
    heirloom::descriptors::raise_limit().context("cannot raise the limit on open files")?;
    // Before the start: see there.
    let signals = Signals::watch(Hangup::Stop)?;
    let addresses = resolve(&args.address)?;
    let path = args.target.path("chat-listen", &args.address)?;
    let replace = args.replace.into();
    let service = service(&args.address);
    let config = Config { limits: handover::limits(), force: args.force, ..Config::default() };
    let server = loop {
        match heirloom::start::<NoRequests>(&path, service.clone(), config.clone(), replace)? {
            Start::Fresh(incumbent) => {
                break Server::fresh(incumbent, &service.name, &addresses, signals, args.backlog)?;
            }
            Start::Successor(successor) => match take_over(successor) {
                Err(failure) if failure.incumbent_died && replace == Replace::Try => {
                    tracing::warn!("{failure}; starting again");
                }
                taken => {
                    let (taken, ahead) = taken?;
                    break Server::resume(taken, &service.name, ahead, signals, args.backlog)?;
                }
            },
            Start::InPlace(taken) => {
                break Server::resume(*taken, &service.name, Ahead::nothing()?, signals, args.backlog)?;
            }
            Start::Preflight(preflight) => {
                match handover::check(preflight.entries()) {
                    Ok(()) => preflight.pass()?,
                    Err(error) => preflight.refuse(format!("{error:#}"))?,
                }
                return Ok(Exit::Done);
            }
            Start::Older(_) => {
                let error = anyhow!(
                    "the incumbent speaks protocol 0, in which no server can be handed over; end it first (heirloom quit)"
                );
                return Err(Failure::new(Exit::Refused, error));
            }
        }
    };
    server.run()
}

/// What the chat server at this address is called at the control socket.
fn service(address: &str) -> Service {
    Service::new(format!("chat server {address}")).program("heirloom", env!("CARGO_PKG_VERSION"))
}

/// Takes everything over, with what costs time done while the incumbent still serves.
fn take_over(successor: Successor) -> Result<(Taken<NoRequests>, Ahead), Failure> {
    let offered = successor.receive()?;
    // What cannot be read now would not be readable in the freeze either.
    let ahead =
        handover::check(offered.bundle().entries()).and_then(|()| Ok(Ahead::everything(offered.bundle())?));
    let ahead = match ahead {
        Ok(ahead) => ahead,
        Err(error) => {
            offered.withdraw(format!("{error:#}"));
            return Err(rolled_back(error));
        }
    };
    let complete = offered.ready()?;
    if let Err(error) = handover::check(complete.bundle().entries()) {
        complete.withdraw(format!("{error:#}"));
        return Err(rolled_back(error));
    }
    Ok((complete.accept::<NoRequests>()?, ahead))
}

fn rolled_back(error: anyhow::Error) -> Failure {
    Failure::new(Exit::RolledBack, error.context("cannot use what the incumbent hands over; it serves on"))
}
