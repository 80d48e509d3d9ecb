//! The command `heirloom demo`: the main job on real sockets, in real processes, with nothing else installed.
//!
//! A small chat server streams numbered lines to a client and to a witness. The client is replaced again and again
//! meanwhile, one successor is killed while it holds everything, and lines are typed all along. At the end every line
//! must have come exactly once.

mod process;
mod report;
pub(crate) mod server;
pub(crate) mod successor;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use heirloom::NoRequests;
use heirloom::control::{Reply, Request, Status};
use indicatif::{ProgressBar, ProgressStyle};

use crate::ask::ask;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;
use process::{Process, wait_until};
use report::{Report, Tally};

/// How many lines are typed at each client.
const TYPED: u64 = 10;

/// How long nothing may come before what is missing counts as lost.
const QUIET: Duration = Duration::from_secs(10);

/// The options of `heirloom demo`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// How many numbered lines go through at least
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(200_000..=100_000_000))]
    lines: u64,
    /// How many times the client is replaced
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    replacements: u32,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Starts a chat server, a client and a witness as processes. Numbered lines stream through, lines are typed, the client is \
replaced again and again, and one successor is killed while it holds everything. The report counts what was lost, repeated, \
misplaced or dropped; the status is 1 if anything was.",
    exits: &[Exit::Done, Exit::Failed, Exit::Usage],
    signals: &[("SIGTERM, SIGINT, SIGHUP", "Ends the demonstration and its processes, with status 1.")],
    environment: &[(
        "TMPDIR",
        "Where the directory for the control sockets is made; otherwise in /tmp. It is removed at the end.",
    )],
    examples: &[("heirloom demo --replacements 100", "Replaces the client more often.")],
    see_also: &["heirloom-chat(1)"],
    ..Page::EMPTY
};

/// Runs the demonstration; code 1 if anything was lost.
pub(crate) fn run(args: &Args) -> Result<Exit, Failure> {
    process::watch_signals()?;
    let report = Demonstration::prepare(args)?.run(args)?;
    write!(std::io::stdout(), "{}", report.to_text())?;
    if report.is_good() {
        return Ok(Exit::Done);
    }
    Err(Failure::new(Exit::Failed, anyhow!("something was lost, repeated or dropped: see the report")))
}

struct Demonstration {
    directory: tempfile::TempDir,
    address: String,
    server: Process,
    witness: Process,
    /// All that have been the client, the present one last.
    clients: Vec<Process>,
    progress: ProgressBar,
    typed: u64,
    killed: u64,
    pauses_us: Vec<u64>,
}

impl Demonstration {
    /// Starts the server, the client and the witness.
    fn prepare(args: &Args) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("heirloom-demo-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir()
            .context("cannot make a directory for the control sockets")?;
        let mut server = Process::start(&["demo-server", "--lines", &args.lines.to_string()])?;
        let port = server.expect_line("listening ")?;
        let address = format!("127.0.0.1:{port}");
        let client = start_client(&address, &directory.path().join("client.sock"), "never")?;
        server.expect_line("client")?;
        let witness = start_client(&address, &directory.path().join("witness.sock"), "never")?;
        server.expect_line("client")?;
        Ok(Demonstration {
            directory,
            address,
            server,
            witness,
            clients: vec![client],
            progress: progress_bar(args.lines),
            typed: 0,
            killed: 0,
            pauses_us: Vec::new(),
        })
    }

    fn run(mut self, args: &Args) -> anyhow::Result<Report> {
        self.server.write(b"start\n")?;
        let slice = args.lines / u64::from(args.replacements + 1);
        for replacement in 1..=args.replacements {
            self.type_lines()?;
            // Evenly spread, so that the stream is running at each.
            self.wait_for_lines(slice * u64::from(replacement))?;
            if replacement == args.replacements.div_ceil(2) {
                self.kill_a_successor()?;
            }
            self.replace(replacement)?;
        }
        self.type_lines()?;
        self.server.close_stdin();
        let report: server::Report = serde_json::from_str(&self.server.expect_line("{")?)
            .context("the demonstration's server gives no report")?;
        self.wait_for_bytes(report.sent)?;
        self.finish(report)
    }

    /// Starts a new client, and waits until the old one has ended.
    fn replace(&mut self, replacement: u32) -> anyhow::Result<()> {
        let next = start_client(&self.address, &self.control(), "must")?;
        let old = self.clients.last_mut().context("there is a client")?;
        let code = old.wait()?;
        if code != Some(0) {
            bail!("the client that was to be replaced ended with {code:?}");
        }
        self.clients.push(next);
        let status = self.status()?;
        let pause = status.last_takeover.as_ref().and_then(|last| last.pause_us).unwrap_or(0);
        self.pauses_us.push(pause);
        self.tell(&format!(
            "replacement {replacement}: pid {} serves as generation {}, pause {pause} µs",
            status.pid, status.generation
        ));
        Ok(())
    }

    /// Lets a successor take everything but the last step, and kills it.
    fn kill_a_successor(&mut self) -> anyhow::Result<()> {
        let control = self.control();
        let control = control.to_str().context("the temporary directory's path is not UTF-8")?;
        let mut successor = Process::start(&["demo-successor", "--control", control, &self.address])?;
        successor.expect_line("frozen")?;
        successor.kill()?;
        successor.wait()?;
        let mut last = None;
        wait_until("the client to go on after its successor was killed", || {
            last = self.status()?.last_takeover.filter(|last| last.outcome == "resumed");
            Ok(last.is_some())
        })?;
        self.killed += 1;
        let reason = last.and_then(|last| last.reason).unwrap_or_default();
        self.tell(&format!("a successor was killed, the client serves on: {reason}"));
        Ok(())
    }

    /// Types some numbered lines at the present client, and waits until they are sent.
    fn type_lines(&mut self) -> anyhow::Result<()> {
        let lines: String = (self.typed + 1..=self.typed + TYPED).map(|n| format!("{n}\n")).collect();
        self.clients.last_mut().context("there is a client")?.write(lines.as_bytes())?;
        self.typed += TYPED;
        let bytes: usize = (1..=self.typed).map(|n| n.to_string().len() + 1).sum();
        wait_until("the client to send what was typed", || {
            Ok(self.status()?.counters.get("bytes_out") == Some(&(bytes as u64)))
        })
    }

    fn wait_for_lines(&self, lines: u64) -> anyhow::Result<()> {
        wait_until("the stream", || {
            let received = self.clients.iter().map(Process::lines).sum();
            self.progress.set_position(received);
            Ok(received >= lines)
        })
    }

    /// Waits until client and witness have as many bytes as the numbers from 1 to `sent` make; if something is lost, that
    /// is never, so the wait ends when nothing comes any more.
    fn wait_for_bytes(&self, sent: u64) -> anyhow::Result<()> {
        let bytes: usize = (1..=sent).map(|n| n.to_string().len() + 1).sum();
        let mut before = 0;
        let mut quiet_since = Instant::now();
        while quiet_since.elapsed() < QUIET {
            let client: usize = self.clients.iter().map(Process::bytes).sum();
            let witness = self.witness.bytes();
            self.progress.set_position(self.clients.iter().map(Process::lines).sum());
            if client >= bytes && witness >= bytes {
                break;
            }
            if client + witness > before {
                before = client + witness;
                quiet_since = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn finish(mut self, server: server::Report) -> anyhow::Result<Report> {
        self.progress.finish_and_clear();
        for path in [self.control(), self.directory.path().join("witness.sock")] {
            let _ = ask(&path, &Request::Quit);
        }
        for client in self.clients.iter_mut().chain([&mut self.witness]) {
            client.wait()?;
        }
        let client: Vec<u8> = self.clients.iter().flat_map(Process::output).collect();
        let witness = self.witness.output();
        Ok(Report {
            client: Tally::of(&client, server.sent),
            witness: Tally::of(&witness, server.sent),
            same_bytes: client == witness,
            server,
            typed: self.typed,
            killed: self.killed,
            pauses_us: self.pauses_us,
        })
    }

    fn status(&self) -> anyhow::Result<Status> {
        match ask(&self.control(), &Request::<NoRequests>::Status).map_err(|failure| anyhow!("{failure}"))?.0
        {
            Reply::Status(status) => Ok(status),
            reply => bail!("the client answers {reply:?} to a question for its status"),
        }
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("client.sock")
    }

    /// Says how it goes on, above the progress bar.
    fn tell(&self, what: &str) {
        if self.progress.is_hidden() {
            let _ = writeln!(std::io::stderr(), "{what}");
        } else {
            self.progress.println(what);
        }
    }
}

fn start_client(address: &str, control: &Path, replace: &str) -> anyhow::Result<Process> {
    let control = control.to_str().context("the temporary directory's path is not UTF-8")?;
    Process::start(&["--log-level", "error", "chat", address, "--control", control, "--replace", replace])
}

fn progress_bar(lines: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(lines);
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} lines");
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}
