//! A chat server under `heirloom run`, which is killed by SIGKILL over and over.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::guests::address_of;
use super::{Process, Scratch, heirloom, status, try_status, wait_for};

/// `heirloom run`, and the chat server that it keeps.
pub(crate) struct Supervised {
    run: Process,
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
        let (control, chat) = (scratch.path("run.sock"), scratch.path("chat.sock"));
        let mut command = heirloom();
        command.args(["run", "--tries", "0", "--restart-delay", "0ms"]).args(run);
        command.arg("--control").arg(&control).arg("--");
        command.arg(env!("CARGO_BIN_EXE_heirloom")).args(["chat", "--listen", "127.0.0.1:0", "--control"]);
        command.arg(&chat).args(options);
        let run = Process::start(&mut command);
        let address = address_of(&run);
        Supervised { run, chat, control, address }
    }

    /// The process that serves.
    pub(crate) fn pid(&self) -> u32 {
        status(&self.chat).pid
    }

    /// Kills the process that serves: its pid.
    pub(crate) fn kill(&mut self) -> u32 {
        let pid = self.pid();
        kill(pid);
        pid
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

    /// Has the chat server become another program in the same process.
    pub(crate) fn upgrade_in_place(&self) {
        let mut upgrade = heirloom();
        upgrade.args(["upgrade", "--in-place", "--control"]).arg(&self.chat);
        Process::start(&mut upgrade).wait_for_code(0);
    }

    /// What both have logged.
    pub(crate) fn log(&self) -> String {
        self.run.stderr()
    }

    /// Ends everything.
    pub(crate) fn stop(mut self) -> String {
        self.run.signal(Signal::TERM);
        self.run.wait_for_code(0);
        self.run.stderr()
    }
}

/// Kills a descendant of this process, which nobody has waited for unless it has just ended.
pub(crate) fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
    let _ = kill_process(pid, Signal::KILL);
}
