//! The command `heirloom demo`: the main job on real sockets, in real processes, with nothing else installed.
//!
//! A chat server and three chats, all of them this program: one talks, one listens and is replaced, one is the witness
//! and is left alone. Server, talker and listener are replaced again and again while hundreds of thousands of numbered
//! lines pass through: beside, in place, by another build of the program and back. A successor is killed while it holds
//! everything, an upgrade is refused in a dry run. At the end every line must have come exactly once.

mod cast;
mod other_build;
mod process;
mod report;
mod speech;
pub(crate) mod successor;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use heirloom::control::FailureCode;
use heirloom::upgrade::{AskError, Upgrade, Upgraded, ask};
use indicatif::{ProgressBar, ProgressStyle};

use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;
use cast::{Cast, Part};
use process::wait_until;
use report::{Report, Tally};
use speech::Speech;

/// How many lines the listener says before each event.
const TYPED: u64 = 10;

/// How long nothing may come before what is missing counts as lost.
const QUIET: Duration = Duration::from_secs(10);

/// How long an upgrade may take, for builds that are slow to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The options of `heirloom demo`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// How many numbered lines go through at least
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(100_000..=100_000_000))]
    lines: u64,
    /// How often the whole story is told
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Another build of this program to go to and come back from [default: debug for release, release for debug, made with
    /// cargo where cargo runs the demonstration]
    #[arg(long, value_name = "FILE")]
    other: Option<PathBuf>,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Starts a chat server and three chats as processes: one talks, one listens, one is a witness. Numbered lines stream through, and \
all but the witness are replaced meanwhile: beside, in place, by another build of this program and back. One successor is killed \
while it holds everything, one upgrade is refused in a dry run. The report counts what was lost, repeated, misplaced or dropped; \
the status is 1 if anything was.",
    exits: &[Exit::Done, Exit::Failed, Exit::Usage],
    signals: &[("SIGTERM, SIGINT, SIGHUP", "Ends the demonstration and its processes, with status 1.")],
    environment: &[(
        "TMPDIR",
        "Where the directory for the control sockets is made; otherwise in /tmp. It is removed at the end.",
    )],
    examples: &[("heirloom demo --rounds 10", "Tells the story ten times.")],
    see_also: &["heirloom-chat(1)", "heirloom-upgrade(1)"],
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

/// What happens to whom, in this order.
const STORY: &[Event] = &[
    Event::Beside(Part::Server),
    Event::ByHand,
    Event::InPlace(Part::Talker),
    Event::KilledSuccessor,
    Event::InPlace(Part::Server),
    Event::DryRunRefused,
    Event::InPlace(Part::Listener),
    Event::Beside(Part::Talker),
    Event::ToOtherBuild(Part::Server),
    Event::ToOtherBuild(Part::Listener),
    Event::BackToThisBuild(Part::Listener),
    Event::BackToThisBuild(Part::Server),
];

#[derive(Clone, Copy, Debug)]
enum Event {
    /// `heirloom upgrade`: the incumbent starts its successor.
    Beside(Part),
    /// `heirloom upgrade --in-place`.
    InPlace(Part),
    /// The listener is replaced by a new `heirloom chat`, as anybody may start one.
    ByHand,
    /// A successor of the server is killed while it holds everything.
    KilledSuccessor,
    /// The server's new program has an invalid configuration.
    DryRunRefused,
    ToOtherBuild(Part),
    BackToThisBuild(Part),
}

struct Demonstration {
    cast: Cast,
    this_build: PathBuf,
    other_build: Option<PathBuf>,
    progress: ProgressBar,
    /// How many lines the listener has said.
    typed: u64,
    report: Report,
}

impl Demonstration {
    /// Starts everybody.
    fn prepare(args: &Args) -> anyhow::Result<Self> {
        let this_build = std::env::current_exe().context("cannot find this program's own file")?;
        let other_build = match &args.other {
            Some(file) => Some(std::path::absolute(file)?),
            None => other_build::find(&this_build, &|what| tell(&ProgressBar::hidden(), what))?,
        };
        let cast = Cast::gather(&this_build)?;
        let progress = progress_bar(args.lines);
        let report = Report { other_build: other_build.is_some(), ..Report::default() };
        Ok(Demonstration { cast, this_build, other_build, progress, typed: 0, report })
    }

    fn run(mut self, args: &Args) -> anyhow::Result<Report> {
        let speech = Speech::begin(self.cast.talkers_stdin()?, args.lines, self.cast.heard());
        let story: Vec<Event> = (0..args.rounds).flat_map(|_| STORY.iter().copied()).collect();
        let slice = args.lines / (story.len() as u64 + 1);
        for (number, event) in (1..).zip(story) {
            self.type_lines()?;
            // Evenly spread, so that the stream is running at each.
            self.wait_for_lines(slice * number)?;
            self.make_happen(event)?;
        }
        self.type_lines()?;
        let said = speech.end(|| self.progress.set_position(self.cast.witness.heard()))?;
        self.wait_for_quiet(said)?;
        self.finish(said)
    }

    fn make_happen(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Beside(part) => self.upgrade(part, Upgrade::default(), "by a new process"),
            Event::InPlace(part) => {
                self.upgrade(part, Upgrade { in_place: true, ..Upgrade::default() }, "in place")
            }
            Event::ByHand => self.replace_by_hand(),
            Event::KilledSuccessor => self.kill_a_successor(),
            Event::DryRunRefused => self.be_refused(),
            Event::ToOtherBuild(part) => match self.other_build.clone() {
                Some(file) => self.upgrade_to(part, &file, "by another build"),
                None => Ok(()),
            },
            Event::BackToThisBuild(part) => match self.other_build {
                Some(_) => self.upgrade_to(part, &self.this_build.clone(), "by this build again"),
                None => Ok(()),
            },
        }
    }

    /// The listener in place, the server beside: both ways, once each way.
    fn upgrade_to(&mut self, part: Part, file: &Path, how: &str) -> anyhow::Result<()> {
        let request = Upgrade {
            program: Some(file.into()),
            in_place: matches!(part, Part::Listener),
            ..Upgrade::default()
        };
        self.upgrade(part, request, how)
    }

    fn upgrade(&mut self, part: Part, request: Upgrade, how: &str) -> anyhow::Result<()> {
        let control = self.cast.control(part);
        match ask(&control, request, PATIENCE) {
            Ok(Upgraded::Replaced { .. }) => self.replaced(part, how),
            Ok(other) => bail!("the {part} answers {other:?} to an upgrade"),
            Err(error) => Err(anyhow!(error).context(format!("the {part} could not be upgraded"))),
        }
    }

    fn replace_by_hand(&mut self) -> anyhow::Result<()> {
        self.cast.replace_listener(&self.this_build)?;
        self.replaced(Part::Listener, "by a chat that was started by hand")
    }

    fn replaced(&mut self, part: Part, how: &str) -> anyhow::Result<()> {
        let status = self.cast.status(part)?;
        let pause = status.last_takeover.as_ref().and_then(|last| last.pause_us).unwrap_or(0);
        self.report.pauses_us.push(pause);
        let number = self.report.pauses_us.len();
        self.tell(&format!(
            "replacement {number}: the {part} {how}; pid {} serves as generation {}, pause {pause} µs",
            status.pid, status.generation
        ));
        Ok(())
    }

    /// Lets a successor of the server take everything but the last step, and kills it.
    fn kill_a_successor(&mut self) -> anyhow::Result<()> {
        let mut successor = self.cast.greedy_successor(&self.this_build)?;
        successor.expect_line("frozen")?;
        successor.kill()?;
        successor.wait()?;
        let mut last = None;
        wait_until("the server to go on after its successor was killed", || {
            let status = self.cast.status(Part::Server)?;
            last = status.last_takeover.filter(|last| last.outcome == "resumed");
            Ok(last.is_some())
        })?;
        self.report.killed += 1;
        let reason = last.and_then(|last| last.reason).unwrap_or_default();
        self.tell(&format!("a successor was killed, the server serves on: {reason}"));
        Ok(())
    }

    /// Asks whether the server could go on with a configuration that makes no sense.
    fn be_refused(&mut self) -> anyhow::Result<()> {
        let mut arguments = self.cast.server_arguments();
        arguments.extend(["--backlog".into(), "plenty".into()]);
        let request = Upgrade { arguments: Some(arguments), dry_run: true, ..Upgrade::default() };
        match ask(&self.cast.control(Part::Server), request, PATIENCE) {
            Err(AskError::Refused(failure)) if failure.code == FailureCode::RolledBack => {
                self.report.refused += 1;
                let why = failure.message.split("; it said: ").last().unwrap_or_default();
                let why = why.lines().next().unwrap_or_default();
                self.tell(&format!("a dry run refused an upgrade, the server serves on: {why}"));
                Ok(())
            }
            other => bail!("a server with an invalid option should be refused, but: {other:?}"),
        }
    }

    /// Says some numbered lines through the listener, and waits until they are sent.
    fn type_lines(&mut self) -> anyhow::Result<()> {
        let lines: String = (self.typed + 1..=self.typed + TYPED).map(|n| format!("{n}\n")).collect();
        self.cast.listener_says(lines.as_bytes())?;
        self.typed += TYPED;
        let bytes: usize = (1..=self.typed).map(|n| n.to_string().len() + 1).sum();
        wait_until("the listener to send what was typed", || {
            Ok(self.cast.status(Part::Listener)?.counters.get("bytes_out") == Some(&(bytes as u64)))
        })
    }

    fn wait_for_lines(&self, lines: u64) -> anyhow::Result<()> {
        wait_until("the stream", || {
            self.progress.set_position(self.cast.witness.heard());
            Ok(self.cast.witness.heard() >= lines)
        })
    }

    /// Waits until everybody has heard as many lines as were said; if something is lost, that is never, so the wait ends
    /// when nothing comes any more.
    fn wait_for_quiet(&self, said: u64) -> anyhow::Result<()> {
        let mut before = 0;
        let mut quiet_since = Instant::now();
        wait_until("the end of the stream", || {
            let heard = self.cast.listener.heard() + self.cast.witness.heard() + self.cast.talker.heard();
            if heard > before {
                before = heard;
                quiet_since = Instant::now();
            }
            self.progress.set_position(self.cast.witness.heard());
            let all = self.cast.listener.heard() >= said
                && self.cast.witness.heard() >= said + self.typed
                && self.cast.talker.heard() >= self.typed;
            // Announcements are lines too: a little longer shows whether there is more.
            let long_enough = if all { Duration::from_millis(100) } else { QUIET };
            Ok(quiet_since.elapsed() >= long_enough)
        })
    }

    fn finish(mut self, said: u64) -> anyhow::Result<Report> {
        self.progress.finish_and_clear();
        // When they are dismissed they leave.
        let dropped = report::departures(&self.cast.witness.output());
        let (talker, listener) = (self.cast.talker.name.clone(), self.cast.listener.name.clone());
        self.cast.dismiss()?;
        let witness = self.cast.witness.output();
        Ok(Report {
            said,
            typed: self.typed,
            listener: Tally::of(&self.cast.listener.output(), &talker, said),
            witness: Tally::of(&witness, &talker, said),
            typed_at_witness: Tally::of(&witness, &listener, self.typed),
            typed_at_talker: Tally::of(&self.cast.talker.output(), &listener, self.typed),
            dropped,
            ..self.report
        })
    }

    /// Says how it goes on, above the progress bar.
    fn tell(&self, what: &str) {
        tell(&self.progress, what);
    }
}

fn tell(progress: &ProgressBar, what: &str) {
    if progress.is_hidden() {
        let _ = writeln!(std::io::stderr(), "{what}");
    } else {
        progress.println(what);
    }
}

fn progress_bar(lines: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(lines);
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} lines");
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}
