//! An upgrade of the command: a new version of it takes the place of the one that runs, or nothing changes.
//!
//! A command that knows takeovers is started beside the running one, and becomes the main process once it says that it is
//! ready and the other has ended. Any other is stopped, and its new version is started with the store; if that is not well
//! in time, the previous command is started again. Nothing of the store is lost in either case.

use std::path::Path;
use std::time::Duration;

use heirloom::ConnectionId;
use heirloom::control::{Failure, FailureCode};
use heirloom::upgrade::Upgrade;
use heirloom_sys::send_signal;
use rustix::process::Signal;

use super::Core;
use super::control::Answer;
use super::life::{Phase, Then};
use super::process::Process;
use crate::clock::Moment;
use crate::exit::Ended;
use crate::options::Command;

/// How long a command that does not say when it is ready has to live to count as well.
const PROBATION: Duration = Duration::from_secs(1);
/// How long a process that has been replaced takes to end, at most.
const LINGERS: Duration = Duration::from_secs(10);

/// An upgrade that is going on.
#[derive(Debug)]
pub(super) struct Upgrading {
    /// Who waits for the outcome.
    client: ConnectionId,
    command: Command,
    previous: Command,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The new one runs beside the old one, and is to take over by then. None: it has, and the old one is told to end.
    Beside { process: Process, until: Option<Moment> },
    /// The old one is being stopped.
    Stopping,
    /// The new one is the main process, and is to be well by then.
    Probation { until: Moment },
    /// The new one has failed for this reason and is being stopped; the previous command is started again.
    Reverting { why: String },
}

/// A process beside the main one that has ended, and may have taken over by then: a main process that ends well until then was
/// replaced by it, and nobody serves.
#[derive(Debug)]
pub(super) struct Lost {
    ended: Ended,
    until: Option<Moment>,
}

impl Upgrading {
    /// The process beside the main one, if there is one.
    pub(super) fn beside(&self) -> Option<&Process> {
        match &self.stage {
            Stage::Beside { process, .. } => Some(process),
            _ => None,
        }
    }

    pub(super) fn beside_mut(&mut self) -> Option<&mut Process> {
        match &mut self.stage {
            Stage::Beside { process, .. } => Some(process),
            _ => None,
        }
    }

    fn deadline(&self) -> Option<Moment> {
        match self.stage {
            Stage::Beside { until, .. } => until,
            Stage::Probation { until } => Some(until),
            Stage::Stopping | Stage::Reverting { .. } => None,
        }
    }
}

impl Core {
    /// Why an upgrade cannot begin, if it cannot.
    pub(super) fn check_upgrade(&self, request: &Upgrade) -> Result<(), Failure> {
        let refused = |code, message: &str| Err(Failure::new(code, message));
        if self.upgrade.is_some() {
            return refused(FailureCode::Busy, "another upgrade is going on; try again when it has ended");
        }
        if request.dry_run {
            return refused(
                FailureCode::Failed,
                "a command can only be upgraded or not, it cannot be asked beforehand; --dry-run is for --self",
            );
        }
        if request.in_place {
            return refused(
                FailureCode::Failed,
                "a command is not upgraded in place by heirloom run; ask at its own control socket, or say --self",
            );
        }
        if self.main.is_none() || self.phase != Phase::Up {
            return refused(
                FailureCode::Busy,
                "the command does not run at the moment; try again when it does, or end this and start it anew",
            );
        }
        Ok(())
    }

    /// Begins an upgrade that can begin.
    pub(super) fn begin_upgrade(&mut self, request: &Upgrade, client: ConnectionId, now: Moment) {
        let mut command = self.command.clone();
        if let Some(program) = &request.program {
            command.program = program.into();
        }
        if let Some(arguments) = &request.arguments {
            command.arguments = arguments.iter().map(Into::into).collect();
        }
        let previous = self.command.clone();
        let control = self.known.control.clone();
        tracing::info!(command = command.words().join(" "), beside = control.is_some(), "upgrade begins");
        let stage = match control {
            Some(control) => match self.start_beside(&command, &control, now) {
                Ok(stage) => stage,
                Err(why) => {
                    let failure = rolled_back(&command, &why);
                    return self.answers.push((client, Answer::Failure(failure)));
                }
            },
            None => {
                self.stop_main(Then::Replace, now);
                Stage::Stopping
            }
        };
        self.upgrade = Some(Upgrading { client, command, previous, stage });
        self.lost = None;
        self.note_processes();
    }

    fn start_beside(&self, command: &Command, control: &Path, now: Moment) -> Result<Stage, String> {
        let pid = self.spawn(command, false).map_err(|failure| failure.to_string())?;
        tracing::info!(pid, control = %control.display(), "started beside, to take over");
        let process = Process::new(pid, now, self.options.watchdog);
        Ok(Stage::Beside { process, until: Some(now.after(self.options.start_timeout)) })
    }

    /// The old one has ended: starts the new one with the store.
    pub(super) fn start_replacement(&mut self, now: Moment) {
        let Some(upgrade) = &mut self.upgrade else { return self.failed(Duration::ZERO, now) };
        self.command = upgrade.command.clone();
        match self.start_main(now) {
            Ok(()) => {
                let time = if self.known.says_ready { self.options.start_timeout } else { PROBATION };
                if let Some(upgrade) = &mut self.upgrade {
                    upgrade.stage = Stage::Probation { until: now.after(time) };
                }
            }
            Err(failure) => self.revert(failure.to_string(), now),
        }
    }

    /// The new one has failed: the previous command is started, when no process is in its way any more.
    fn revert(&mut self, why: String, now: Moment) {
        tracing::warn!("the upgrade failed: {why}");
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.stage = Stage::Reverting { why };
        }
        if self.main.is_some() {
            self.stop_main(Then::Revert, now);
        } else {
            self.start_previous(now);
        }
    }

    /// Starts the command of before the upgrade.
    pub(super) fn start_previous(&mut self, now: Moment) {
        let Some(upgrade) = self.upgrade.take() else { return self.failed(Duration::ZERO, now) };
        let why = match upgrade.stage {
            Stage::Reverting { why } => why,
            _ => "it was ended by the watchdog".into(),
        };
        self.command = upgrade.previous;
        let mut failure = rolled_back(&upgrade.command, &why);
        if let Err(error) = self.start_main(now) {
            failure = Failure::new(
                FailureCode::Failed,
                format!("{why}; and the previous command cannot be started again: {error}"),
            );
            self.ended = Some(Ended::Code(error.code));
            self.failed(Duration::ZERO, now);
        }
        self.answers.push((upgrade.client, Answer::Failure(failure)));
    }

    /// Whether a main process has not yet shown that it is well, after an upgrade.
    pub(super) fn is_on_probation(&self) -> bool {
        matches!(&self.upgrade, Some(Upgrading { stage: Stage::Probation { .. }, .. }))
    }

    pub(super) fn main_ended_in_upgrade(&mut self, ended: Ended, now: Moment) {
        self.phase = Phase::Up;
        match &self.upgrade {
            // It hands over, or has failed: the new one decides.
            Some(Upgrading { stage: Stage::Beside { .. }, .. }) => self.look_at_upgrade(),
            _ => self.revert(format!("it ended with {ended} before it was well"), now),
        }
    }

    /// Whether this was the process beside the main one.
    pub(super) fn beside_has_ended(&mut self, pid: u32, ended: Ended, now: Moment) -> bool {
        let beside = self.upgrade.as_ref().and_then(Upgrading::beside);
        let Some(beside) = beside.filter(|beside| beside.pid == pid) else { return false };
        let (lost, when) = match ended {
            // It has said that it serves.
            _ if beside.ready.is_some() => (Some(Lost { ended, until: None }), "when it had taken over"),
            // It may not have come to saying so.
            Ended::Signal(_) => {
                (Some(Lost { ended, until: Some(now.after(LINGERS)) }), "before it was ready")
            }
            _ => (None, "before it took over"),
        };
        // Without a main process the previous command is started at once.
        self.lost = lost.filter(|_| self.main.is_some());
        self.beside_failed(format!("it ended with {ended} {when}"), now);
        true
    }

    fn beside_failed(&mut self, why: String, now: Moment) {
        if self.main.is_none() {
            return self.revert(why, now);
        }
        tracing::warn!("the upgrade failed: {why}");
        if let Some(upgrade) = self.upgrade.take() {
            let failure = rolled_back(&upgrade.command, &why);
            self.answers.push((upgrade.client, Answer::Failure(failure)));
        }
    }

    /// The main process has ended, and was not told to. If it was replaced by one that is no more: how that one ended.
    pub(super) fn was_replaced_in_vain(&mut self, ended: Ended, now: Moment) -> Option<Ended> {
        let in_time = |lost: &Lost| lost.until.is_none_or(|until| now <= until);
        let lost = self.lost.take().filter(in_time)?;
        if !ended.is_success() || matches!(self.phase, Phase::Stopping { .. }) {
            return None;
        }
        tracing::warn!("what has taken over from it has ended with {}", lost.ended);
        Some(lost.ended)
    }

    /// Ends the upgrade if the new one is well, and nothing else is to be waited for.
    pub(super) fn look_at_upgrade(&mut self) {
        let Some(upgrade) = &self.upgrade else { return };
        match &upgrade.stage {
            Stage::Beside { process, .. } if process.ready.is_some() && self.main.is_none() => {
                self.main = Some(process.clone());
                self.phase = Phase::Up;
                self.upgraded();
            }
            Stage::Probation { .. } if self.main.as_ref().is_some_and(|main| main.ready.is_some()) => {
                self.upgraded();
            }
            _ => {}
        }
    }

    fn upgraded(&mut self) {
        let Some(upgrade) = self.upgrade.take() else { return };
        self.command = upgrade.command;
        self.backoff = Default::default();
        tracing::info!(pid = self.main.as_ref().map(|main| main.pid), "upgraded");
        self.answers.push((upgrade.client, Answer::Upgraded));
    }

    /// When there is something to decide, whatever happens.
    pub(super) fn upgrade_deadline(&self) -> Option<Moment> {
        let upgrade = self.upgrade.as_ref()?;
        // One that is being stopped already has nothing to be in time for.
        let decided = self.is_on_probation() && self.phase != Phase::Up;
        upgrade.deadline().filter(|_| !decided)
    }

    pub(super) fn run_upgrade_timer(&mut self, now: Moment) {
        let Some(upgrade) = &mut self.upgrade else { return };
        if upgrade.deadline().is_none_or(|at| at > now) {
            return;
        }
        let limit = self.options.start_timeout;
        match &mut upgrade.stage {
            // It serves, and the old one lingers.
            Stage::Beside { process, until } if process.ready.is_some() => {
                *until = None;
                tracing::warn!("the old process lingers, and is stopped");
                self.stop_main(Then::Yield, now);
            }
            Stage::Beside { process, .. } => {
                let _ = send_signal(process.pid, Signal::KILL.as_raw());
                self.beside_failed(format!("it did not say within {limit:?} that it is ready"), now);
            }
            // It is being stopped already.
            Stage::Probation { .. } if self.phase != Phase::Up => {}
            Stage::Probation { .. } if self.known.says_ready => {
                self.revert(format!("it did not say within {limit:?} that it is ready"), now);
            }
            // It has lived long enough.
            Stage::Probation { .. } => self.upgraded(),
            _ => {}
        }
    }

    /// Ends an upgrade whose outcome is not wanted any more.
    pub(super) fn withdraw_upgrade(&mut self, why: &str) {
        let Some(upgrade) = self.upgrade.take() else { return };
        if let Stage::Beside { process, .. } = upgrade.stage {
            if self.main.is_none() || process.ready.is_some() {
                // It serves by now: it is what is to be ended.
                self.main = Some(process);
            } else {
                let _ = send_signal(process.pid, Signal::KILL.as_raw());
            }
        }
        let failure = Failure::new(FailureCode::Failed, format!("the upgrade is not wanted any more: {why}"));
        self.answers.push((upgrade.client, Answer::Failure(failure)));
    }
}

fn rolled_back(command: &Command, why: &str) -> Failure {
    let program = command.program.to_string_lossy();
    Failure::new(
        FailureCode::RolledBack,
        format!("{program} cannot take over, and the previous command serves: {why}"),
    )
}
