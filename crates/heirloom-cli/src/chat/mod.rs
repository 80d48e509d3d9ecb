//! The command `heirloom chat`: a TCP chat client that can be replaced while it runs; with `--listen` a [server](listen).
//!
//! A new one that is started with the same control socket takes the connection over from the old one, with what the
//! old one has read and not yet written, and the old one ends. The server notices nothing; the outputs of all of them,
//! one after the other, are what the server sent, byte for byte.

mod begin;
mod buffer;
mod bytes;
mod client;
mod conduit;
mod connect;
mod items;
mod kept;
mod listen;
mod note;
mod older;
mod pump;
mod queue;
mod reconnect;
mod stdio;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use heirloom::upgrade::Preflight;
use heirloom::{Config, Incumbent, Replace, Service, Start};

use crate::control::{self, DEFAULT_ADDRESS, Target};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;
use crate::replace::ReplaceArg;
use crate::signals::{Hangup, Signals};
use begin::Beginning;
use client::Client;
use older::ChatRequest;
use pump::PumpState;

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
    /// Take over from a chat in a unit (systemd's service or scope) that this process is no part of; its supervisor may then start another
    #[arg(long)]
    force: bool,
    /// How long to keep the connection for a successor after stdout was closed
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = humantime::parse_duration)]
    linger: Duration,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Connects to the TCP server at ADDR, copies what it sends to stdout, and sends it what comes from stdin. A chat that is \
started with the same control socket takes the connection over, with all that was read and not yet passed on, and the \
old one ends with status 0. The server notices nothing, and no byte is lost, repeated or reordered.

The end of stdin is not the end: the chat goes on receiving. A connection that is lost is made anew, after 1, 8, 27 ... ms, \
the cube of the number of failures in quick succession, and at most 500 ms; the 20th ends the chat with status 1.

When nobody reads stdout any more, the chat stops reading and keeps the connection for a successor, which gets everything; if \
none comes within the time of --linger, it ends with status 1. A stdout that fails in another way, for a full disk say, is tried \
again every second.

Stdin, stdout and stderr are each process's own and are not handed over.

Under a supervisor that keeps descriptors, heirloom-run(1) or systemd, a chat that is killed loses nothing: the next one goes on \
with its connection, stdin and stdout, and with every byte that was on its way. A chat that is told to end leaves the connection to \
the supervisor, for a restart.

A chat that such a supervisor runs in a unit of systemd's, a service or the scope of a terminal, is not replaced from outside of that \
unit: the status is 4. Let systemctl(1) reload it, or heirloom-upgrade(1). With --force it is replaced all the same; its supervisor, which \
takes the service for ended then, may start another one, and that one takes over back.

With --listen it is the chat server instead: it listens at ADDR, and passes on each line of a client to all others with \
\"<userN> \" before it, N being the client's number; it announces who comes and who leaves. Control characters are escaped. A client \
that does not read is cut off when more than --backlog is unsent to it. A server that is started with the same control socket takes \
over the listener and every client, with half-received lines and what is unsent. Under a supervisor that keeps descriptors it can be \
killed, too: the next one goes on with every client, and no line is lost. It uses neither stdin nor stdout.",
    exits: Exit::ALL,
    signals: &[
        (
            "SIGTERM, SIGINT, SIGHUP",
            "The chat takes in nothing more, writes and sends what it has for at most a second, and ends with status 0. A \
             second signal ends it at once. Under a supervisor that keeps descriptors what is left then is the next one's; a server \
             ends at once there, and no connection does. heirloom-quit(1) is for good.",
        ),
        (
            "SIGUSR2",
            "Upgrades the chat, as heirloom-upgrade(1) without options does. If that fails, the log says why, and the chat \
             goes on.",
        ),
        (
            "SIGTTIN",
            "Stops a chat that reads the terminal in the background, as any process. Give it </dev/null there.",
        ),
    ],
    files: &[control::SOCKET, control::LOCK],
    environment: &[
        control::RUNTIME_DIRECTORY,
        (
            "NOTIFY_SOCKET, LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID, HEIRLOOM_STORE",
            "What a supervisor says that keeps descriptors; the chat tells it what to keep, and when it is ready (sd_notify(3)).",
        ),
        ("WATCHDOG_USEC, WATCHDOG_PID", "How often the supervisor wants to hear that the chat is alive."),
    ],
    examples: &[
        ("heirloom chat", "Joins the server at 127.0.0.1:31337. Started again in another terminal, takes the connection over."),
        (
            "heirloom chat 127.0.0.1:6667 --name log </dev/null >>log",
            "Appends what a server sends to a file. The same command, started again, takes over without a gap in it.",
        ),
        (
            "heirloom run -- heirloom chat >>log",
            "Is started again when it is killed, and goes on without a gap, on the same connection.",
        ),
        ("heirloom chat --listen", "Is the server at 127.0.0.1:31337 that the first example joins."),
    ],
    see_also: &["heirloom-run(1)", "heirloom-status(1)", "heirloom-upgrade(1)", "heirloom-quit(1)"],
};

/// Runs until the chat is replaced, stopped, or fails.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    if args.listen {
        return listen::run(&args);
    }
    heirloom::descriptors::raise_limit().context("cannot raise the limit on open files")?;
    let signals = Signals::watch(Hangup::Stop)?;
    let addresses = resolve(&args.address)?;
    let path = args.target.path("chat", &args.address)?;
    let service = service(&args.address);
    let replace = args.replace.into();
    let config = Config { force: args.force, ..Config::default() };
    let (incumbent, beginning, handed_over) = loop {
        match heirloom::start::<ChatRequest>(&path, service.clone(), config.clone(), replace)? {
            Start::Fresh(incumbent) => {
                tracing::info!(control = %path.display(), server = args.address, "serving");
                break (incumbent, Beginning::fresh(&path, &service.name)?, false);
            }
            Start::Successor(successor) => match take_over(successor, &path) {
                Err(failure) if failure.incumbent_died && replace == Replace::Try => {
                    tracing::warn!("{failure}; starting again");
                }
                taken => {
                    let (incumbent, beginning) = taken?;
                    break (incumbent, beginning, true);
                }
            },
            Start::InPlace(taken) => {
                let (incumbent, beginning) = go_on(*taken, true, &path);
                break (incumbent, beginning, true);
            }
            Start::Preflight(preflight) => return answer(preflight),
            Start::Older(older) => {
                let (incumbent, socket) = older::take_over(older)?;
                break (incumbent, Beginning::older(socket, &path), true);
            }
        }
    };
    let (pump, items, kept) = beginning.pump(addresses, &service.name)?;
    Client::new(incumbent, pump, items, kept, signals, args.linger).run(handed_over)
}

/// The schema of a state beside which there are pipes with bytes, and a store that holds them.
const WITH_STORE: u32 = 2;
/// That of a state in which everything is.
const WITHOUT_STORE: u32 = 1;

/// What the chat client with a server at this address is called at the control socket.
///
/// A program that knows nothing of pipes would lose what is in them, and leave the store with what is no longer so: where
/// there is a supervisor it is refused.
fn service(address: &str) -> Service {
    let supervised = heirloom::notify::is_supervised();
    Service::new(format!("chat {address}"))
        .program("heirloom", env!("CARGO_PKG_VERSION"))
        .schema(if supervised { WITH_STORE } else { WITHOUT_STORE }, WITHOUT_STORE..=WITH_STORE)
}

fn take_over(
    successor: heirloom::Successor,
    control: &Path,
) -> Result<(Incumbent<ChatRequest>, Beginning), Failure> {
    let offered = successor.receive()?;
    // What cannot be read now would not be readable in the freeze either.
    if let Err(error) = offered.bundle().state::<PumpState>() {
        offered.withdraw(&error);
        return Err(rolled_back(error));
    }
    let complete = offered.ready()?;
    if let Err(error) = complete.bundle().state::<PumpState>() {
        complete.withdraw(&error);
        return Err(rolled_back(error));
    }
    Ok(go_on(complete.accept::<ChatRequest>()?, false, control))
}

/// Goes on with what was handed over. `in_place` says that stdin and stdout are the same as before.
fn go_on(
    taken: heirloom::Taken<ChatRequest>,
    in_place: bool,
    control: &Path,
) -> (Incumbent<ChatRequest>, Beginning) {
    tracing::info!(
        from = %taken.from,
        peer_pid = taken.from.pid,
        generation = taken.incumbent.generation(),
        pause_us = taken.pause.as_micros() as u64,
        "{}",
        if in_place { "upgraded in place" } else { "took over" }
    );
    (taken.incumbent, Beginning::taken(taken.bundle, in_place, control))
}

/// Answers an incumbent that asks whether this program could take over.
fn answer(preflight: Preflight) -> Result<Exit, Failure> {
    match preflight.state::<PumpState>() {
        Ok(_) => preflight.pass()?,
        Err(error) => preflight.refuse(error)?,
    }
    Ok(Exit::Done)
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
        return Err(anyhow!("no address belongs to {address:?}; give another").into());
    }
    Ok(addresses)
}
