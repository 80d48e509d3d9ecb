//! The steady state: streams, short connections, small messages, what they cost the proxy in processor time, and what an idle
//! connection costs it in memory.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::process::Process;
use crate::proxy::comparison::{Comparison, DIRECT};
use crate::proxy::contender::Contender;
use crate::proxy::load::{Done, Kind, Task};
use crate::proxy::running::Running;
use crate::proxy::{Backend, with_cpu};

/// How proxy, load and server share the processors.
struct Setting {
    name: &'static str,
    threads: usize,
    proxy: Option<usize>,
    others: Option<usize>,
}

const SETTINGS: [Setting; 2] = [
    // On processors of their own: what one thread of a proxy can do.
    Setting { name: "pinned, 1 thread", threads: 1, proxy: Some(0), others: Some(1) },
    Setting { name: "free, 2 threads", threads: 2, proxy: None, others: None },
];

const CASES: [(Kind, usize, &str); 6] = [
    (Kind::Streams, 1, "1 stream"),
    (Kind::Streams, 16, "16 streams"),
    (Kind::Streams, 256, "256 streams"),
    (Kind::Requests, 32, "short connections"),
    (Kind::Messages, 1, "messages on 1 connection"),
    (Kind::Messages, 64, "messages on 64 connections"),
];

/// How long the server may take to see the end of what the load has ended.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);

/// How much is done.
struct Extent {
    rounds: usize,
    warm_up: Duration,
    lasting: Duration,
    idle: usize,
    idle_rounds: usize,
}

pub(super) fn measure(
    contenders: &[Contender],
    quick: bool,
    mut report: impl FnMut(Comparison) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let extent = match quick {
        true => Extent {
            rounds: 1,
            warm_up: Duration::from_millis(20),
            lasting: Duration::from_millis(100),
            idle: 200,
            idle_rounds: 1,
        },
        false => Extent {
            rounds: 7,
            warm_up: Duration::from_millis(200),
            lasting: Duration::from_secs(1),
            idle: 2000,
            idle_rounds: 3,
        },
    };
    for setting in &SETTINGS {
        if setting.proxy.is_some() && std::thread::available_parallelism()?.get() < 2 {
            eprintln!("{} IS LEFT OUT: it takes two processors", setting.name);
            continue;
        }
        let mut bench = Bench::begin(contenders, setting)?;
        for (kind, connections, name) in CASES {
            let task = |to| Task { kind, to, connections, warm_up: extent.warm_up, lasting: extent.lasting };
            // Of each column: what was done, and the processor time that it took.
            let mut all: Vec<Vec<(Done, u64)>> = vec![Vec::new(); bench.columns()];
            for round in 0..extent.rounds {
                for turn in 0..bench.columns() {
                    // Each has its turn at being first.
                    let column = (turn + round) % bench.columns();
                    all[column].push(bench.measure(column, task)?);
                }
            }
            for comparison in bench.compare(kind, name, setting, &all) {
                report(comparison)?;
            }
        }
    }
    report(memory(contenders, &extent)?)
}

/// Everything that takes part in a setting.
struct Bench {
    backend: Backend,
    load: Process,
    proxies: Vec<(Contender, Running)>,
}

impl Bench {
    fn begin(contenders: &[Contender], setting: &Setting) -> anyhow::Result<Bench> {
        let backend = Backend::start(setting.others)?;
        let load = Process::start(with_cpu("load", setting.others))?;
        let mut proxies = Vec::new();
        for &contender in contenders {
            proxies.push((
                contender,
                Running::start(contender, setting.proxy, setting.threads, backend.address)?,
            ));
        }
        Ok(Bench { backend, load, proxies })
    }

    /// One for each proxy, and first one for none.
    fn columns(&self) -> usize {
        1 + self.proxies.len()
    }

    fn name(&self, column: usize) -> &'static str {
        if column == 0 { DIRECT } else { self.proxies[column - 1].0.name() }
    }

    /// What is done in this column, and how much processor time, in nanoseconds, it takes the proxy.
    fn measure(&mut self, column: usize, task: impl Fn(SocketAddr) -> Task) -> anyhow::Result<(Done, u64)> {
        let proxy = column.checked_sub(1).map(|number| &self.proxies[number].1);
        let used = || proxy.map_or(Ok(0), Running::processor_time);
        self.load.tell(&task(proxy.map_or(self.backend.address, Running::address)))?;
        let _: String = self.load.said()?;
        let before = used()?;
        let done: Done = self.load.said()?;
        let after = used()?;
        let give_up = Instant::now() + SETTLE_WITHIN;
        while self.backend.connections()? > 0 {
            if Instant::now() > give_up {
                bail!("{} keeps connections that its clients have ended", self.name(column));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok((done, after - before))
    }

    fn compare(
        &self,
        kind: Kind,
        name: &str,
        setting: &Setting,
        all: &[Vec<(Done, u64)>],
    ) -> Vec<Comparison> {
        let of = |what: &str, unit, from: usize, value: &dyn Fn(&Done, f64) -> f64| {
            let columns = (from..self.columns()).map(|column| {
                (
                    self.name(column),
                    all[column].iter().map(|(done, used)| value(done, *used as f64)).collect(),
                )
            });
            // What cannot be had without a proxy has an empty column there.
            let columns = (0..from).map(|column| (self.name(column), Vec::new())).chain(columns).collect();
            Comparison::new("relay", format!("{name}{what}, {}", setting.name), unit, columns)
        };
        let rate = |done: &Done| done.amount as f64 / done.nanoseconds as f64 * 1e9;
        let busy = of(": proxy busy", "%", 1, &|done, used| used / done.nanoseconds as f64 * 100.0);
        match kind {
            Kind::Streams => vec![
                of("", "GB/s", 0, &|done, _| rate(done) / 1e9),
                of(": CPU per GB", "ms", 1, &|done, used| used / 1e6 / (done.amount as f64 / 1e9)),
                busy,
            ],
            Kind::Requests => vec![
                of("", "1/s", 0, &|done, _| rate(done)),
                of(": CPU each", "µs", 1, &|done, used| used / 1e3 / done.amount as f64),
                busy,
            ],
            Kind::Messages | Kind::Hold => {
                let latency = |what, which: usize| {
                    of(what, "µs", 0, &move |done: &Done, _| done.latencies[which] as f64 / 1e3)
                };
                vec![
                    latency(": p50", 0),
                    latency(": p99", 1),
                    latency(": p99.9", 2),
                    of(": CPU each", "µs", 1, &|done, used| used / 1e3 / done.amount as f64),
                    busy,
                ]
            }
        }
    }
}

/// How much memory each idle connection takes a proxy that has just started, after a message has gone both ways on it.
fn memory(contenders: &[Contender], extent: &Extent) -> anyhow::Result<Comparison> {
    let mut columns: Vec<(&'static str, Vec<f64>)> = vec![(DIRECT, Vec::new())];
    columns.extend(contenders.iter().map(|contender| (contender.name(), Vec::new())));
    let backend = Backend::start(None)?;
    for _ in 0..extent.idle_rounds {
        for (&contender, (_, values)) in contenders.iter().zip(&mut columns[1..]) {
            let proxy = Running::start(contender, None, 1, backend.address)?;
            let mut load = Process::start(["load"])?;
            let before = proxy.memory()?;
            let zero = Duration::ZERO;
            let (to, connections) = (proxy.address(), extent.idle);
            load.tell(&Task { kind: Kind::Hold, to, connections, warm_up: zero, lasting: zero })?;
            let _: String = load.said()?;
            let grown = proxy.memory()?.saturating_sub(before);
            load.tell(&"go on")?;
            values.push(grown as f64 / extent.idle as f64);
        }
    }
    let case = format!("memory of an idle connection, {} of them", extent.idle);
    Ok(Comparison::new("relay", case, "B", columns))
}
