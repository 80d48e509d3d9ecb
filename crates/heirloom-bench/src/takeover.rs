//! The suites: what is measured of a takeover, and with how many connections.

use anyhow::bail;
use heirloom::descriptors;

use crate::chain::Rounds;
use crate::figure::{Figure, Unit};

/// With how many connections the costs that may grow with them are measured.
const CONNECTIONS: [usize; 4] = [1, 100, 1000, 5000];

/// One connection: how long nobody serves, and how long it takes altogether.
pub(crate) fn takeover(quick: bool) -> anyhow::Result<Vec<Figure>> {
    let rounds = Rounds::run(1, if quick { 20 } else { 300 })?;
    let pause = Figure::of("takeover", "pause", Unit::Microseconds, rounds.values(|round| round.pause));
    let whole = Figure::of("takeover", "whole", Unit::Microseconds, rounds.values(|round| round.whole));
    Ok([pause, whole].concat())
}

/// How long nobody serves, by connections that have not changed since the offer.
pub(crate) fn pause(quick: bool) -> anyhow::Result<Vec<Figure>> {
    by_connections(quick, |count, rounds| {
        let values = rounds.values(|round| round.pause);
        Figure::of("pause", &connections(count), Unit::Microseconds, values)
    })
}

/// What a descriptor costs from the connect until it is registered with the successor's poller.
pub(crate) fn transfer(quick: bool) -> anyhow::Result<Vec<Figure>> {
    by_connections(quick, |count, rounds| {
        let values = rounds.values(|round| round.transfer / count as u64);
        Figure::of("transfer", &connections(count), Unit::Nanoseconds, values)
    })
}

fn connections(count: usize) -> String {
    format!("{count} connection{}", if count == 1 { "" } else { "s" })
}

fn by_connections(
    quick: bool,
    figures: impl Fn(usize, &Rounds) -> [Figure; 2],
) -> anyhow::Result<Vec<Figure>> {
    let counts = if quick { &CONNECTIONS[..2] } else { &CONNECTIONS[..] };
    let needed = 2 * CONNECTIONS[counts.len() - 1] as u64 + 64;
    if descriptors::limit() < needed {
        bail!("this suite needs {needed} descriptors, the limit is {}: raise it", descriptors::limit());
    }
    let mut all = Vec::new();
    for &count in counts {
        all.extend(figures(count, &Rounds::run(count, if quick { 5 } else { 100 })?));
    }
    Ok(all)
}
