//! The command's life: started, stopped, waited for, started again, and the end of it all.

use std::path::PathBuf;
use std::time::Duration;

use heirloom_sys::{send_signal, send_signal_to_all};
use rustix::event::epoll;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde::{Deserialize, Serialize};

use super::above::Ending;
use super::process::Process;
use super::{Core, MAIN};
use crate::clock::Moment;
use crate::exit::Ended;
use crate::notify::sender::is_child;
use crate::options::{Command, Restart};
use crate::start::{Given, StartFailure, start};

/// What is to happen next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// The command runs.
    Up,
    /// It is started again at this time.
    Waiting { until: Moment },
    /// Processes that a run before has left are to end first; at this time they are killed, if they were not already.
    Clearing { kill_at: Option<Moment> },
    /// Its main process is to end; at this time it is killed, if it was not already.
    Stopping { kill_at: Option<Moment>, then: Then },
    /// It has ended for good, and this is PID 1, which ends after all others. Then with this code.
    Sweeping { kill_at: Option<Moment>, code: u8 },
}

/// What follows when the main process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Then {
    /// The end of it all.
    End,
    /// It has failed.
    Fail,
    /// The one beside it, which an upgrade has started, serves.
    Yield,
    /// An upgrade's new command is started.
    Replace,
    /// The command of before an upgrade is started.
    Revert,
}

/// What is known of the command by what it has said, also once in an earlier life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Known {
    /// It says when it is ready.
    pub(super) says_ready: bool,
    /// It fetches what is stored.
    pub(super) fetches: bool,
    /// It can be taken over from, at this control socket.
    pub(super) control: Option<PathBuf>,
}

impl Core {
    /// Starts the command with all that is stored.
    pub(super) fn start_main(&mut self, now: Moment) -> Result<(), StartFailure> {
        let pid = self.spawn(&self.command, true)?;
        tracing::info!(pid, command = self.command.words().join(" "), "started");
        self.main = Some(Process::new(pid, now, self.options.watchdog));
        self.main_pidfd = None;
        self.phase = Phase::Up;
        self.text.clear();
        self.note_processes();
        Ok(())
    }

    /// Starts a command; `with_descriptors`: it gets the sockets, and what is stored unless it fetches that.
    pub(super) fn spawn(&self, command: &Command, with_descriptors: bool) -> Result<u32, StartFailure> {
        use std::os::fd::AsFd;
        let listening = self.listening.iter().map(|socket| (socket.name.as_str(), socket.socket.as_fd()));
        let stored = self.store.iter().map(|(_, held)| (&*held.name, held.descriptor.as_fd()));
        let stored = stored.filter(|_| !self.known.fetches);
        start(
            command,
            &Given {
                descriptors: with_descriptors.then(|| listening.chain(stored).collect()),
                notify: &self.notify_path,
                control: &self.control,
                store_max: self.store_max,
                watchdog: self.options.watchdog,
                signal_mask: self.signal_mask,
                open_files: self.open_files,
            },
        )
    }

    /// A process has ended, and is no more.
    pub(super) fn has_ended(&mut self, pid: u32, ended: Ended) {
        let now = Moment::now();
        if self.main.as_ref().is_some_and(|main| main.pid == pid) {
            self.main_has_ended(ended, now);
        } else if !self.beside_has_ended(pid, ended, now) {
            self.counters.reaped += 1;
            tracing::debug!(pid, "an orphan has ended with {ended}");
        }
    }

    fn main_has_ended(&mut self, ended: Ended, now: Moment) {
        let Some(main) = self.main.take() else { return };
        self.main_pidfd = None;
        tracing::info!(pid = main.pid, "ended with {ended}");
        let ended = self.was_replaced_in_vain(ended, now).unwrap_or(ended);
        self.ended = Some(ended);
        let well = main.well(self.known.says_ready, now);
        match &self.phase {
            Phase::Stopping { then: Then::End, .. } => self.finish(ended.code(), now),
            Phase::Stopping { then: Then::Replace, .. } => self.start_replacement(now),
            Phase::Stopping { then: Then::Revert, .. } => self.start_previous(now),
            Phase::Stopping { then: Then::Fail | Then::Yield, .. } if self.upgrade.is_none() => {
                self.failed(well, now);
            }
            _ if self.upgrade.is_some() => self.main_ended_in_upgrade(ended, now),
            _ => match self.options.restart {
                Restart::Never => self.finish(ended.code(), now),
                Restart::OnFailure if ended.is_success() => self.finish(ended.code(), now),
                Restart::OnFailure | Restart::Always => self.failed(well, now),
            },
        }
    }

    /// Waits and starts again, or gives up.
    pub(super) fn failed(&mut self, well: Duration, now: Moment) {
        match self.backoff.failed(well, self.options.tries, self.options.restart_delay) {
            Some(wait) => {
                tracing::warn!(stored = self.store.len(), "starting again in {wait:?}, with what is stored");
                self.phase = Phase::Waiting { until: now.after(wait) };
            }
            None => {
                let code = self.ended.map_or(crate::exit::RUN_FAILED, Ended::code);
                tracing::error!(
                    failures = self.backoff.failures(),
                    stored = self.store.len(),
                    "failed too often in quick succession: giving up"
                );
                self.finish(code, now);
            }
        }
    }

    pub(super) fn start_again(&mut self, now: Moment) {
        match self.start_main(now) {
            Ok(()) => self.counters.restarts += 1,
            Err(failure) => {
                tracing::error!("{failure}");
                self.ended = Some(Ended::Code(failure.code));
                self.failed(Duration::ZERO, now);
            }
        }
    }

    /// Tells the main process to end, and kills it if it takes too long.
    pub(super) fn stop_main(&mut self, then: Then, now: Moment) {
        self.tell_main(Signal::TERM);
        self.stopping(then, now);
    }

    fn stopping(&mut self, then: Then, now: Moment) {
        self.phase = Phase::Stopping { kill_at: Some(now.after(self.options.stop_timeout)), then };
    }

    fn tell_main(&self, signal: Signal) {
        if let Some(main) = &self.main
            && let Err(error) = send_signal(main.pid, signal.as_raw())
        {
            tracing::debug!(%error, pid = main.pid, "cannot signal the main process");
        }
    }

    /// A signal has asked for the end, and was passed on.
    pub(super) fn end(&mut self, signal: i32, now: Moment) {
        self.ending.get_or_insert(Ending::Signal);
        self.withdraw_upgrade("heirloom run is told to end");
        match self.phase {
            Phase::Sweeping { .. } | Phase::Stopping { then: Then::End, .. } => {}
            _ if self.main.is_some() => self.stopping(Then::End, now),
            _ => self.finish(Ended::Signal(signal).code(), now),
        }
    }

    /// Somebody has asked for the end at the control socket.
    pub(super) fn quit(&mut self, now: Moment) {
        self.ending = Some(Ending::Quit);
        self.pass_on(Signal::TERM.as_raw());
        self.end(Signal::TERM.as_raw(), now);
    }

    /// Whether nothing is left but to wait for the end of all others.
    pub(super) fn is_sweeping(&self) -> bool {
        matches!(self.phase, Phase::Sweeping { .. })
    }

    /// Nothing is started any more.
    pub(super) fn finish(&mut self, code: u8, now: Moment) {
        self.withdraw_upgrade("heirloom run ends");
        // After a failure whoever is above may try again; after success nothing is to come back.
        self.leaves = match self.ending {
            Some(ending) => ending == Ending::Signal,
            None => code != 0,
        };
        if std::process::id() == 1 && !self.is_alone() {
            // It takes all others along; they are asked first.
            let _ = send_signal_to_all(Signal::TERM.as_raw());
            self.phase = Phase::Sweeping { kill_at: Some(now.after(self.options.stop_timeout)), code };
        } else {
            self.over = Some(code);
        }
    }

    pub(super) fn trigger_watchdog(&mut self, pid: u32, why: &str, now: Moment) {
        if self.main.as_ref().is_some_and(|main| main.pid == pid) && self.phase == Phase::Up {
            tracing::error!(pid, "the watchdog ends it: {why}");
            self.tell_main(Signal::ABORT);
            let then = if self.is_on_probation() { Then::Revert } else { Then::Fail };
            self.stopping(then, now);
        }
    }

    /// Does what is due.
    pub(super) fn run_timers(&mut self, now: Moment) {
        match self.phase {
            Phase::Waiting { until } if until <= now => self.start_again(now),
            Phase::Clearing { kill_at: Some(at) } if at <= now => {
                self.tell_previous(Signal::KILL);
                self.phase = Phase::Clearing { kill_at: None };
            }
            Phase::Stopping { kill_at: Some(at), then } if at <= now => {
                tracing::warn!("it does not end, and is killed");
                self.tell_main(Signal::KILL);
                self.phase = Phase::Stopping { kill_at: None, then };
            }
            Phase::Sweeping { code, .. } if self.is_alone() => self.over = Some(code),
            Phase::Sweeping { kill_at: Some(at), code } if at <= now => {
                let _ = send_signal_to_all(Signal::KILL.as_raw());
                self.phase = Phase::Sweeping { kill_at: None, code };
            }
            Phase::Up if self.start_deadline().is_some_and(|at| at <= now) => {
                tracing::error!("it does not say that it is ready, and is stopped");
                self.stop_main(Then::Fail, now);
            }
            Phase::Up if self.watchdog_deadline().is_some_and(|at| at <= now) => {
                let pid = self.main.as_ref().map_or(0, |main| main.pid);
                self.trigger_watchdog(pid, "it has given no sign of life in time", now);
            }
            _ => {}
        }
        self.run_put_off(now);
        self.run_upgrade_timer(now);
        self.run_fetch_timers(now);
    }

    /// When there is something to do, whatever happens.
    pub(super) fn next_timer(&self) -> Option<Moment> {
        let phase = match self.phase {
            Phase::Waiting { until } => Some(until),
            Phase::Clearing { kill_at }
            | Phase::Stopping { kill_at, .. }
            | Phase::Sweeping { kill_at, .. } => kill_at,
            Phase::Up => self.start_deadline().into_iter().chain(self.watchdog_deadline()).min(),
        };
        let fetches = self.fetches.values().map(|fetch| fetch.until).chain(self.retry_fetches).min();
        let upgrade = self.upgrade_deadline();
        let above = self.above.as_ref().and_then(|above| above.next_timer());
        let put_off = self.put_off.map(|(_, at)| at);
        [phase, fetches, upgrade, above, put_off, self.behind_until.filter(|_| !self.impatient)]
            .into_iter()
            .flatten()
            .min()
    }

    /// By when it must have said that it is ready. An upgrade has a time of its own.
    fn start_deadline(&self) -> Option<Moment> {
        let main = self.main.as_ref().filter(|main| main.ready.is_none())?;
        (self.known.says_ready && self.upgrade.is_none())
            .then(|| main.started.after(self.options.start_timeout))
    }

    fn watchdog_deadline(&self) -> Option<Moment> {
        self.main.as_ref()?.watchdog_at(self.options.start_timeout)
    }

    /// Hears of the end of a main process that need not be our child.
    pub(super) fn watch_main(&mut self) {
        self.main_pidfd = None;
        let main = self.main.as_ref().filter(|main| !is_child(main.pid));
        let Some(pid) = main.and_then(|main| Pid::from_raw(main.pid as i32)) else { return };
        let watched = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| {
            let token = epoll::EventData::new_u64(MAIN);
            epoll::add(&self.epoll, &pidfd, token, epoll::EventFlags::IN)?;
            Ok(pidfd)
        });
        match watched {
            Ok(pidfd) => self.main_pidfd = Some(pidfd),
            Err(error) => tracing::warn!(%error, "cannot watch the main process"),
        }
    }

    pub(super) fn main_pidfd_ready(&mut self) {
        // If it was our child after all, its code is known.
        self.read_messages(self.queue);
        self.reap_children();
        if self.main_pidfd.take().is_some() && self.main.is_some() {
            self.main_has_ended(Ended::Unknown, Moment::now());
        }
    }
}
