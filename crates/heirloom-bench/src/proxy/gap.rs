//! The longest that a message waits for its answer in a handover, beside the longest in as much time without one, and in as much
//! time in which the program is started once and ends at once: what a handover to another process cannot do without.

use std::time::{Duration, Instant};

use crate::process::Process;
use crate::proxy::Backend;
use crate::proxy::comparison::Comparison;
use crate::proxy::contender::Contender;
use crate::proxy::running::{Cause, MOST_ASKED, Running};
use crate::proxy::sampling::Task;

const CONNECTIONS: [usize; 4] = [10, 100, 1000, 6000];
/// How long the end of the process before is waited for: with this project's the handover ends with it …
const PATIENCE: Duration = Duration::from_secs(10);
/// … and with the others, which keep it, has long begun to serve what is new.
const WAIT: Duration = Duration::from_millis(300);
/// How long the kernel has, after processes were reaped, to free what it knew of them.
const SETTLE: Duration = Duration::from_millis(50);
/// Around what is sampled.
const MARGIN: Duration = Duration::from_millis(50);

pub(super) fn measure(
    contenders: &[Contender],
    counts: &[usize],
    quick: bool,
    mut report: impl FnMut(Comparison) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (usual, rounds) = if quick { (&CONNECTIONS[..2], 2) } else { (&CONNECTIONS[..], 30) };
    let counts = if counts.is_empty() { usual } else { counts };
    for &count in counts {
        let mut sampled: Vec<Sampled> = contenders
            .iter()
            .map(|&contender| Sampled::begin(contender, count))
            .collect::<anyhow::Result<_>>()?;
        for round in 0..rounds {
            for turn in 0..contenders.len() {
                sampled[(turn + round) % contenders.len()].round()?;
            }
        }
        let mut compare = |what: &str, of: &dyn Fn(&Sampled) -> Vec<f64>| {
            let columns = sampled.iter().map(|sampled| (sampled.contender.name(), of(sampled))).collect();
            let plural = if count == 1 { "" } else { "s" };
            report(Comparison::new("gap", format!("{count} connection{plural}{what}"), "µs", columns))
        };
        let longest = |gaps: Vec<f64>| vec![gaps.into_iter().fold(f64::MIN, f64::max)];
        let (with, without) =
            (|sampled: &Sampled| sampled.with.clone(), |sampled: &Sampled| sampled.without.clone());
        compare("", &|sampled| sampled.added_by(&sampled.with))?;
        compare(", longest", &|sampled| longest(sampled.added_by(&sampled.with)))?;
        compare(": by a mere start", &|sampled| sampled.added_by(&sampled.started))?;
        compare(": with a handover", &with)?;
        compare(": with a handover, longest", &|sampled| longest(with(sampled)))?;
        compare(": without", &without)?;
        compare(": without, longest", &|sampled| longest(without(sampled)))?;
    }
    Ok(())
}

/// A proxy, and what was sampled, in microseconds.
struct Sampled {
    contender: Contender,
    with: Vec<f64>,
    without: Vec<f64>,
    started: Vec<f64>,
    clients: Process,
    proxy: Running,
    _backend: Backend,
}

impl Sampled {
    fn begin(contender: Contender, count: usize) -> anyhow::Result<Sampled> {
        let backend = Backend::start(None)?;
        let proxy = Running::start(contender, None, 2, backend.address)?;
        let mut clients = Process::start(["sampling", &proxy.address().to_string(), &count.to_string()])?;
        let _: String = clients.said()?;
        let [with, without, started] = [const { Vec::new() }; 3];
        Ok(Sampled { contender, with, without, started, clients, proxy, _backend: backend })
    }

    /// Once with a handover, once as long without, and once as long with a start.
    fn round(&mut self) -> anyhow::Result<()> {
        let (with, watched) = self.hand_over()?;
        self.clients.tell(&Task::Begin)?;
        std::thread::sleep(watched);
        let without = self.end()?;
        let mut start = self.contender.mere_start()?;
        let began = Instant::now();
        self.clients.tell(&Task::Begin)?;
        std::thread::sleep(MARGIN);
        let status = start.status()?;
        anyhow::ensure!(status.success(), "{} only started: {status}", self.contender.name());
        std::thread::sleep(watched.saturating_sub(began.elapsed()));
        let started = self.end()?;
        self.with.push(with);
        self.without.push(without);
        self.started.push(started);
        Ok(())
    }

    /// The longest wait with a handover, and how long it was watched. Nothing is looked at meanwhile that would take time from who
    /// takes part.
    fn hand_over(&mut self) -> anyhow::Result<(f64, Duration)> {
        for _ in 0..MOST_ASKED {
            let handover = self.proxy.prepare(Cause::Reload)?;
            let began = Instant::now();
            self.clients.tell(&Task::Begin)?;
            std::thread::sleep(MARGIN);
            self.proxy.ask(&handover)?;
            let is_over = if self.contender.is_ours() {
                handover.is_over(PATIENCE)?
            } else {
                std::thread::sleep(WAIT);
                true
            };
            std::thread::sleep(MARGIN);
            let watched = began.elapsed();
            let with = self.end()?;
            let has_begun = self.proxy.has_begun(&handover)?;
            std::thread::sleep(SETTLE);
            if has_begun {
                anyhow::ensure!(is_over, "the process before was still there after {PATIENCE:?}");
                return Ok((with, watched));
            }
            self.proxy.say_not_heeded();
        }
        anyhow::bail!("{} has not handed over", self.contender.name())
    }

    fn end(&mut self) -> anyhow::Result<f64> {
        self.clients.tell(&Task::End)?;
        let nanoseconds: u64 = self.clients.said()?;
        Ok(nanoseconds as f64 / 1e3)
    }

    /// By how much each made the gap longer.
    fn added_by(&self, with: &[f64]) -> Vec<f64> {
        with.iter().zip(&self.without).map(|(with, without)| with - without).collect()
    }
}
