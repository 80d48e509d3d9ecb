//! The command `heirloom chat`: a TCP chat client that can be replaced while it runs; with `--listen` a [server](listen).
//!
//! A new one that is started with the same control socket takes the connection over from the old one, with what the
//! old one has read and not yet written, and the old one ends. The server notices nothing; the outputs of all of them,
//! one after the other, are what the server sent, byte for byte.

mod buffer;
mod bytes;
mod client;
mod connect;
mod listen;
mod older;
mod pump;
mod reconnect;
mod stdio;

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use heirloom::{Config, Incumbent, Replace, Service, Start};

use crate::control::Target;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::Signals;
use client::{ChatRequest, Client};
use pump::{Pump, PumpState};
use stdio::{Input, Output};

/// Where the chat server is if nothing else is said.
pub(crate) const DEFAULT_ADDRESS: &str = "127.0.0.1:31337";

/// The name of the connection among the items.
const SERVER: &str = "server";

/// The options of `heirloom chat`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// The chat server's address, HOST:PORT; with --listen where to be one (port 0: any that is free)
    #[arg(value_name = "ADDR", default_value = DEFAULT_ADDRESS)]
    address: String,
    /// Be the chat server instead, for `heirloom chat`, ncat and the like
    #[arg(long, conflicts_with = "linger")]
    listen: bool,
    /// With --listen: how much may be unsent to a client before it is cut off, in bytes, or with a suffix k or M
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = listen::size::parse, requires = "listen")]
    backlog: usize,
    #[command(flatten)]
    target: Target,
    /// Whether to take over from a chat that already runs there: never is an error if there is one, must if there is none
    #[arg(long, value_enum, default_value_t = ReplaceArg::Try)]
    replace: ReplaceArg,
    /// How long to keep the connection for a successor after stdout was closed
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = humantime::parse_duration)]
    linger: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ReplaceArg {
    #[value(alias = "nope")]
    Never,
    Try,
    Must,
}

impl From<ReplaceArg> for Replace {
    fn from(replace: ReplaceArg) -> Self {
        match replace {
            ReplaceArg::Never => Replace::Never,
            ReplaceArg::Try => Replace::Try,
            ReplaceArg::Must => Replace::Must,
        }
    }
}

/// Runs until the chat is replaced, stopped, or fails.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    if args.listen {
        return listen::run(&args);
    }
    heirloom::descriptors::raise_limit().context("cannot raise the limit on open files")?;
    let signals = Signals::watch()?;
    let addresses = resolve(&args.address)?;
    let path = args.target.path("chat", &args.address)?;
    let service = service(&args.address);
    let replace = args.replace.into();
    let (incumbent, state, socket) = loop {
        match heirloom::start::<ChatRequest>(&path, service.clone(), Config::default(), replace)? {
            Start::Fresh(incumbent) => {
                tracing::info!(control = %path.display(), server = args.address, "serving");
                break (incumbent, PumpState::default(), None);
            }
            Start::Successor(successor) => match take_over(successor) {
                Err(failure) if failure.incumbent_died && replace == Replace::Try => {
                    tracing::warn!("{failure}; starting again");
                }
                taken => break taken?,
            },
            Start::Older(older) => break older::take_over(older)?,
        }
    };
    let config = pump::Config {
        addresses,
        input: Input::stdin().context("cannot use stdin")?,
        output: Output::stdout().context("cannot use stdout")?,
    };
    Client::new(incumbent, Pump::resume(config, state, socket), signals, args.linger).run()
}

/// What the chat client with a server at this address is called at the control socket.
pub(crate) fn service(address: &str) -> Service {
    Service::new(format!("chat {address}")).program("heirloom", env!("CARGO_PKG_VERSION"))
}

fn take_over(
    successor: heirloom::Successor,
) -> Result<(Incumbent<ChatRequest>, PumpState, Option<TcpStream>), Failure> {
    let offered = successor.receive()?;
    // What cannot be read now would not be readable in the freeze either.
    if let Err(error) = offered.bundle().state::<PumpState>() {
        offered.withdraw(&error);
        return Err(rolled_back(error));
    }
    let complete = offered.ready()?;
    let mut state: PumpState = match complete.bundle().state() {
        Ok(state) => state.unwrap_or_default(),
        Err(error) => {
            complete.withdraw(&error);
            return Err(rolled_back(error));
        }
    };
    let mut taken = complete.accept::<ChatRequest>()?;
    tracing::info!(
        from = %taken.from,
        generation = taken.incumbent.generation(),
        pause_us = taken.pause.as_micros() as u64,
        "took over"
    );
    // A stdin of its own: what the incumbent's had to say of its end does not matter here.
    state.stdin_open = true;
    let socket = taken.bundle.take_all::<TcpStream>(SERVER).pop().map(|taken| taken.descriptor);
    for entry in taken.bundle.close_rest() {
        tracing::warn!(item = %entry, "closed an item that this version does not know");
    }
    Ok((taken.incumbent, state, socket))
}

fn rolled_back(error: heirloom::BundleError) -> Failure {
    let error = anyhow!(error).context("cannot read what the incumbent hands over; it serves on");
    Failure::new(Exit::RolledBack, error)
}

fn resolve(address: &str) -> Result<Vec<SocketAddr>, Failure> {
    let addresses: Vec<SocketAddr> = address
        .to_socket_addrs()
        .with_context(|| format!("cannot find the address {address:?}; it is written HOST:PORT"))?
        .collect();
    if addresses.is_empty() {
        return Err(anyhow!("no address belongs to {address:?}").into());
    }
    Ok(addresses)
}
