//! `heirloom proxy` beside Debian's HAProxy and nginx (stream): in steady state, and when it hands over.
//!
//! Every process is real. The load, the server behind the proxies, and the keeper of each proxy are parts of this program. The proxies
//! take turns in one run, so that whatever else the machine does meets them alike.

pub(crate) mod backend;
pub(crate) mod comparison;
pub(crate) mod contender;
pub(crate) mod crowd;
mod gap;
pub(crate) mod herd;
pub(crate) mod load;
pub(crate) mod plot;
mod relay;
mod reload;
mod running;
pub(crate) mod sampling;

use std::net::SocketAddr;

use anyhow::bail;
use clap::ValueEnum;

use crate::process::Process;
use crate::suite::Suite;
use comparison::Comparison;
use contender::Contender;

/// Measures one of the suites of proxies. `report` gets what has been measured, bit by bit.
pub(crate) fn measure(
    suite: Suite,
    wanted: &[Contender],
    counts: &[usize],
    quick: bool,
    report: impl FnMut(Comparison) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let contenders = present(wanted)?;
    let handing_over: Vec<Contender> =
        contenders.iter().copied().filter(|contender| !contender.differs_in_relaying_only()).collect();
    match suite {
        Suite::Relay => relay::measure(&contenders, quick, report),
        Suite::Reload => reload::measure(&handing_over, quick, report),
        _ => gap::measure(&handing_over, counts, quick, report),
    }
}

/// Whether all can be measured that has to be. Before anything else is: that may take long.
pub(crate) fn check(wanted: &[Contender]) -> anyhow::Result<()> {
    let ours = Contender::Heirloom;
    match ours.program() {
        Err(missing) if wanted.is_empty() || wanted.contains(&ours) => bail!(missing),
        _ => Ok(()),
    }
}

/// Those that are wanted and here. What others have made may be missing, this project's not.
fn present(wanted: &[Contender]) -> anyhow::Result<Vec<Contender>> {
    let wanted = if wanted.is_empty() { Contender::value_variants() } else { wanted };
    let mut present = Vec::new();
    for &contender in wanted {
        match contender.program() {
            Ok(_) => present.push(contender),
            Err(missing) if contender.is_ours() => bail!(missing),
            Err(missing) => eprintln!("{} IS LEFT OUT: {missing}", contender.name()),
        }
    }
    Ok(present)
}

/// The server behind the proxies.
struct Backend {
    process: Process,
    address: SocketAddr,
}

impl Backend {
    fn start(cpu: Option<usize>) -> anyhow::Result<Backend> {
        let mut process = Process::start(with_cpu("backend", cpu))?;
        let address = process.said()?;
        Ok(Backend { process, address })
    }

    /// How many connections it has.
    fn connections(&mut self) -> anyhow::Result<usize> {
        self.process.tell(&"connections")?;
        self.process.said()
    }
}

/// The arguments of a part that may be kept on one processor.
fn with_cpu(part: &str, cpu: Option<usize>) -> Vec<String> {
    let cpu = cpu.map(|cpu| format!("--cpu={cpu}"));
    std::iter::once(part.to_owned()).chain(cpu).collect()
}
