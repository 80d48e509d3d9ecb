//! A chat server under `heirloom run`, which is killed by SIGKILL over and over.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::guests::address_of;
use super::proc::{children, only_child, signal};
use super::{Process, Scratch, heirloom, skip, status, try_status, wait_for};

/// `heirloom run`, and the chat server that it keeps.
pub(crate) struct Supervised {
    run: Process,
    /// `heirloom run` is PID 1 of a namespace.
    is_init: bool,
    /// The control sockets of the chat server, and of `heirloom run`.
    pub(crate) chat: PathBuf,
    control: PathBuf,
    pub(crate) address: SocketAddr,
}

impl Supervised {
    /// A chat server at a free port.
    pub(crate) fn start(scratch: &Scratch, options: &[&str]) -> Supervised {
        Supervised::start_with(scratch, &[], options)
    }

    /// Like [`Supervised::start`], with options for `heirloom run`.
    pub(crate) fn start_with(scratch: &Scratch, run: &[&str], options: &[&str]) -> Supervised {
        let (mut command, control, chat) = command(scratch, run, options);
        Supervised::start_by(&mut command, false, control, chat)
    }

    fn start_by(command: &mut Command, is_init: bool, control: PathBuf, chat: PathBuf) -> Supervised {
        let run = Process::start(command);
        let address = address_of(&run);
        Supervised { run, is_init, chat, control, address }
    }

    /// Like [`Supervised::start`], with `heirloom run` as the first process of a pid namespace. `None` where there can be none.
    pub(crate) fn start_as_init(scratch: &Scratch, options: &[&str]) -> Option<Supervised> {
        let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
        let can = Command::new("unshare").args(unshare).arg("true").stderr(Stdio::null()).status();
        if !can.is_ok_and(|status| status.success()) {
            skip("no pid namespace can be made here (unshare needs root)");
            return None;
        }
        let (run, control, chat) = command(scratch, &[], options);
        let mut namespace = Command::new("unshare");
        namespace.args(unshare).arg(run.get_program()).args(run.get_args());
        Some(Supervised::start_by(&mut namespace, true, control, chat))
    }

    /// The process that serves, as it sees itself.
    pub(crate) fn pid(&self) -> u32 {
        status(&self.chat).pid
    }

    /// Kills the process that serves: its pid.
    pub(crate) fn kill(&mut self) -> u32 {
        let pid = self.pid();
        self.kill_one(pid);
        pid
    }

    /// Kills the process with this pid, as it sees itself.
    pub(crate) fn kill_one(&self, pid: u32) {
        if let Some(pid) = self.outside(pid) {
            kill(pid);
        }
    }

    /// What a process of the service is called out here; `None` when it is gone.
    fn outside(&self, pid: u32) -> Option<u32> {
        if !self.is_init {
            return Some(pid);
        }
        let mut line = vec![self.run.id()];
        while let Some(next) = line.pop() {
            if pid_inside(next) == Some(pid) && next != self.run.id() {
                return Some(next);
            }
            line.extend(children(next).split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        None
    }

    /// Sends a signal to the process that serves.
    pub(crate) fn signal(&self, pid: u32, signal: Signal) {
        let pid = Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("it serves");
    }

    /// Waits until another process serves than this one. How long that took.
    pub(crate) fn wait_for_next(&mut self, killed: u32) -> Duration {
        let since = Instant::now();
        wait_for("the next process to serve", || {
            assert!(self.run.is_running(), "heirloom run has ended:\n{}", self.run.stderr());
            try_status(&self.chat).is_some_and(|status| status.pid != killed)
        });
        since.elapsed()
    }

    /// Has `heirloom run` upgrade the chat server: a takeover.
    pub(crate) fn upgrade(&self) -> Command {
        let mut command = heirloom();
        command.args(["upgrade", "--control"]).arg(&self.control);
        command
    }

    /// Has `heirloom run` become its program anew, with all that it holds.
    pub(crate) fn upgrade_run(&self) {
        let mut upgrade = heirloom();
        upgrade.args(["upgrade", "--self", "--control"]).arg(&self.control);
        Process::start(&mut upgrade).wait_for_code(0);
    }

    /// Has the chat server become another program in the same process, as soon as its store has everything.
    pub(crate) fn upgrade_in_place(&self) {
        wait_for("its upgrade in place", || {
            let mut upgrade = heirloom();
            upgrade.args(["upgrade", "--in-place", "--control"]).arg(&self.chat);
            let mut upgrade = Process::start(&mut upgrade);
            let ended = upgrade.wait();
            let is_early = ended.code() == Some(5) && upgrade.stderr().contains("into its store yet");
            assert!(is_early || ended.code() == Some(0), "{ended}: {}", upgrade.stderr());
            !is_early
        });
    }

    /// What both have logged.
    pub(crate) fn log(&self) -> String {
        self.run.stderr()
    }

    /// Ends everything.
    pub(crate) fn stop(mut self) -> String {
        let run = if self.is_init { only_child(self.run.id()) } else { self.run.id() };
        signal(run, Signal::TERM);
        self.run.wait_for_code(0);
        self.run.stderr()
    }
}

/// The command line, and where the two control sockets are.
fn command(scratch: &Scratch, run: &[&str], options: &[&str]) -> (Command, PathBuf, PathBuf) {
    let (control, chat) = (scratch.path("run.sock"), scratch.path("chat.sock"));
    let mut command = heirloom();
    command.args(["run", "--tries", "0", "--restart-delay", "0ms"]).args(run);
    command.arg("--control").arg(&control).arg("--");
    command.arg(env!("CARGO_BIN_EXE_heirloom")).args(["chat", "--listen", "127.0.0.1:0", "--control"]);
    command.arg(&chat).args(options);
    (command, control, chat)
}

/// A process's pid in the innermost of its pid namespaces (proc_pid_status(5)).
fn pid_inside(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

/// Kills a descendant of this process, which nobody has waited for unless it has just ended.
pub(crate) fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
    let _ = kill_process(pid, Signal::KILL);
}
