//! What a takeover costs, and a store. Each figure stands beside its floor, a minimal loop of the same system calls, measured in turn
//! with it in the same run: quote the ratio, since absolute times drift from machine to machine. The proxy stands beside those of
//! others instead.
#![forbid(unsafe_code)]

mod chain;
mod clients;
mod echo;
mod figure;
mod floor;
mod library;
mod member;
mod process;
mod proxy;
mod store;
mod suite;
mod way;

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Signal, set_parent_process_death_signal};

use figure::Figure;
use proxy::comparison::Comparison;
use proxy::contender::Contender;
use suite::Suite;
use way::Way;

const FLOOR: &str = "\
Each figure stands beside its floor: two real processes that make only the system calls that a takeover cannot do
without, blocking and unchecked. A connect to a path; one end of a SEQPACKET pair passed; two memfds written, sealed,
passed and read; the listener and the connections passed, 252 a packet, and registered with an epoll; one packet for
each that the library sends; the lock released and taken. Library and floor take over in turn, in the same run. The
start of a process is not part of any figure, nor is its end: one that was replaced lives on for 50 ms. The clients
are a process of their own. The floor of the store is a process that receives each datagram, and keeps or closes what
came with it. Quote the ratio: absolute times drift with the machine and its load.

The proxies (relay, reload, gap) stand beside each other, in turn in the same run; their floor is no proxy at all.";

/// Measures what takeovers and the store cost, beside minimal loops of the same system calls.
#[derive(Parser)]
#[command(name = "heirloom-bench", version, about, after_help = FLOOR, args_conflicts_with_subcommands = true)]
struct Cli {
    /// The suites to run [default: all]
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Few repetitions: shows that it works, not how fast
    #[arg(long)]
    quick: bool,
    /// With how many connections, such as `100,5000`; relay and reload have their own
    /// [default: 1,100,1000,5000,15000; in a quick run 1,100; of gap 10,100,1000,6000]
    #[arg(long, value_name = "COUNT", value_delimiter = ',')]
    connections: Vec<usize>,
    /// Which proxies to compare [default: all that are here]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    proxies: Vec<Contender>,
    /// Also write how the proxies compare into this directory, as plots (SVG) and tables (Markdown)
    #[arg(long, value_name = "DIRECTORY")]
    plot: Option<PathBuf>,
    /// Also write the figures to this file, as a JSON list of {suite, case, n, value, unit, floor, ratio}
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The processes of a measurement.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Server { way: Way, control: PathBuf, state_bytes: usize, first: Option<usize> },
    #[command(hide = true)]
    Clients { count: usize, servers: Vec<SocketAddr> },
    #[command(hide = true)]
    RunKeeper { directory: PathBuf, count: usize },
    #[command(hide = true)]
    FloorKeeper { directory: PathBuf, count: usize },
    #[command(hide = true)]
    Putter { count: usize },
    #[command(hide = true)]
    Keeper {
        #[arg(long)]
        cpu: Option<usize>,
        #[arg(long)]
        log: PathBuf,
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    #[command(hide = true)]
    Backend {
        #[arg(long)]
        cpu: Option<usize>,
    },
    #[command(hide = true)]
    Load {
        #[arg(long)]
        cpu: Option<usize>,
    },
    #[command(hide = true)]
    Crowd { to: SocketAddr, count: usize, echoing: usize },
    #[command(hide = true)]
    Sampling { to: SocketAddr, count: usize },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    heirloom::descriptors::raise_limit()?;
    if !matches!(cli.part, None | Some(Part::Keeper { .. })) {
        // The processes of a measurement that is broken off end with it; a keeper has others to end before.
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    match cli.part {
        Some(Part::Server { way, control, state_bytes, first }) => serve(way, &control, state_bytes, first),
        Some(Part::Clients { count, servers }) => clients::run(count, &servers),
        Some(Part::RunKeeper { directory, count }) => store::run_keeper(&directory, count),
        Some(Part::FloorKeeper { directory, count }) => store::floor_keeper(&directory, count),
        Some(Part::Putter { count }) => store::putter(count),
        Some(Part::Keeper { cpu, log, command }) => proxy::herd::keep(cpu, &log, &command),
        Some(Part::Backend { cpu }) => proxy::backend::run(cpu),
        Some(Part::Load { cpu }) => proxy::load::run(cpu),
        Some(Part::Crowd { to, count, echoing }) => proxy::crowd::run(to, count, echoing),
        Some(Part::Sampling { to, count }) => proxy::sampling::run(to, count),
        None => measure(&cli),
    }
}

/// A server of a chain: its first one with as many connections, or else a successor.
fn serve(way: Way, control: &Path, state_bytes: usize, first: Option<usize>) -> anyhow::Result<()> {
    match (way, first) {
        (Way::Library, Some(count)) => library::first(control, count, state_bytes),
        (Way::Library, None) => library::successor(control),
        (way, Some(count)) => floor::first(way, control, count, state_bytes),
        (way, None) => floor::successor(way, control, state_bytes),
    }
}

fn measure(cli: &Cli) -> anyhow::Result<()> {
    let suites = if cli.suites.is_empty() { Suite::value_variants() } else { &cli.suites };
    let (of_proxies, of_takeovers): (Vec<Suite>, Vec<Suite>) =
        suites.iter().partition(|suite| suite.is_of_proxies());
    if !of_proxies.is_empty() {
        proxy::check(&cli.proxies)?;
    }
    let mut figures = Vec::new();
    if !of_takeovers.is_empty() {
        measure_takeovers(&of_takeovers, cli, &mut figures)?;
    }
    if !of_proxies.is_empty() {
        measure_proxies(&of_proxies, cli, &mut figures)?;
    }
    if let Some(path) = &cli.json {
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn measure_takeovers(suites: &[Suite], cli: &Cli, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", figure::head())?;
    suite::measure(suites, &cli.connections, cli.quick, |measured| {
        for one in measured {
            writeln!(stdout, "{one}")?;
            figures.extend(one.figures());
        }
        Ok(())
    })
}

fn measure_proxies(suites: &[Suite], cli: &Cli, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    let mut compared: Vec<Comparison> = Vec::new();
    for &suite in suites {
        let mut first = true;
        proxy::measure(suite, &cli.proxies, &cli.connections, cli.quick, |comparison| {
            if std::mem::take(&mut first) {
                writeln!(stdout, "{}", comparison.head())?;
            }
            writeln!(stdout, "{comparison}")?;
            figures.extend(comparison.figures());
            compared.push(comparison);
            Ok(())
        })?;
    }
    match &cli.plot {
        Some(directory) => proxy::plot::write(&compared, directory),
        None => Ok(()),
    }
}
