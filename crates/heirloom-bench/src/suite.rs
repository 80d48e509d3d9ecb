//! The suites: what is measured, with how many connections, and how often.

use anyhow::bail;
use clap::ValueEnum;
use heirloom::descriptors;
use tempfile::TempDir;

use crate::chain::{Chain, Round};
use crate::figure::{Measured, Unit};
use crate::store;
use crate::way::Way;

/// With how many connections everything is measured.
const CONNECTIONS: [usize; 5] = [1, 100, 1000, 5000, 15_000];
/// The state of an item: none, and some that does not change between offer and freeze.
const STATES: [(usize, &str); 2] = [(0, "idle"), (100, "100 B each")];
/// How many pairs of chains share the rounds. Where the kernel happened to put the connections of a chain makes several per
/// cent, for as long as the chain lives.
const PAIRS: usize = 4;
/// With fewer connections none are sampled.
const FEWEST_SAMPLED: usize = 100;

/// What to measure. Of the floor, `floor.rs` has every system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// A descriptor's share of the time from the successor's connect until all have been sent, received and registered with
    /// its poller, and until they have been checked, too; by the library, and as others do it
    Transfer,
    /// From the incumbent's last turn to the return of the successor's first poll; and the gap: the longest that each of
    /// 100 sampled connections, which ask as fast as they are answered, waits for an answer during a takeover
    Pause,
    /// A descriptor's share of the time in which all are put into the store of `heirloom run` or of systemd, or removed from
    /// it, from the first message until the last is done with; and what a held one costs in memory
    Store,
    /// `heirloom proxy` beside HAProxy and nginx: throughput of streams, short connections a second, latency of small
    /// messages, processor time, memory of an idle connection
    Relay,
    /// The proxies with 6,000 connections, of which 600 echo without a pause, in 20 reloads and 20 upgrades: what is
    /// dropped, falsified or left behind, and how long it takes
    Reload,
    /// The longest that a message through a proxy waits for its answer in a handover, beside as much time without one
    Gap,
}

impl Suite {
    /// Whether it compares proxies.
    pub(crate) fn is_of_proxies(self) -> bool {
        matches!(self, Suite::Relay | Suite::Reload | Suite::Gap)
    }
}

/// How often things are done.
struct Repeat {
    /// Of each pair.
    rounds: usize,
    others: usize,
    sampled: usize,
    stores: usize,
}

/// Measures these suites of takeovers: at each number of connections all ways in turn, so that whatever else the machine does
/// meets them alike. `report` gets what has been measured, bit by bit.
pub(crate) fn measure(
    suites: &[Suite],
    counts: &[usize],
    quick: bool,
    mut report: impl FnMut(Vec<Measured>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (usual, repeat) = if quick {
        (&CONNECTIONS[..2], Repeat { rounds: 2, others: 3, sampled: 2, stores: 2 })
    } else {
        (&CONNECTIONS[..], Repeat { rounds: 15, others: 10, sampled: 10, stores: 20 })
    };
    let or = |usual: &'static [usize]| if counts.is_empty() { usual.to_vec() } else { counts.to_vec() };
    let held = or(if quick { &store::HELD[..2] } else { &store::HELD });
    let counts = or(usual);
    let needed = counts.iter().copied().max().unwrap_or(0) as u64 + 64;
    if descriptors::limit() < needed {
        bail!("a process needs {needed} descriptors, the limit is {}: raise it", descriptors::limit());
    }
    if counts.contains(&0) {
        bail!("without connections there is nothing to measure");
    }
    if suites.contains(&Suite::Store) {
        report(store::measure(&held, repeat.stores)?)?;
    }
    if suites == [Suite::Store] {
        return Ok(());
    }
    for count in counts {
        for (state_bytes, state) in STATES {
            let case = format!("{count} connection{}, {state}", if count == 1 { "" } else { "s" });
            let mut rounds = Vec::new();
            let mut pair = Pair::begin(count, state_bytes)?;
            for _ in 1..PAIRS {
                rounds.extend(pair.rounds(repeat.rounds)?);
                drop(pair);
                pair = Pair::begin(count, state_bytes)?;
            }
            rounds.extend(pair.rounds(repeat.rounds)?);
            if suites.contains(&Suite::Transfer) {
                report(vec![
                    transfer(&case, count as u64, &rounds, |round| round.transfer),
                    transfer(&format!("{case}: until checked"), count as u64, &rounds, |round| round.ready),
                ])?;
                if state_bytes == 0 {
                    report(others(count, &mut pair, repeat.others)?)?;
                }
            }
            if suites.contains(&Suite::Pause) {
                report(pause(&case, &rounds))?;
                if state_bytes == 0 && count >= FEWEST_SAMPLED {
                    report(gaps(count, &mut pair, repeat.sampled)?)?;
                }
            }
        }
    }
    Ok(())
}

/// The library, and beside it its floor.
struct Pair {
    library: Chain,
    floor: Chain,
    directory: TempDir,
}

impl Pair {
    fn begin(count: usize, state_bytes: usize) -> anyhow::Result<Pair> {
        let directory = tempfile::tempdir()?;
        Ok(Pair {
            library: Chain::begin(Way::Library, directory.path(), count, state_bytes)?,
            floor: Chain::begin(Way::Floor, directory.path(), count, state_bytes)?,
            directory,
        })
    }

    fn rounds(&mut self, rounds: usize) -> anyhow::Result<Vec<(Round, Round)>> {
        // Each has its turn at being first.
        let round = |number: usize| {
            if number.is_multiple_of(2) {
                let library = self.library.next()?;
                Ok((library, self.floor.next()?))
            } else {
                let floor = self.floor.next()?;
                Ok((self.library.next()?, floor))
            }
        };
        (0..rounds).map(round).collect()
    }
}

fn both(rounds: &[(Round, Round)], of: impl Fn(&Round) -> u64) -> (Vec<u64>, Vec<u64>) {
    rounds.iter().map(|(library, floor)| (of(library), of(floor))).unzip()
}

fn transfer(case: &str, count: u64, rounds: &[(Round, Round)], of: impl Fn(&Round) -> u64) -> Measured {
    let values = both(rounds, |round| of(round) / count);
    Measured::new("transfer", case.into(), Unit::Nanoseconds, values)
}

fn pause(case: &str, rounds: &[(Round, Round)]) -> Vec<Measured> {
    let measured = |part: &str, of: &dyn Fn(&Round) -> u64| {
        Measured::new("pause", format!("{case}{part}"), Unit::Microseconds, both(rounds, of))
    };
    vec![
        measured("", &|round| round.pause),
        measured(": until complete", &|round| round.pause_parts[0]),
        measured(": until taken", &|round| round.pause_parts[1]),
        measured(": until polled", &|round| round.pause_parts[2]),
    ]
}

/// The ways of others beside the same floor.
fn others(count: usize, pair: &mut Pair, rounds: usize) -> anyhow::Result<Vec<Measured>> {
    let mut all = Vec::new();
    for (way, name) in [(Way::OneAMessage, "one a message"), (Way::OneAConnection, "one a connection")] {
        let mut chain = Chain::begin(way, pair.directory.path(), count, 0)?;
        let rounds: Vec<(Round, Round)> =
            (0..rounds).map(|_| Ok((chain.next()?, pair.floor.next()?))).collect::<anyhow::Result<_>>()?;
        let case = format!("{count} connection{}, {name}", if count == 1 { "" } else { "s" });
        all.push(transfer(&case, count as u64, &rounds, |round| round.transfer));
    }
    Ok(all)
}

fn gaps(count: usize, pair: &mut Pair, rounds: usize) -> anyhow::Result<Vec<Measured>> {
    let (mut library, mut floor, mut unreplaced) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (gaps, watched) = pair.library.next_sampled()?;
        library.extend(gaps);
        floor.extend(pair.floor.next_sampled()?.0);
        unreplaced.extend(pair.library.sample_unreplaced(watched)?);
    }
    let measured = |what: &str, gaps: Vec<u64>| {
        let case = format!("{count} connections, gap{what}");
        Measured::new("pause", case, Unit::Microseconds, (gaps, floor.clone()))
    };
    Ok(vec![measured("", library), measured(" without a takeover", unreplaced)])
}
