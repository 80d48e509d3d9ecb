//! A proxy that runs: its processes, what they use, and how it hands over.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use crate::process::Process;
use crate::proxy::contender::{Contender, control, nginx_pid};
use crate::proxy::herd::descendants;
use crate::proxy::load::{connect, exchange};

/// How long a proxy may take to start, or to start its successor.
const START_WITHIN: Duration = Duration::from_secs(5);
/// How long nginx may take to begin with an upgrade; it ignores some requests.
const HEED_WITHIN: Duration = Duration::from_secs(1);
/// How often a reload is asked for: HAProxy misses the signal now and then, when it has just started.
pub(crate) const MOST_ASKED: u32 = 3;
/// Between two looks at what processes there are.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A proxy that runs until this is dropped.
pub(crate) struct Running {
    contender: Contender,
    threads: usize,
    address: SocketAddr,
    keeper: Process,
    directory: TempDir,
    /// The processes that serve new connections.
    current: Vec<Pid>,
}

/// Why it is to hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A new configuration.
    Reload,
    /// A new program.
    Upgrade,
}

/// A handover that is about to be asked for, and then goes on.
pub(crate) struct Handover {
    cause: Cause,
    before: Vec<Pid>,
    /// The process that is asked.
    master: Pid,
    /// Those that are to end.
    leaving: Vec<OwnedFd>,
}

impl Handover {
    /// Whether all processes that are to end have ended, or do within this time.
    pub(crate) fn is_over(&self, within: Duration) -> anyhow::Result<bool> {
        let give_up = Instant::now() + within;
        for process in &self.leaving {
            let left = Timespec::try_from(give_up.saturating_duration_since(Instant::now()))?;
            if poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left))? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What came of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandedOver {
    /// The process before has ended so long after it was asked to hand over.
    In(Duration),
    /// It was still there when we stopped to wait.
    Not,
    /// Nobody has begun with it.
    Ignored,
}

impl Running {
    /// Starts one in front of a server, and waits until it relays.
    pub(crate) fn start(
        contender: Contender,
        cpu: Option<usize>,
        threads: usize,
        to: SocketAddr,
    ) -> anyhow::Result<Running> {
        let directory = tempfile::tempdir()?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let arguments = contender.configure(directory.path(), address, to, threads)?;
        let program = contender.program().map_err(anyhow::Error::msg)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("keeper");
        if let Some(cpu) = cpu {
            command.args(["--cpu", &cpu.to_string()]);
        }
        command.arg("--log").arg(directory.path().join("out")).arg("--").arg(program).args(arguments);
        let keeper = Process::start_by(&mut command)?;
        let mut running = Running { contender, threads, address, keeper, directory, current: Vec::new() };
        let give_up = Instant::now() + START_WITHIN;
        while running.current.len() != contender.processes(threads) || !answers(address) {
            if Instant::now() > give_up {
                bail!("{} does not start: {}", contender.name(), running.said());
            }
            std::thread::sleep(LOOK_EVERY);
            running.current = running.processes();
        }
        Ok(running)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// All its processes, the eldest first.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        descendants(self.keeper.id())
    }

    /// The processor time that they have used, in nanoseconds.
    pub(crate) fn processor_time(&self) -> anyhow::Result<u64> {
        let mut all = 0;
        for process in self.processes() {
            for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
                let schedule = std::fs::read_to_string(thread?.path().join("schedstat"))?;
                all += schedule.split(' ').next().unwrap_or("").parse::<u64>()?;
            }
        }
        Ok(all)
    }

    /// The memory that they have for themselves, and their share of what they have in common, in bytes. What the kernel keeps
    /// for their sockets is not in it.
    pub(crate) fn memory(&self) -> anyhow::Result<u64> {
        let mut all = 0;
        for process in self.processes() {
            let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
            all += line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024;
        }
        Ok(all)
    }

    /// How many processes it has beyond those that it takes to serve.
    pub(crate) fn left_behind(&self) -> usize {
        self.processes().len().saturating_sub(self.contender.processes(self.threads))
    }

    /// Has it hand over, and waits as long for the end of the process before.
    pub(crate) fn hand_over(&mut self, cause: Cause, at_most: Duration) -> anyhow::Result<HandedOver> {
        let handover = self.prepare(cause)?;
        let mut asked = Instant::now();
        self.ask(&handover)?;
        if !self.contender.is_ours() {
            let (newcomers, within) = match self.upgrades_master(cause) {
                true => (self.contender.processes(self.threads), HEED_WITHIN),
                false => (self.contender.processes(self.threads) - 1, START_WITHIN),
            };
            let mut times = 1;
            loop {
                std::thread::sleep(LOOK_EVERY);
                if self.newcomers(&handover).len() >= newcomers {
                    break;
                }
                if asked.elapsed() > within {
                    if self.upgrades_master(cause) {
                        return Ok(HandedOver::Ignored);
                    }
                    if times == MOST_ASKED {
                        bail!("{} starts no successor: {}", self.contender.name(), self.said());
                    }
                    self.say_not_heeded();
                    times += 1;
                    asked = Instant::now();
                    self.ask(&handover)?;
                }
            }
            if self.upgrades_master(cause) {
                kill_process(handover.master, Signal::QUIT)?;
            }
        }
        let gone = handover.is_over(at_most.saturating_sub(asked.elapsed()))?;
        let took = asked.elapsed();
        if !self.has_begun(&handover)? {
            bail!("{} has not handed over: {}", self.contender.name(), self.said());
        }
        Ok(if gone { HandedOver::In(took) } else { HandedOver::Not })
    }

    /// What there is before it is asked to hand over.
    pub(crate) fn prepare(&self, cause: Cause) -> anyhow::Result<Handover> {
        let before = self.processes();
        let master = self.master(&before)?;
        let leaving = match self.contender {
            Contender::Heirloom | Contender::HeirloomPinned => before.clone(),
            _ if self.upgrades_master(cause) => self.current.clone(),
            // The master stays.
            _ => self.current.iter().copied().filter(|&process| process != master).collect(),
        }
        .into_iter()
        .filter_map(|process| pidfd_open(process, PidfdFlags::empty()).ok())
        .collect();
        Ok(Handover { cause, before, master, leaving })
    }

    /// Whether the process that is to come is there. Those that have gone are reaped.
    pub(crate) fn has_begun(&mut self, handover: &Handover) -> anyhow::Result<bool> {
        let newcomers = self.newcomers(handover);
        self.keeper.tell(&())?;
        self.keeper.said::<()>()?;
        if newcomers.is_empty() {
            return Ok(false);
        }
        self.current = newcomers;
        Ok(true)
    }

    pub(crate) fn say_not_heeded(&self) {
        eprintln!("{} has not heeded a request to reload: it is asked again", self.contender.name());
    }

    fn upgrades_master(&self, cause: Cause) -> bool {
        cause == Cause::Upgrade && self.contender.is_nginx()
    }

    /// Since when the one that serves does, if it tells.
    pub(crate) fn serving_since(&self) -> anyhow::Result<Option<SystemTime>> {
        if !self.contender.is_ours() {
            return Ok(None);
        }
        let output = Command::new(self.contender.program().map_err(anyhow::Error::msg)?)
            .args(["status", "--json", "--control"])
            .arg(control(self.directory.path()))
            .stdin(Stdio::null())
            .output()?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).context("heirloom status")?;
        let since =
            status["serving_since_unix_ms"].as_u64().context("it does not say since when it serves")?;
        Ok(Some(SystemTime::UNIX_EPOCH + Duration::from_millis(since)))
    }

    /// The process that is asked to hand over.
    fn master(&self, processes: &[Pid]) -> anyhow::Result<Pid> {
        if self.contender.is_nginx() {
            let pid = std::fs::read_to_string(nginx_pid(self.directory.path()))?;
            return Pid::from_raw(pid.trim().parse()?).context("nginx has no process");
        }
        processes
            .first()
            .copied()
            .with_context(|| format!("{} has ended: {}", self.contender.name(), self.said()))
    }

    pub(crate) fn ask(&self, handover: &Handover) -> anyhow::Result<()> {
        let master = handover.master;
        match (self.contender, handover.cause) {
            (Contender::Heirloom | Contender::HeirloomPinned, Cause::Upgrade) => {
                let status = Command::new(self.contender.program().map_err(anyhow::Error::msg)?)
                    .args(["upgrade", "--control"])
                    .arg(control(self.directory.path()))
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .status()?;
                if !status.success() {
                    bail!("heirloom upgrade: {status}: {}", self.said());
                }
            }
            (Contender::Heirloom | Contender::HeirloomPinned, Cause::Reload) => {
                kill_process(master, Signal::HUP)?
            }
            // It executes itself anew in both cases.
            (Contender::Haproxy | Contender::HaproxySplice, _) => kill_process(master, Signal::USR2)?,
            (Contender::Nginx | Contender::NginxLarge, Cause::Reload) => kill_process(master, Signal::HUP)?,
            (Contender::Nginx | Contender::NginxLarge, Cause::Upgrade) => kill_process(master, Signal::USR2)?,
        }
        Ok(())
    }

    fn newcomers(&self, handover: &Handover) -> Vec<Pid> {
        let mut now = self.processes();
        now.retain(|process| !handover.before.contains(process));
        now
    }

    /// The end of what it has said.
    fn said(&self) -> String {
        let read =
            |name: &str| std::fs::read_to_string(Path::join(self.directory.path(), name)).unwrap_or_default();
        let all = read("out") + &read("log");
        let lines: Vec<&str> = all.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

/// Whether a message comes back.
fn answers(address: SocketAddr) -> bool {
    connect(address).is_ok_and(|connection| exchange(&connection).is_ok())
}
