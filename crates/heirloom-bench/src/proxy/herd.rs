//! The processes of one proxy, however they come and go: descendants of a keeper, a process of ours to which orphans return,
//! and which ends with all of them as soon as nobody needs it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};
use rustix::thread::{CpuSet, sched_setaffinity};

/// How often the keeper looks for children that have ended.
const REAP_EVERY: Duration = Duration::from_millis(20);

/// Keeps this process, and what it starts, on one processor.
pub(crate) fn stay_on(cpu: Option<usize>) -> anyhow::Result<()> {
    if let Some(cpu) = cpu {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).with_context(|| format!("there is no processor {cpu}"))?;
    }
    Ok(())
}

/// The keeper: starts the command, whose output goes into the file, and ends it and all that came of it when standard input ends.
pub(crate) fn keep(cpu: Option<usize>, log: &Path, command: &[OsString]) -> anyhow::Result<()> {
    stay_on(cpu)?;
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let (program, arguments) = command.split_first().context("no command")?;
    let log = File::create(log)?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let stdin = std::io::stdin();
    let every = Timespec::try_from(REAP_EVERY)?;
    while poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&every))? == 0 {
        reap();
    }
    loop {
        let left = descendants(std::process::id())?;
        if left.is_empty() {
            return Ok(());
        }
        for process in left {
            // It may just have ended.
            let _ = kill_process(process, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
        reap();
    }
}

fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// All living descendants of a process, the eldest first.
pub(crate) fn descendants(of: u32) -> anyhow::Result<Vec<Pid>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // It may just have ended.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // After the name, which may contain anything: state, parent.
        let mut rest = stat.rsplit(") ").next().unwrap_or("").split(' ');
        let (state, parent) = (rest.next(), rest.next().and_then(|parent| parent.parse().ok()));
        if let (Some(state), Some(parent)) = (state, parent)
            && state != "Z"
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![of as i32];
    let mut at = 0;
    while let Some(parent) = found.get(at) {
        let mut young = children.remove(parent).unwrap_or_default();
        young.sort_unstable();
        found.extend(young);
        at += 1;
    }
    Ok(found.into_iter().skip(1).filter_map(Pid::from_raw).collect())
}
