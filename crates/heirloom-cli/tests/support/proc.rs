//! What the kernel tells of a process (`proc(5)`): its descriptors, signals and children.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait_for;

/// What a process holds and how it takes signals: the same before an upgrade and after one that has failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// What each descriptor leads to, and whether it is close-on-exec.
    descriptors: BTreeMap<u32, (PathBuf, bool)>,
    /// Waiting, blocked, ignored and handled signals.
    signals: Vec<String>,
    children: String,
}

impl Footprint {
    /// Of a process that is there.
    pub(crate) fn of(pid: u32) -> Footprint {
        let status = read(pid, "status");
        let signals = status.lines().filter(|line| line.starts_with("Sig") || line.starts_with("ShdPnd"));
        // What counts all waiting signals of the user's is nobody's own.
        let signals = signals.filter(|line| !line.starts_with("SigQ")).map(str::to_owned).collect();
        Footprint { descriptors: descriptors(pid), signals, children: children(pid) }
    }

    /// How many descriptors it has.
    pub(crate) fn descriptors(&self) -> usize {
        self.descriptors.len()
    }

    /// How many descriptors lead to each kind of thing: files by their paths, the others without the numbers in their names.
    pub(crate) fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for (leads_to, _) in self.descriptors.values() {
            let name = leads_to.to_string_lossy();
            let kind = name.split_once(":[").map_or(&*name, |(kind, _)| kind);
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        kinds
    }

    pub(crate) fn signals(&self) -> &[String] {
        &self.signals
    }

    /// Fails unless a program that it becomes would get nothing but the standard streams, and it has no children.
    #[track_caller]
    pub(crate) fn assert_tidy(&self) {
        // What the tests were started with is inherited by everybody.
        let inherited = descriptors(std::process::id());
        let stray: Vec<_> = self
            .descriptors
            .iter()
            .filter(|(number, (_, cloexec))| **number > 2 && !cloexec && !inherited.contains_key(number))
            .collect();
        assert!(stray.is_empty(), "not close-on-exec: {stray:?}");
        assert_eq!(self.children, "", "it has children");
    }
}

/// Waits until a process has this footprint, again.
#[track_caller]
pub(crate) fn wait_for_footprint(what: &str, pid: u32, expected: &Footprint) {
    let mut last = Footprint::default();
    let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for(what, || {
            last = Footprint::of(pid);
            last == *expected
        });
    }));
    assert!(waited.is_ok(), "{what}: {last:#?}\nis not\n{expected:#?}");
}

/// What a process has when nobody talks to it.
pub(crate) fn settled_footprint(pid: u32) -> Footprint {
    let mut last = Footprint::of(pid);
    wait_for("nobody to talk to it", || {
        let before = std::mem::replace(&mut last, Footprint::of(pid));
        thread::sleep(Duration::from_millis(20));
        before == last && last == Footprint::of(pid)
    });
    last.assert_tidy();
    last
}

/// The pids of a process's children, as the kernel writes them.
pub(crate) fn children(pid: u32) -> String {
    read(pid, &format!("task/{pid}/children"))
}

/// The only child of a process, once it is there.
pub(crate) fn only_child(pid: u32) -> u32 {
    let mut child = None;
    wait_for("a child", || {
        child = children(pid).split_whitespace().next().and_then(|pid| pid.parse().ok());
        child.is_some()
    });
    child.expect("waited for")
}

/// The environment with which the program that the process runs was started.
pub(crate) fn environment(pid: u32) -> Vec<String> {
    read(pid, "environ").split_terminator('\0').map(str::to_owned).collect()
}

/// Whether a process has ended, waited for or not.
pub(crate) fn has_ended(pid: u32) -> bool {
    matches!(state(pid), None | Some('Z' | 'X'))
}

/// Whether a process was stopped by a signal.
pub(crate) fn is_stopped(pid: u32) -> bool {
    state(pid) == Some('T')
}

/// Whether a process waits for something.
pub(crate) fn is_asleep(pid: u32) -> bool {
    state(pid) == Some('S')
}

/// The letter of its state, while it is there.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // It comes after the name, which is in brackets.
    stat.rsplit(") ").next()?.chars().next()
}

/// Whether a process has locked this file by flock(2) (`proc_locks(5)`).
pub(crate) fn holds_lock(pid: u32, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", fs::metadata(path).expect("the lock file").ino());
    let locks = fs::read_to_string("/proc/locks").expect("it can be read");
    // "1: FLOCK  ADVISORY  WRITE 4711 00:1c:815 0 EOF"; those that wait have an arrow behind the number.
    locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        fields.get(1) == Some(&"FLOCK")
            && fields.get(4) == Some(&pid.to_string().as_str())
            && fields.get(5).is_some_and(|file| file.ends_with(&inode))
    })
}

/// How much memory a process has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Resident pages.
    pub(crate) rss_kib: u64,
    /// Those of them that no file backs: heap and stacks.
    pub(crate) anonymous_kib: u64,
    /// All of them, each divided by the number of processes that share it: so it varies with how many run the program.
    pub(crate) pss_kib: u64,
}

/// How much memory may differ between two moments at which a process does the same: what the allocator keeps, and which
/// pages of the program happen to have been read.
const NOISE_KIB: u64 = 1024;

impl Memory {
    /// The median of each.
    pub(crate) fn median(samples: &[Memory]) -> Memory {
        let median = |of: fn(&Memory) -> u64| {
            let mut all: Vec<u64> = samples.iter().map(of).collect();
            all.sort_unstable();
            all[all.len() / 2]
        };
        Memory {
            rss_kib: median(|memory| memory.rss_kib),
            anonymous_kib: median(|memory| memory.anonymous_kib),
            pss_kib: median(|memory| memory.pss_kib),
        }
    }

    /// Fails if it is more than it was, but for noise.
    #[track_caller]
    pub(crate) fn assert_not_more_than(&self, before: &Memory) {
        let grown = |now: u64, then: u64| now > then + NOISE_KIB;
        let grown = grown(self.rss_kib, before.rss_kib) || grown(self.anonymous_kib, before.anonymous_kib);
        assert!(!grown, "it has grown: {self} instead of {before}");
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { rss_kib, anonymous_kib, pss_kib } = self;
        write!(f, "{rss_kib} KiB resident ({anonymous_kib} anonymous, {pss_kib} proportional)")
    }
}

/// How much memory a process has now.
pub(crate) fn memory(pid: u32) -> Memory {
    let rollup = read(pid, "smaps_rollup");
    let kib = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)).expect("it is there");
        line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number")
    };
    Memory { rss_kib: kib("Rss:"), anonymous_kib: kib("Anonymous:"), pss_kib: kib("Pss:") }
}

/// The processes that have this path as an argument, and have not ended.
pub(crate) fn naming(path: &Path) -> Vec<u32> {
    let entries =
        fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let processes = entries.filter_map(|name| name.parse().ok());
    processes.filter(|&pid| names(pid, path) && !has_ended(pid)).collect()
}

/// Whether a process has this path as an argument.
fn names(pid: u32, path: &Path) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.split(|&byte| byte == 0).any(|argument| argument == path.as_os_str().as_encoded_bytes())
}

/// The file of the program that the process runs.
pub(crate) fn program(pid: u32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).expect("it is there")
}

/// Sends a signal to a process that is there for sure: a child that has not been waited for, or one that serves.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a pid");
    kill_process(pid, signal).expect("kill");
}

/// The names of a process's threads.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect()
}

/// On which processors the threads whose names begin so may run, as the kernel lists them.
pub(crate) fn processors(pid: u32, name: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let field = |status: &str, field: &str| {
        let line =
            status.lines().find_map(|line| line.strip_prefix(field).map(|value| value.trim().to_owned()));
        line.expect("every thread has it")
    };
    let its = statuses.filter(|status| field(status, "Name:").starts_with(name));
    its.map(|status| field(&status, "Cpus_allowed_list:")).collect()
}

/// How long its threads have run on a processor, in nanoseconds.
pub(crate) fn time_running(pid: u32) -> u64 {
    let of = |thread: fs::DirEntry| -> Option<u64> {
        fs::read_to_string(thread.path().join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    // One that ends meanwhile counts for nothing.
    threads.filter_map(|thread| of(thread.ok()?)).sum()
}

/// Ends a process, by SIGKILL, if it is one that serves at this control path.
pub(crate) fn kill_one_that_serves(control: &Path, pid: u32) {
    let names_it = names(pid, control);
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|_| names_it) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn descriptors(pid: u32) -> BTreeMap<u32, (PathBuf, bool)> {
    const O_CLOEXEC: u32 = 0o2000000;
    let mut descriptors = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors") {
        let entry = entry.expect("an entry");
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be closed by now.
        let Ok(leads_to) = fs::read_link(entry.path()) else { continue };
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags");
        let flags = u32::from_str_radix(flags.trim(), 8).expect("octal");
        descriptors.insert(number, (leads_to, flags & O_CLOEXEC != 0));
    }
    descriptors
}

fn read(pid: u32, file: &str) -> String {
    let path = format!("/proc/{pid}/{file}");
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"));
    String::from_utf8_lossy(&bytes).into_owned()
}
