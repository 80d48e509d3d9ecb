//! Reloads and upgrades with very many established connections: what is dropped, what is falsified, and what stays behind.

use std::time::{Duration, SystemTime};

use crate::process::Process;
use crate::proxy::Backend;
use crate::proxy::comparison::Comparison;
use crate::proxy::contender::Contender;
use crate::proxy::crowd::{Fates, Task};
use crate::proxy::running::{Cause, HandedOver, Running};

/// How much is done.
struct Extent {
    connections: usize,
    echoing: usize,
    /// Reloads, and as many upgrades.
    times: usize,
    /// How long the end of the process before is waited for.
    wait: Duration,
}

/// What came of it.
#[derive(Default)]
struct Account {
    fates: Fates,
    /// New connections that were not served.
    refused: u64,
    /// Upgrades that nobody heeded.
    ignored: u64,
    left_behind: usize,
    /// Of reloads, and of upgrades: in how many seconds the process before had ended, or how long was waited for that.
    gone: [Vec<f64>; 2],
    /// In how many seconds from when the new one served, if it tells.
    lingered: Vec<f64>,
    /// How many of them had not ended by then.
    stayed: u64,
}

pub(super) fn measure(
    contenders: &[Contender],
    quick: bool,
    mut report: impl FnMut(Comparison) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let extent = match quick {
        true => Extent { connections: 60, echoing: 6, times: 2, wait: Duration::from_secs(1) },
        false => Extent { connections: 6000, echoing: 600, times: 20, wait: Duration::from_secs(5) },
    };
    let mut accounts = Vec::new();
    for &contender in contenders {
        accounts.push((contender.name(), account(contender, &extent)?));
    }
    let Extent { connections, echoing, times, wait } = extent;
    let mut compare = |case: String, unit, of: &dyn Fn(&Account) -> Vec<f64>| {
        let columns = accounts.iter().map(|(name, account)| (*name, of(account))).collect();
        report(Comparison::new("reload", case, unit, columns))
    };
    let case = |what: &str| format!("{connections}, {echoing} echo, {times}+{times}: {what}");
    compare(case("dropped"), "", &|account| vec![account.fates.dropped as f64])?;
    compare(case("bytes wrong"), "", &|account| vec![account.fates.wrong as f64])?;
    compare(case("bytes right"), "MB", &|account| vec![account.fates.echoed as f64 / 1e6])?;
    compare(case("new ones refused"), "", &|account| vec![account.refused as f64])?;
    compare(case("upgrades ignored"), "", &|account| vec![account.ignored as f64])?;
    compare(case("processes left behind"), "", &|account| vec![account.left_behind as f64])?;
    compare(case(&format!("there after {} s", wait.as_secs())), "", &|account| vec![account.stayed as f64])?;
    for (number, what) in ["reload: old one gone", "upgrade: old one gone"].into_iter().enumerate() {
        compare(case(what), "s", &|account| account.gone[number].clone())?;
    }
    compare(case("from the takeover: old one gone"), "s", &|account| account.lingered.clone())?;
    // The longest of them.
    let longest = |values: &[f64]| values.iter().copied().reduce(f64::max).into_iter().collect();
    compare(case("longest until gone"), "s", &|account| longest(&account.gone.concat()))?;
    compare(case("longest from the takeover"), "s", &|account| longest(&account.lingered))
}

fn account(contender: Contender, extent: &Extent) -> anyhow::Result<Account> {
    let backend = Backend::start(None)?;
    let mut proxy = Running::start(contender, None, 2, backend.address)?;
    let (to, count) = (proxy.address().to_string(), extent.connections.to_string());
    let mut crowd = Process::start(["crowd", &to, &count, &extent.echoing.to_string()])?;
    let _: String = crowd.said()?;
    let mut account = Account::default();
    for (cause, gone) in [Cause::Reload, Cause::Upgrade].into_iter().zip(0..) {
        for _ in 0..extent.times {
            match proxy.hand_over(cause, extent.wait)? {
                HandedOver::In(took) => {
                    let now = SystemTime::now();
                    account.gone[gone].push(took.as_secs_f64());
                    let lingered =
                        proxy.serving_since()?.map(|since| now.duration_since(since).unwrap_or_default());
                    account.lingered.extend(lingered.map(|time| time.as_secs_f64()));
                }
                HandedOver::Not => {
                    account.gone[gone].push(extent.wait.as_secs_f64());
                    account.stayed += 1;
                }
                HandedOver::Ignored => account.ignored += 1,
            }
            // Each generation gets a connection that stays.
            crowd.tell(&Task::Renew)?;
            let served: bool = crowd.said()?;
            account.refused += u64::from(!served);
        }
    }
    account.left_behind = proxy.left_behind();
    crowd.tell(&Task::End)?;
    account.fates = crowd.said()?;
    Ok(account)
}
