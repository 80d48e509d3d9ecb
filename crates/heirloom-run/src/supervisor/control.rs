//! The control socket: status, fetches, upgrades, the end.

use std::time::Instant;

use heirloom::control::{Failure, FailureCode, ItemStatus, Reply, Status, Supervised};
use heirloom::{Delegated, Kind, Turn};
use serde::{Deserialize, Serialize};

use super::life::Phase;
use super::{Core, Supervisor};
use crate::above::Above;
use crate::clock::Moment;

/// What is asked at this control socket beside what is asked at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Send me all that is stored. Answered by `{"Fetch":{"descriptors":N}}`, and a channel beside it.
    Fetch,
}

/// What a client that asked for an upgrade is told.
#[derive(Debug)]
pub(super) enum Answer {
    Upgraded,
    Failure(Failure),
}

/// Why an upgrade in place cannot be now.
const BUSY: &str = "the command is being upgraded, stopped or fetched for; try again later";

impl Supervisor {
    /// Answers what has been asked.
    pub(super) fn hear_control(&mut self) {
        let core = &mut self.core;
        loop {
            let turn = match self.incumbent.turn(Instant::now()) {
                Ok(turn) => turn,
                Err(error) => {
                    tracing::error!(%error, "the control socket fails");
                    return;
                }
            };
            match turn {
                Turn::Idle => return,
                Turn::Offer(offer) if offer.is_for_successor() => offer.refuse(
                    "heirloom run hands its children to nobody; upgrade it in place (--self), or end it",
                ),
                Turn::Offer(offer) => match core.base() {
                    Ok(base) => {
                        if let Err(error) = offer.begin(base) {
                            tracing::error!("cannot show what is held: {error}");
                        }
                    }
                    Err(error) => offer.refuse(&error.to_string()),
                },
                Turn::Batch(batch) => batch.send(|id| core.descriptor(id)),
                Turn::Freeze(freeze) if core.is_busy() => freeze.resume(BUSY),
                Turn::Freeze(freeze) => {
                    core.begin_reload(Moment::now());
                    match core.base() {
                        Ok(base) => match freeze.release_all(base, |id| core.descriptor(id)) {
                            Ok(outcome) => tracing::warn!(?outcome, "the upgrade in place did not happen"),
                            Err(error) => tracing::error!("the upgrade in place did not happen: {error}"),
                        },
                        Err(error) => freeze.resume(&error.to_string()),
                    }
                }
                Turn::Request(mut asked) => match asked.request() {
                    Some(Ask::Fetch) => match core.begin_fetch() {
                        Ok((count, channel)) => {
                            let line = format!("{{\"Fetch\":{{\"descriptors\":{count}}}}}\n");
                            asked.reply_raw(line.into_bytes(), vec![channel]);
                        }
                        Err(why) => asked.refuse(&why),
                    },
                    None => asked.refuse("it was answered already"),
                },
                Turn::Delegated(Delegated::Status(asked)) => {
                    let status = core.fill(asked.status());
                    asked.answer(status);
                }
                Turn::Delegated(Delegated::Upgrade(asked)) => {
                    let request = asked.request().clone();
                    if request.itself {
                        match core.is_busy() {
                            true => asked.refuse(Failure::new(FailureCode::Busy, BUSY)),
                            false => asked.of_this_process(),
                        }
                        continue;
                    }
                    let generation = asked.status().generation;
                    let names = request.program.is_some() || request.arguments.is_some();
                    if names && !asked.may_name_a_program() {
                        asked.refuse(Failure::new(
                            FailureCode::Permission,
                            "only the supervisor's own user and root may say what is run; leave program and arguments out",
                        ));
                    } else if request.generation.is_some_and(|meant| meant != generation) {
                        let message = format!(
                            "generation {generation} serves by now, and another one was meant; ask again"
                        );
                        asked.refuse(Failure::new(FailureCode::Busy, message));
                    } else if let Err(failure) = core.check_upgrade(&request) {
                        asked.refuse(failure);
                    } else {
                        let client = asked.defer();
                        core.begin_upgrade(&request, client, Moment::now());
                    }
                }
                Turn::Quit(_) => core.quit(Moment::now()),
                Turn::Closed(_) => {}
            }
        }
    }

    /// Tells those who have waited what became of their upgrades.
    pub(super) fn answer(&mut self) {
        for (client, answer) in std::mem::take(&mut self.core.answers) {
            let reply = match answer {
                Answer::Upgraded => Reply::Upgraded(self.core.fill(self.incumbent.status())),
                Answer::Failure(failure) => Reply::Error(failure),
            };
            self.incumbent.answer_later(client, reply.to_line(), Vec::new());
        }
    }
}

impl Core {
    /// What an upgrade in place could not carry over.
    fn is_busy(&self) -> bool {
        self.upgrade.is_some()
            || !self.fetches.is_empty()
            || self.over.is_some()
            || matches!(self.phase, Phase::Clearing { .. })
            || self.above.as_ref().is_some_and(Above::is_behind)
    }

    /// The status, with all that is known here.
    fn fill(&self, mut status: Status) -> Status {
        let listening = self.listening.iter().map(|socket| ItemStatus {
            id: socket.id,
            name: socket.name.clone(),
            kind: kind(&socket.socket),
            put_by: None,
        });
        let stored = self.store.iter().map(|(number, held)| ItemStatus {
            id: number,
            name: held.name.to_string(),
            kind: kind(&held.descriptor),
            put_by: Some(held.put_by),
        });
        status.items = listening.chain(stored).collect();
        let counters = &self.counters;
        for (name, value) in [
            ("stored", self.store.len() as u64),
            ("puts", counters.puts),
            ("removes", counters.removes),
            ("duplicates", counters.duplicates),
            ("hung_up", counters.hung_up),
            ("refused", counters.refused),
            ("strangers", counters.strangers),
            ("fetches", counters.fetches),
            ("restarts", counters.restarts),
            ("reaped", counters.reaped),
        ] {
            status.counters.insert(name.into(), value);
        }
        status.takeover_running |= self.upgrade.is_some();
        status.supervised = Some(Supervised {
            command: self.command.words(),
            pid: self.main.as_ref().map(|main| main.pid),
            state: self.state().into(),
            text: self.text.clone(),
            ended: self.ended.map(|ended| ended.to_string()),
            limit: self.store_max,
            kept_above: self.kept_above(),
            refused: self.refused.iter().cloned().collect(),
        });
        status
    }

    pub(super) fn state(&self) -> &'static str {
        match (&self.phase, &self.main) {
            (Phase::Clearing { .. }, _) => "waiting for processes of before to end",
            (Phase::Waiting { .. }, _) => "waiting to be started again",
            (Phase::Stopping { .. } | Phase::Sweeping { .. }, _) => "stopping",
            (Phase::Up, Some(main)) if main.stopping => "stopping",
            (Phase::Up, Some(main)) if main.reloading => "reloading",
            (Phase::Up, Some(main)) if main.ready.is_some() => "ready",
            (Phase::Up, Some(_)) if !self.known.says_ready => "running",
            (Phase::Up, _) => "starting",
        }
    }
}

fn kind(descriptor: impl std::os::fd::AsFd) -> String {
    Kind::of(descriptor).unwrap_or(Kind::Other).to_string()
}
