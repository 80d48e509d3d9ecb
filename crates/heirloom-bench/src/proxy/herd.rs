//! The processes of one proxy, however they come and go: descendants of a keeper, a process of ours to which orphans return,
//! and which ends with all of them as soon as nobody needs it.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::process::{say, told};

/// Keeps this process, and what it starts, on one processor.
pub(crate) fn stay_on(cpu: Option<usize>) -> anyhow::Result<()> {
    if let Some(cpu) = cpu {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).with_context(|| format!("there is no processor {cpu}"))?;
    }
    Ok(())
}

/// The keeper: starts the command, whose output goes into the file, reaps what has ended for each line of standard input, and ends
/// it and all that came of it when that ends.
pub(crate) fn keep(cpu: Option<usize>, log: &Path, command: &[OsString]) -> anyhow::Result<()> {
    stay_on(cpu)?;
    let own = std::process::id();
    std::fs::metadata(format!("/proc/{own}/task/{own}/children"))
        .context("this kernel does not list the children of a process (CONFIG_PROC_CHILDREN)")?;
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
    // Those that have ended are reaped when we are told to, and not while something is measured: where somebody has looked at what
    // all processes have open, the kernel forgets thousands of entries of /proc then.
    while told::<()>()?.is_some() {
        reap();
        say(&())?;
    }
    loop {
        let left = descendants(std::process::id());
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

/// All living descendants of a process, the eldest first. It looks at no other process: whatever is measured meanwhile has little of it.
pub(crate) fn descendants(of: u32) -> Vec<Pid> {
    let mut found = vec![of];
    let mut at = 0;
    while let Some(&parent) = found.get(at) {
        let mut young = children(parent);
        young.retain(|&pid| lives(pid));
        young.sort_unstable();
        found.extend(young);
        at += 1;
    }
    found.into_iter().skip(1).filter_map(|pid| Pid::from_raw(pid as i32)).collect()
}

/// The children of all threads of a process. Either may have just ended.
fn children(of: u32) -> Vec<u32> {
    let mut all = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten() {
        let listed = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        all.extend(listed.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    all
}

/// Whether a process has not ended yet: one for which nobody has waited has.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // The state comes after the name, which may contain anything.
    stat.is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or("").starts_with('Z'))
}
