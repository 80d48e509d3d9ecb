//! The suite `takeover`: one connection is handed over from process to process, by the library and by the floor in turn.
//!
//! Each successor says how long it took and becomes the incumbent of the next, so that every round has a fresh process; its
//! start is not measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use heirloom::runtime::blocking;
use heirloom::{Bundle, Config, Incumbent, NoRequests, Outcome, Replace, Service, Start, Turn};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::figure::Figure;

/// What a successor has measured, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Round {
    /// From the incumbent's freeze to the first byte that the successor reads.
    pub(crate) pause: u64,
    /// From the successor's connect until it serves.
    pub(crate) whole: u64,
}

/// The state that travels: about what a chat client has.
#[derive(Serialize, Deserialize)]
struct State {
    unwritten: String,
    bytes_in: u64,
    bytes_out: u64,
}

/// Measures this many takeovers of each kind.
pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let directory = tempfile::tempdir()?;
    let mut library = Chain::begin("library", directory.path())?;
    let mut floor = Chain::begin("floor", directory.path())?;
    let (mut measured, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        measured.push(library.next()?);
        floors.push(floor.next()?);
    }
    let of = |case, part: fn(&Round) -> u64| {
        let values = |rounds: &[Round]| rounds.iter().map(part).collect::<Vec<u64>>();
        Figure::of("takeover", case, &values(&measured), &values(&floors))
    };
    Ok([of("pause", |round| round.pause), of("whole", |round| round.whole)].concat())
}

/// Processes that take over from each other, and the server at the other end of their connection.
struct Chain {
    kind: &'static str,
    control: std::path::PathBuf,
    server: TcpStream,
    incumbent: (Child, BufReader<ChildStdout>),
}

impl Chain {
    fn begin(kind: &'static str, directory: &Path) -> anyhow::Result<Self> {
        let control = directory.join(format!("{kind}.sock"));
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let mut incumbent = start(&[&format!("{kind}-first")], &control, Some(&address))?;
        let (server, _) = listener.accept()?;
        expect_line(&mut incumbent.1)?;
        Ok(Chain { kind, control, server, incumbent })
    }

    fn next(&mut self) -> anyhow::Result<Round> {
        // What the successor reads first is there before it asks.
        self.server.write_all(b".")?;
        let mut successor = start(&[self.kind], &self.control, None)?;
        let round = serde_json::from_str(&expect_line(&mut successor.1)?)?;
        let status = self.incumbent.0.wait()?;
        if !status.success() {
            bail!("the incumbent of a measurement ended with {status}");
        }
        self.incumbent = successor;
        Ok(round)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let _ = self.incumbent.0.kill();
        let _ = self.incumbent.0.wait();
    }
}

fn start(
    part: &[&str],
    control: &Path,
    server: Option<&str>,
) -> anyhow::Result<(Child, BufReader<ChildStdout>)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(part)
        .arg(control)
        .args(server)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a process of the measurement")?;
    let stdout = child.stdout.take().context("its stdout is a pipe")?;
    Ok((child, BufReader::new(stdout)))
}

fn expect_line(stdout: &mut BufReader<ChildStdout>) -> anyhow::Result<String> {
    let mut line = String::new();
    if stdout.read_line(&mut line)? == 0 {
        bail!("a process of the measurement ended early; it says why above");
    }
    Ok(line)
}

/// The first incumbent of the library's chain.
pub(crate) fn first(control: &Path, server: &str) -> anyhow::Result<()> {
    let Start::Fresh(incumbent) = ask(control, Replace::Never)? else { bail!("somebody is there") };
    let mut bundle = Bundle::new();
    bundle.add_plain("server", TcpStream::connect(server)?)?;
    bundle.set_state(&State { unwritten: "x".repeat(100), bytes_in: 1, bytes_out: 1 })?;
    say("serving")?;
    serve(incumbent, &bundle)
}

/// A successor of the library's chain.
pub(crate) fn successor(control: &Path) -> anyhow::Result<()> {
    let begun = Instant::now();
    let Start::Successor(successor) = ask(control, Replace::Must)? else { bail!("nobody hands over") };
    let complete = successor.receive()?.ready()?;
    complete.bundle().state::<State>()?;
    let mut taken = complete.accept::<NoRequests>()?;
    let (whole, serving) = (begun.elapsed(), Instant::now());
    let mut server = taken.bundle.take::<TcpStream>("server")?.descriptor;
    server.read_exact(&mut [0])?;
    let pause = taken.pause + serving.elapsed();
    let round = Round { pause: pause.as_nanos() as u64, whole: whole.as_nanos() as u64 };
    taken.bundle.add_plain("server", server)?;
    say(&serde_json::to_string(&round)?)?;
    serve(taken.incumbent, &taken.bundle)
}

fn ask(control: &Path, replace: Replace) -> anyhow::Result<Start<NoRequests>> {
    Ok(heirloom::start(control, Service::new("measurement"), Config::default(), replace)?)
}

fn serve(mut incumbent: Incumbent, bundle: &Bundle) -> anyhow::Result<()> {
    loop {
        blocking::wait(&incumbent, &mut Vec::new(), None)?;
        loop {
            match incumbent.turn(Instant::now())? {
                Turn::Idle => break,
                Turn::Offer(offer) => offer.begin_bundle(bundle)?,
                Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
                Turn::Freeze(freeze) => match freeze.release_bundle(bundle)? {
                    Outcome::Taken(_) => return Ok(()),
                    outcome => bail!("a measurement failed: {outcome:?}"),
                },
                Turn::Request(asked) => asked.refuse("nothing to say"),
                Turn::Quit(_) | Turn::Closed(_) => {}
            }
        }
    }
}

/// Says a line to whoever measures.
pub(crate) fn say(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// CLOCK_MONOTONIC in nanoseconds, the same in all processes.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
