//! How a proxy comes to serve: afresh, or in the place of one that serves already.

use std::path::Path;

use anyhow::{Context, anyhow};
use heirloom::{Bundle, NoRequests, Service, Start, Successor, Taken, courtesy};
use heirloom_proxy::config::ConfigError;
use heirloom_proxy::{Config, Prepared, Ready};

use super::Args;
use super::server::Server;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::{Hangup, Signals};

/// What a proxy is called at its control socket, whatever it is configured to do: that may change.
pub(super) const SERVICE: &str = "proxy";

/// Runs until the proxy is replaced, stopped, or fails.
pub(super) fn serve(args: &Args) -> Result<Exit, Failure> {
    // Others serve: our own threads that relay, or an incumbent.
    courtesy::give_way();
    heirloom::descriptors::raise_limit().context("cannot raise the limit on open files")?;
    // Before the start: see there.
    let signals = Signals::watch(Hangup::Upgrade)?;
    let path = args.control()?;
    let config = match args.config() {
        Ok(config) => config,
        Err(error) => {
            if heirloom::upgrade::is_asked()
                && let Err(failure) = answer(args, &path, &error)
            {
                tracing::warn!("the incumbent was not told: {failure}");
            }
            return Err(Failure::new(Exit::Failed, error));
        }
    };
    loop {
        match start(args, &path)? {
            Start::Fresh(incumbent) => {
                let engine = match fresh(config) {
                    Ok(ready) => ready.start(Bundle::new()),
                    Err(error) => {
                        incumbent.retire();
                        return Err(error.into());
                    }
                };
                return Server::new(incumbent, engine, signals)?.run();
            }
            Start::Successor(successor) => match take_over(successor, config.clone()) {
                Err(failure) if failure.incumbent_died && args.replace() == heirloom::Replace::Try => {
                    tracing::warn!("{failure}; starting again");
                }
                taken => {
                    let (taken, ready) = taken?;
                    return resume(taken, ready, signals, "took over");
                }
            },
            Start::InPlace(taken) => {
                // Nobody serves until this does.
                courtesy::take_turns();
                let prepared = Prepared::in_place(config).map_err(anyhow::Error::from)?;
                let ready = prepared.offer(&taken.bundle).map_err(anyhow::Error::from)?;
                return resume(*taken, ready, signals, "upgraded in place");
            }
            Start::Preflight(preflight) => {
                let checked = Prepared::new(config).and_then(|prepared| prepared.check(preflight.base()));
                match checked {
                    Ok(()) => preflight.pass()?,
                    Err(error) => preflight.refuse(error)?,
                }
                return Ok(Exit::Done);
            }
            Start::Older(_) => {
                let error = anyhow!("the incumbent speaks protocol 0, in which no proxy can be handed over");
                return Err(Failure::new(Exit::Refused, error));
            }
        }
    }
}

fn start(args: &Args, path: &Path) -> Result<Start<NoRequests>, Failure> {
    let service = Service::new(SERVICE).program("heirloom", env!("CARGO_PKG_VERSION"));
    let delegate = heirloom::Delegate { status: true, ..heirloom::Delegate::default() };
    // A takeover finds out whatever a preflight would, before anything is frozen.
    let preflights = heirloom::Preflights::InPlace;
    let settings =
        heirloom::Config { force: args.force(), delegate, preflights, ..heirloom::Config::default() };
    Ok(heirloom::start(path, service, settings, args.replace())?)
}

/// Tells the incumbent that has started this process what is wrong with the configuration.
fn answer(args: &Args, path: &Path, wrong: &ConfigError) -> Result<(), Failure> {
    match start(args, path)? {
        Start::Preflight(preflight) => preflight.refuse(wrong)?,
        Start::Successor(successor) => successor.withdraw(wrong),
        _ => {}
    }
    Ok(())
}

fn fresh(config: Config) -> anyhow::Result<Ready> {
    Ok(Prepared::new(config)?.offer(&Bundle::new())?)
}

/// Takes everything over, with what costs time done while the incumbent still serves.
fn take_over(successor: Successor, config: Config) -> Result<(Taken<NoRequests>, Ready), Failure> {
    let mut prepared = match Prepared::new(config) {
        Ok(prepared) => prepared,
        Err(error) => {
            successor.withdraw(&error);
            return Err(rolled_back(error));
        }
    };
    let offered = successor.receive_each(|item| prepared.register(item.entry()?, item.descriptor()))?;
    let mut ready = match prepared.offer(offered.bundle()) {
        Ok(ready) => ready,
        Err(error) => {
            offered.withdraw(&error);
            return Err(rolled_back(error));
        }
    };
    courtesy::take_turns();
    let complete = offered.ready()?;
    if let Err(error) = ready.complete(complete.bundle(), complete.changes()) {
        complete.withdraw(&error);
        return Err(rolled_back(error));
    }
    Ok((complete.accept()?, ready))
}

fn resume(taken: Taken<NoRequests>, ready: Ready, signals: Signals, how: &str) -> Result<Exit, Failure> {
    let Taken { bundle, incumbent, from, pause } = taken;
    let engine = ready.start(bundle);
    courtesy::give_way();
    tracing::info!(
        %from,
        peer_pid = from.pid,
        generation = incumbent.generation(),
        pause_us = pause.as_micros() as u64,
        connections = engine.connections(),
        "{how}"
    );
    // With its pidfd, which nobody needs any more.
    drop(from);
    Server::new(incumbent, engine, signals)?.run()
}

fn rolled_back(error: heirloom_proxy::EngineError) -> Failure {
    let error = anyhow!(error).context("the incumbent serves on");
    Failure::new(Exit::RolledBack, error)
}
