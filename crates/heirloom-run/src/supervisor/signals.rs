//! Signals: which are passed on, which end it all, and the children that have ended.
//!
//! All are blocked and read as they come, but for SIGTSTP, SIGTTIN and SIGTTOU, by which a terminal stops this process
//! together with the command. What is read is passed on to the main process; SIGCHLD and SIGPIPE are this process's own
//! affair.

use std::io;
use std::time::Duration;

use heirloom_sys::{Signal as Received, SignalMask, send_signal};
use rustix::process::{Pid, Signal, WaitOptions, getpgid, getpgrp, wait, waitpid};

use super::Core;
use crate::above::Above;
use crate::clock::Moment;
use crate::exit::Ended;

/// systemd sends SIGTERM to all processes of a unit, and some take a second one for impatience: so long a command that was
/// sent it has to show that, before it is passed on.
const PUT_OFF: Duration = Duration::from_millis(200);

/// Blocks what is read instead, and returns the mask of before.
pub(super) fn block() -> io::Result<SignalMask> {
    let before = SignalMask::block_all()?;
    watched().set()?;
    Ok(before)
}

/// The signals that are read.
pub(super) fn watched() -> SignalMask {
    let left = [Signal::TSTP, Signal::TTIN, Signal::TTOU];
    SignalMask(left.iter().fold(u64::MAX, |mask, signal| mask & !(1 << (signal.as_raw() - 1))))
}

impl Core {
    pub(super) fn read_signals(&mut self) {
        loop {
            match self.signals.read() {
                Ok(Some(signal)) => self.signalled(signal),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot read signals");
                    return;
                }
            }
        }
    }

    fn signalled(&mut self, signal: Received) {
        let is = |named: Signal| signal.number == named.as_raw();
        if is(Signal::CHILD) {
            self.reap = true;
            return;
        }
        if is(Signal::PIPE) {
            return;
        }
        let ends = is(Signal::TERM) || is(Signal::INT);
        if ends
            && signal.code != Received::KERNEL
            && self.above.as_ref().is_some_and(Above::signals_everybody)
        {
            self.put_off = Some((signal.number, Moment::now().after(PUT_OFF)));
        } else if !self.has_reached_main(signal) {
            self.pass_on(signal.number);
        }
        if ends {
            self.end(signal.number, Moment::now());
        }
    }

    /// Passes on what was put off, if the command does not end by itself.
    pub(super) fn run_put_off(&mut self, now: Moment) {
        if let Some((signal, _)) = self.put_off.take_if(|(_, at)| *at <= now)
            && self.main.as_ref().is_some_and(|main| !main.stopping)
        {
            self.pass_on(signal);
        }
    }

    /// Whether the terminal has sent it to the whole foreground process group, and the main process is in that.
    fn has_reached_main(&self, signal: Received) -> bool {
        let by_key = [Signal::INT, Signal::QUIT, Signal::WINCH];
        let pid = self.main.as_ref().and_then(|main| Pid::from_raw(main.pid as i32));
        signal.code == Received::KERNEL
            && by_key.iter().any(|named| signal.number == named.as_raw())
            && pid.is_some_and(|pid| getpgid(Some(pid)).is_ok_and(|group| group == getpgrp()))
    }

    pub(super) fn pass_on(&mut self, signal: i32) {
        for pid in self.known_processes() {
            if let Err(error) = send_signal(pid, signal) {
                tracing::debug!(%error, pid, signal, "cannot pass a signal on");
            }
        }
    }

    /// The processes that are looked after.
    pub(super) fn known_processes(&self) -> impl Iterator<Item = u32> + use<> {
        let beside = self.upgrade.as_ref().and_then(|upgrade| upgrade.beside());
        let pids = [self.main.as_ref(), beside].map(|process| process.map(|process| process.pid));
        pids.into_iter().flatten().chain(self.noted.previous().to_vec())
    }

    /// Waits for all children that have ended, whoever's they were.
    pub(super) fn reap_children(&mut self) {
        if self.reap_known_only {
            // The others are looked at when the upgrade is over.
            for pid in self.known_processes() {
                self.reap_one(Pid::from_raw(pid as i32));
            }
            return;
        }
        self.reap = false;
        while self.reap_one(None) {}
    }

    fn reap_one(&mut self, pid: Option<Pid>) -> bool {
        // To rustix's waitpid nobody means this process group alone.
        let ended = match pid {
            Some(pid) => waitpid(Some(pid), WaitOptions::NOHANG),
            None => wait(WaitOptions::NOHANG),
        };
        match ended {
            Ok(Some((pid, status))) => {
                self.has_ended(pid.as_raw_nonzero().get().unsigned_abs(), Ended::of(status));
                true
            }
            Err(rustix::io::Errno::INTR) => true,
            Ok(None) | Err(_) => false,
        }
    }

    /// Whether there is no child left.
    pub(super) fn is_alone(&self) -> bool {
        let options = rustix::process::WaitIdOptions::NOHANG
            | rustix::process::WaitIdOptions::NOWAIT
            | rustix::process::WaitIdOptions::EXITED;
        matches!(
            rustix::process::waitid(rustix::process::WaitId::All, options),
            Err(rustix::io::Errno::CHILD)
        )
    }
}
