//! An upgrade as it runs at the incumbent: a preflight of the new program, if there is one, and then a takeover by it or an execve.
//!
//! One of them at a time, and no takeover beside it but the one by the program that it has started. Until the execve or
//! the takeover's own commit a failure leaves everything as it was, and whoever asked hears the reason.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use heirloom_sys::SignalMask;
use rustix::event::epoll;
use rustix::process::geteuid;

use super::Incumbent;
use super::connection::ConnectionId;
use super::turn::{HandoverError, Outcome};
use crate::clock;
use crate::config::Preflights;
use crate::control::request::{Failure, FailureCode, Reply};
use crate::control::status::LastTakeover;
use crate::courtesy;
use crate::crash::{self, Point};
use crate::item::ItemId;
use crate::manifest::{Base, Delta, Listing, seal};
use crate::peer::Peer;
use crate::protocol::{Cause, Reason, Step};
use crate::transport::exec;
use crate::transport::socket::takeover::Offered;
use crate::upgrade::{Check, Checked, Finding, Launch, StartedSuccessor, Upgrade, path_section};

pub(super) const CHECK: u64 = 3;
pub(super) const STARTED: u64 = 4;

/// An upgrade that is going on.
pub(super) struct Running {
    launch: Launch,
    dry_run: bool,
    /// Who waits for the outcome.
    client: Option<ConnectionId>,
    began_at_ns: u64,
    phase: Phase,
}

impl Running {
    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run
    }
}

enum Phase {
    /// The application is to write down what there is.
    Offer,
    /// The new program looks at it.
    Check { check: Check, offered: Offered, bytes: u64 },
    /// In place: the application is to stop.
    Freeze { offered: Offered },
    /// In place: it has stopped, and signals wait.
    Frozen { offered: Offered, signal_mask: SignalMask, frozen_at_ns: u64 },
    /// Beside, without a preflight: the successor is to be started.
    Start,
    /// The successor was started. Until it has asked to take over there is a deadline.
    Successor { successor: StartedSuccessor, asks_until: Option<Instant> },
}

impl<A> Incumbent<A> {
    /// Begins an upgrade, as a request at the control socket does: for a signal, or a schedule. What becomes of it is
    /// seen in turns like those of any takeover, in the log, and in [`Incumbent::last_takeover`].
    ///
    /// # Errors
    ///
    /// A takeover or an upgrade is going on already, or another generation is meant.
    pub fn upgrade(&mut self, request: Upgrade) -> Result<(), Failure> {
        self.begin_upgrade(&request, None)
    }

    /// Sets what an upgrade starts; otherwise [`Launch::current`] as of the start.
    pub fn set_launch(&mut self, launch: Launch) {
        self.launch = launch;
    }

    pub(super) fn upgrade_asked(&mut self, id: ConnectionId, request: &Upgrade) {
        match self.begin_upgrade(request, Some(id)) {
            Ok(()) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.waiting = true;
                }
            }
            Err(failure) => {
                tracing::warn!(
                    generation = self.record.generation,
                    reason = failure.message,
                    "upgrade refused"
                );
                self.reply(id, Reply::Error(failure).to_line());
            }
        }
    }

    fn begin_upgrade(&mut self, request: &Upgrade, client: Option<ConnectionId>) -> Result<(), Failure> {
        if let Some(running) = &self.takeover {
            let message =
                format!("a takeover by {} is going on; try again when it has ended", running.successor);
            return Err(Failure { code: FailureCode::Busy, message });
        }
        if self.upgrade.is_some() {
            let message = "another upgrade is going on; try again when it has ended".into();
            return Err(Failure { code: FailureCode::Busy, message });
        }
        if let Some(meant) = request.generation.filter(|meant| *meant != self.record.generation) {
            let message = format!(
                "generation {} serves by now, and generation {meant} was to be upgraded; look at its status and ask again",
                self.record.generation
            );
            return Err(Failure { code: FailureCode::Busy, message });
        }
        let asker = client.and_then(|id| self.connections.get(&id)).map(|connection| connection.peer.uid);
        let trusted = asker.is_none_or(|uid| uid == 0 || uid == geteuid().as_raw());
        if !trusted && (request.program.is_some() || request.arguments.is_some()) {
            let message =
                "only the incumbent's own user and root may say what program it becomes; leave program and arguments out".into();
            return Err(Failure { code: FailureCode::Permission, message });
        }
        let launch = self.launch.for_request(request);
        tracing::info!(
            program = %launch.program.display(),
            generation = self.record.generation,
            in_place = launch.in_place,
            dry_run = request.dry_run,
            "upgrade begins"
        );
        let is_checked_first =
            request.dry_run || launch.in_place || self.config.preflights == Preflights::All;
        self.upgrade = Some(Box::new(Running {
            launch,
            dry_run: request.dry_run,
            client,
            began_at_ns: clock::monotonic_ns(),
            phase: if is_checked_first { Phase::Offer } else { Phase::Start },
        }));
        Ok(())
    }

    /// Whether the application is to write down what there is, for a preflight.
    pub(super) fn upgrade_wants_offer(&self) -> bool {
        matches!(self.upgrade.as_deref(), Some(Running { phase: Phase::Offer, .. }))
    }

    /// Whether the application is to stop, for an execve. From a true answer on signals wait.
    pub(super) fn upgrade_freezes(&mut self) -> bool {
        let Some(running) = &mut self.upgrade else { return false };
        if !matches!(running.phase, Phase::Freeze { .. }) {
            return false;
        }
        let frozen_at_ns = clock::monotonic_ns();
        let signal_mask = match SignalMask::block_all() {
            Ok(mask) => mask,
            Err(error) => {
                self.fail_upgrade(&format!("cannot block signals: {error}"));
                return false;
            }
        };
        if let Phase::Freeze { offered } = std::mem::replace(&mut running.phase, Phase::Offer) {
            running.phase = Phase::Frozen { offered, signal_mask, frozen_at_ns };
        }
        true
    }

    /// What was offered to the program whose place is taken, while everything is frozen for it.
    pub(super) fn frozen_in_place(&self) -> Option<&Offered> {
        match &self.upgrade.as_deref()?.phase {
            Phase::Frozen { offered, .. } => Some(offered),
            _ => None,
        }
    }

    /// Starts the preflight with what the application has written down.
    pub(super) fn check(&mut self, mut base: Base) -> Result<(), HandoverError> {
        let limits = &self.config.limits;
        base.sections.push(path_section(self.path()));
        let encoded = base.encode(limits).map_err(HandoverError::from);
        let sealed = encoded.and_then(|encoded| {
            courtesy::next_step();
            let (memfd, bytes) = (seal("preflight", &encoded.bytes)?, encoded.bytes.len() as u64);
            courtesy::next_step();
            Ok((Offered { listing: Listing::read(encoded.bytes, limits)?, memfd }, bytes))
        });
        let (offered, bytes) = match sealed {
            Ok(sealed) => sealed,
            Err(error) => {
                self.fail_upgrade(&format!("the incumbent cannot write its manifest: {error}"));
                return Err(error);
            }
        };
        let Some(running) = &mut self.upgrade else { return Ok(()) };
        let started = offered.memfd.try_clone().and_then(|stdin| {
            let check = Check::start(&running.launch, stdin, offered.listing.crc(), self.config.times.start)?;
            for descriptor in check.descriptors() {
                epoll::add(&self.epoll, descriptor, epoll::EventData::new_u64(CHECK), epoll::EventFlags::IN)?;
            }
            Ok(check)
        });
        match started {
            Ok(check) => {
                crash::reach(Point::PreflightStarted);
                running.phase = Phase::Check { check, offered, bytes };
            }
            Err(error) => {
                let program = running.launch.program.display();
                let why = format!("cannot start {program}: {error}; mend that, or name another program");
                self.fail_upgrade(&why);
            }
        }
        Ok(())
    }

    /// Starts the successor, if it is to be started without a preflight.
    pub(super) fn start_unchecked(&mut self, now: Instant) {
        if let Some(running) = self.upgrade.take_if(|running| matches!(running.phase, Phase::Start)) {
            self.start_successor(running, now);
        }
    }

    /// Something has happened to the child, or its time is up.
    pub(super) fn run_upgrade(&mut self, now: Instant) {
        let takes_over = self.takeover.is_some();
        let Some(running) = &mut self.upgrade else { return };
        match &mut running.phase {
            Phase::Check { check, .. } => match check.poll(now) {
                None => {}
                Some(Finding::Ready { program, version }) => self.checked(program, version, now),
                Some(Finding::Failed(why)) => self.fail_upgrade(&why),
            },
            // While it takes over, its end is the takeover's business.
            Phase::Successor { successor, asks_until } if !takes_over => {
                if let Some(status) = successor.ended() {
                    self.fail_upgrade(&format!(
                        "the successor ended ({status}) before it took over; what it said is where the incumbent's own stderr goes"
                    ));
                } else if asks_until.is_some_and(|until| now >= until) {
                    let limit = self.config.times.start;
                    self.fail_upgrade(&format!("the successor did not ask to take over within {limit:?}"));
                }
            }
            _ => {}
        }
    }

    pub(super) fn upgrade_deadline(&self) -> Option<Instant> {
        match &self.upgrade.as_deref()?.phase {
            Phase::Offer | Phase::Start | Phase::Freeze { .. } => Some(Instant::now()),
            Phase::Check { check, .. } => Some(check.deadline()),
            Phase::Successor { asks_until, .. } => *asks_until,
            Phase::Frozen { .. } => None,
        }
    }

    fn checked(&mut self, program: String, version: String, now: Instant) {
        let Some(mut running) = self.upgrade.take() else { return };
        let Phase::Check { offered, bytes, .. } = std::mem::replace(&mut running.phase, Phase::Offer) else {
            return;
        };
        if running.dry_run {
            tracing::info!(program, version, "the dry run found that it could take over");
            let items = offered.listing.len() as u64;
            let checked = Checked { program, version, in_place: running.launch.in_place, items, bytes };
            self.answer_upgrade(&running, &Reply::Checked(checked));
        } else if running.launch.in_place {
            running.phase = Phase::Freeze { offered };
            self.upgrade = Some(running);
        } else {
            self.start_successor(running, now);
        }
    }

    fn start_successor(&mut self, mut running: Box<Running>, now: Instant) {
        let started = StartedSuccessor::start(&running.launch).and_then(|successor| {
            let token = epoll::EventData::new_u64(STARTED);
            epoll::add(&self.epoll, successor.pidfd(), token, epoll::EventFlags::IN)?;
            Ok(successor)
        });
        match started {
            Ok(successor) => {
                let asks_until = Some(now + self.config.times.start);
                running.phase = Phase::Successor { successor, asks_until };
                self.upgrade = Some(running);
            }
            Err(error) => {
                let program = running.launch.program.display();
                let why = format!("cannot start {program}: {error}; mend that, or name another program");
                self.upgrade = Some(running);
                self.fail_upgrade(&why);
            }
        }
    }

    /// Whether this process may take over in view of an upgrade that is going on.
    pub(super) fn admit_in_upgrade(&mut self, peer: &Peer, now: Instant) -> Result<(), Failure> {
        let Some(mut running) = self.upgrade.take() else { return Ok(()) };
        match &mut running.phase {
            Phase::Successor { successor, asks_until } if successor.pid() == peer.pid => {
                *asks_until = None;
                self.upgrade = Some(running);
                Ok(())
            }
            Phase::Check { check, .. } if Some(check.pid()) == peer.pid => {
                // It is of a time before preflights, and took itself for a successor.
                if running.dry_run || running.launch.in_place {
                    self.upgrade = Some(running);
                    self.fail_upgrade(
                        "the new program knows nothing of preflights, and asked to take over at once; start it by hand",
                    );
                } else {
                    self.start_successor(running, now);
                }
                let message = "this was a preflight, in which nothing is handed over".into();
                Err(Failure { code: FailureCode::Failed, message })
            }
            _ => {
                self.upgrade = Some(running);
                let message = "an upgrade is going on; try again when it has ended".into();
                Err(Failure { code: FailureCode::Busy, message })
            }
        }
    }

    /// Whoever asked to take over on this connection may not. If it is the successor that an upgrade has started, that ends
    /// the upgrade, with a better reason than the successor's end would be.
    pub(super) fn successor_refused(&mut self, id: ConnectionId, why: &str) {
        let pid = self.connections.get(&id).and_then(|connection| connection.peer.pid);
        if let Some(Running { phase: Phase::Successor { successor, .. }, .. }) = self.upgrade.as_deref()
            && pid.is_some()
            && successor.pid() == pid
        {
            self.fail_upgrade(why);
        }
    }

    /// The takeover by the program that an upgrade has started is over.
    pub(super) fn upgrade_taken(&mut self) {
        if let Some(Running { phase: Phase::Successor { successor, .. }, .. }) =
            self.upgrade.take().map(|running| *running)
        {
            successor.let_go();
        }
    }

    /// The new program cannot take over, if there is one: everything is as before, and whoever asked hears why.
    pub(super) fn fail_upgrade(&mut self, why: &str) {
        self.end_upgrade(why, FailureCode::RolledBack, "cannot take over, and the incumbent serves on");
    }

    /// The incumbent itself ends an upgrade, if there is one; it may not serve on either.
    pub(super) fn withdraw_upgrade(&mut self, why: &str) {
        self.end_upgrade(why, FailureCode::Failed, "is not wanted any more");
    }

    fn end_upgrade(&mut self, why: &str, code: FailureCode, what: &str) {
        let Some(mut running) = self.upgrade.take() else { return };
        tracing::warn!(
            program = %running.launch.program.display(),
            generation = self.record.generation,
            reason = why,
            "upgrade failed"
        );
        let frozen_at_ns = match &running.phase {
            Phase::Frozen { signal_mask, frozen_at_ns, .. } => {
                if let Err(error) = signal_mask.set() {
                    tracing::error!(%error, "cannot restore the signal mask");
                }
                Some(*frozen_at_ns)
            }
            _ => None,
        };
        // A takeover by a successor has been recorded already, if it began.
        let took_over = matches!(&running.phase, Phase::Successor { asks_until: None, .. });
        if !running.dry_run && !took_over {
            let now_ns = clock::monotonic_ns();
            self.last_takeover = Some(LastTakeover {
                outcome: if frozen_at_ns.is_some() { "resumed" } else { "refused" }.into(),
                reason: Some(why.into()),
                pause_us: frozen_at_ns.map(|frozen| (now_ns - frozen) / 1000),
                total_us: (now_ns - running.began_at_ns) / 1000,
                at_unix_ms: clock::unix_ms(),
                ..LastTakeover::default()
            });
        }
        // Whoever hears of the failure finds nothing left of the child.
        running.phase = Phase::Offer;
        let program = running.launch.program.display();
        let message = format!("{program} {what}: {why}");
        self.answer_upgrade(&running, &Reply::Error(Failure { code, message }));
    }

    fn answer_upgrade(&mut self, running: &Running, reply: &Reply) {
        if let Some(id) = running.client {
            self.answer_later(id, reply.to_line(), Vec::new());
        }
    }

    /// Everything is frozen: becomes the new program. That this returns means that it did not.
    pub(super) fn become_new_program<'d>(
        &mut self,
        delta: Delta,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        let Some(running) = self.upgrade.as_deref_mut() else {
            return Err(std::io::Error::other("there is no upgrade to freeze for").into());
        };
        let Phase::Frozen { offered, signal_mask, frozen_at_ns } = &mut running.phase else {
            return Err(std::io::Error::other("the upgrade is not frozen").into());
        };
        crash::reach(Point::FrozenInPlace);
        let listing = std::mem::take(&mut offered.listing);
        let (signal_mask, frozen_at_ns, began_at_ns) = (*signal_mask, *frozen_at_ns, running.began_at_ns);
        let launch = running.launch.clone();
        let delta = self.complete(delta, &listing, frozen_at_ns);
        let crc = listing.crc();
        let base = listing.into_base().and_then(|mut base| {
            // The section for the preflight alone.
            base.sections.pop();
            base.apply(delta, crc)
        });
        let base = match base {
            Ok(base) => base,
            Err(error) => {
                self.fail_upgrade(&format!("the incumbent cannot write its manifest: {error}"));
                return Err(error.into());
            }
        };
        let Some(lock) = self.lock.held() else {
            self.fail_upgrade("the incumbent does not hold its service lock");
            return Err(std::io::Error::other("the service lock is not held").into());
        };
        let beside = exec::Beside { lock, signal_mask, frozen_at_ns, began_at_ns };
        let listener = self.listener.as_fd();
        let why = exec::replace(&launch, base, &beside, &self.config.limits, &mut |id| {
            if id == ItemId::CONTROL { Some(listener) } else { descriptor(id) }
        });
        self.fail_upgrade(&why);
        Ok(Outcome::Resumed(Reason { step: Step::Exec, cause: Cause::Local(why) }))
    }
}
