//! What a takeover costs. Each figure stands beside its floor, a minimal loop of the same system calls, measured in turn
//! with it in the same run: quote the ratio, since absolute times drift from machine to machine.
#![forbid(unsafe_code)]

mod chain;
mod figure;
mod floor;
mod library;
mod takeover;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

const FLOOR: &str = "\
Each figure stands beside its floor: two real processes that make only the system calls that a takeover cannot do
without, blocking and unchecked. A connect to a path; one end of a SEQPACKET pair passed; two memfds written, sealed,
passed and read; the listener and the connections passed, 252 a packet, and registered with an epoll; one packet for
each that the library sends; the lock released and taken. Library and floor take over in turn, in the same run. The
start of a process is not part of any figure. Quote the ratio: absolute times drift with the machine and its load.";

/// Measures what takeovers cost, beside minimal loops of the same system calls.
#[derive(Parser)]
#[command(name = "heirloom-bench", version, about, after_help = FLOOR, args_conflicts_with_subcommands = true)]
struct Cli {
    /// The suites to run [default: all]
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Few repetitions: shows that it works, not how fast
    #[arg(long)]
    quick: bool,
    /// Also write the figures to this file, as a JSON list of {suite, case, n, value, unit, floor, ratio}
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What to measure. Of the floor, `floor.rs` has every system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// One connection: the pause (from the incumbent's freeze to the first byte that the successor reads) and the whole
    /// (from the successor's connect at the control socket until it serves)
    Takeover,
    /// The pause with 1, 100, 1,000 and 5,000 connections that have not changed since the offer
    Pause,
    /// A descriptor's share of the time from the successor's connect until all are registered with its poller, at 1,
    /// 100, 1,000 and 5,000 connections
    Transfer,
}

/// The processes of a measurement.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Library { control: PathBuf },
    #[command(hide = true)]
    LibraryFirst { control: PathBuf, connections: usize },
    #[command(hide = true)]
    Floor { control: PathBuf },
    #[command(hide = true)]
    FloorFirst { control: PathBuf, connections: usize },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    heirloom::descriptors::raise_limit()?;
    match cli.part {
        Some(Part::Library { control }) => library::successor(&control),
        Some(Part::LibraryFirst { control, connections }) => library::first(&control, connections),
        Some(Part::Floor { control }) => floor::successor(&control),
        Some(Part::FloorFirst { control, connections }) => floor::first(&control, connections),
        None => measure(&cli),
    }
}

fn measure(cli: &Cli) -> anyhow::Result<()> {
    let suites = if cli.suites.is_empty() { Suite::value_variants() } else { &cli.suites };
    let mut figures = Vec::new();
    for suite in suites {
        figures.extend(match suite {
            Suite::Takeover => takeover::takeover(cli.quick)?,
            Suite::Pause => takeover::pause(cli.quick)?,
            Suite::Transfer => takeover::transfer(cli.quick)?,
        });
    }
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", figure::table(&figures))?;
    if let Some(path) = &cli.json {
        let json = serde_json::to_vec_pretty(&figures)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
