//! What a takeover costs. Each figure stands beside its floor, a minimal loop of the same system calls, measured in turn
//! with it in the same run: quote the ratio, since absolute times drift from machine to machine.
#![forbid(unsafe_code)]

mod figure;
mod floor;
mod takeover;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

use figure::Figure;

/// Measures what takeovers cost, beside minimal loops of the same system calls.
#[derive(Parser)]
#[command(name = "heirloom-bench", version, about, args_conflicts_with_subcommands = true)]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// One connection handed over between two processes: the pause (from the freeze to the first byte that the successor
    /// reads) and the whole (from the successor's connect to its serving), without the start of a process
    Takeover,
}

/// The processes of a measurement.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Library { control: PathBuf },
    #[command(hide = true)]
    LibraryFirst { control: PathBuf, server: String },
    #[command(hide = true)]
    Floor { control: PathBuf },
    #[command(hide = true)]
    FloorFirst { control: PathBuf, server: String },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Library { control }) => takeover::successor(&control),
        Some(Part::LibraryFirst { control, server }) => takeover::first(&control, &server),
        Some(Part::Floor { control }) => floor::successor(&control),
        Some(Part::FloorFirst { control, server }) => floor::first(&control, &server),
        None => measure(&cli),
    }
}

fn measure(cli: &Cli) -> anyhow::Result<()> {
    let suites = if cli.suites.is_empty() { Suite::value_variants() } else { &cli.suites };
    let mut figures = Vec::new();
    for suite in suites {
        match suite {
            Suite::Takeover => figures.extend(takeover::measure(if cli.quick { 20 } else { 300 })?),
        }
    }
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", figure::table(&figures))?;
    if let Some(path) = &cli.json {
        let json = serde_json::to_vec_pretty(&figures)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl Figure {
    /// The figures of one quantity: its median and its 99th percentile, each beside that of the floor.
    fn of(suite: &str, case: &str, values_ns: &[u64], floor_ns: &[u64]) -> [Figure; 2] {
        [("median", 50), ("p99", 99)].map(|(name, percent)| {
            let value = figure::percentile(values_ns, percent) as f64 / 1000.0;
            let floor = figure::percentile(floor_ns, percent) as f64 / 1000.0;
            Figure {
                suite: suite.into(),
                case: format!("{case}, {name}"),
                n: values_ns.len() as u64,
                value,
                unit: "µs".into(),
                floor,
                ratio: value / floor,
            }
        })
    }
}
