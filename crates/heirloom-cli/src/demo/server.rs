//! The demonstration's chat server, a process of its own: streams numbered lines to both its clients, and checks that
//! what one of them types arrives in order.
//!
//! It talks to the demonstration in lines: on stdout `listening PORT`, `client` for each that has connected, and at the
//! end a [`Report`] as JSON; on stdin `start`, and its end for the end.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::exit::Exit;
use crate::failure::Failure;

/// The clients: the one that is replaced, and the witness.
const CLIENTS: usize = 2;
/// How many lines go out at a time, and how often. Together some 250,000 lines a second.
const CHUNK: u64 = 500;
const EVERY: Duration = Duration::from_millis(2);

/// The options of the demonstration's server.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Stream this many lines at least
    #[arg(long, default_value_t = 200_000)]
    lines: u64,
}

/// What the server has seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Lines sent to each client; they are the numbers from 1 to this.
    pub(crate) sent: u64,
    /// Connections that ended before the end.
    pub(crate) dropped: u64,
    /// Typed lines that arrived in order, the numbers from 1 to this.
    pub(crate) typed: u64,
    /// Typed lines that were not the next number.
    pub(crate) typed_wrong: u64,
}

/// Runs until stdin ends, the lines are sent, and both clients are gone.
pub(crate) fn run(args: &Args) -> Result<Exit, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on the loopback address")?;
    say(&format!("listening {}", listener.local_addr()?.port()))?;
    let typed = Arc::new(Mutex::new(Report::default()));
    let ended = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    let mut readers: Vec<JoinHandle<()>> = Vec::new();
    for _ in 0..CLIENTS {
        let (client, _) = listener.accept()?;
        say("client")?;
        let (from, typed, ended) = (client.try_clone()?, typed.clone(), ended.clone());
        readers.push(std::thread::spawn(move || {
            read_typed(from, &typed);
            ended.fetch_add(1, Ordering::SeqCst);
        }));
        clients.push(client);
    }
    std::io::stdin().read_line(&mut String::new())?;
    let ending = Arc::new(AtomicBool::new(false));
    let flag = ending.clone();
    std::thread::spawn(move || {
        for _ in std::io::stdin().lines() {}
        flag.store(true, Ordering::SeqCst);
    });

    let sent = stream(&mut clients, args.lines, &ending);
    let dropped = ended.load(Ordering::SeqCst);
    let report = |typed: &Mutex<Report>| {
        let typed = typed.lock().unwrap_or_else(PoisonError::into_inner);
        Report { sent, dropped, ..typed.clone() }
    };
    say(&serde_json::to_string(&report(&typed)).map_err(anyhow::Error::from)?)?;
    Ok(Exit::Done)
}

/// Sends the numbers to all clients, evenly, until the end is asked for and there are enough.
fn stream(clients: &mut [TcpStream], lines: u64, ending: &AtomicBool) -> u64 {
    let mut sent = 0;
    let mut next = Instant::now();
    let mut chunk = Vec::new();
    while sent < lines || !ending.load(Ordering::SeqCst) {
        chunk.clear();
        for number in sent + 1..=sent + CHUNK {
            // Writing to a Vec cannot fail.
            let _ = writeln!(chunk, "{number}");
        }
        for client in &mut *clients {
            // A connection that has ended is counted where it is read.
            let _ = client.write_all(&chunk);
        }
        sent += CHUNK;
        next += EVERY;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    sent
}

fn read_typed(client: TcpStream, report: &Mutex<Report>) {
    for line in BufReader::new(client).lines().map_while(Result::ok) {
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        if line == (report.typed + 1).to_string() {
            report.typed += 1;
        } else {
            report.typed_wrong += 1;
        }
    }
}

fn say(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}
