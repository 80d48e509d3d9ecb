//! The client as it serves: one loop over the pump, the control socket and the signals.
//!
//! It promises that nothing is touched between a freeze and its end, and that what was read is not dropped: a stdout
//! that fails keeps its bytes for the next try, or for a successor.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use heirloom::control::{Failure as Refusal, FailureCode, Reply};
use heirloom::manifest::Base;
use heirloom::runtime::blocking;
use heirloom::upgrade::Upgrade;
use heirloom::{
    Asked, Cbor, Codec, CodecError, ConnectionId, HandoverError, Incumbent, ItemId, Outcome, Turn,
};
use rustix::event::{PollFd, PollFlags};

use super::items::{Items, Travels};
use super::kept::Kept;
use super::older::{ChatRequest, FLUSH_WITHIN, Older};
use super::pump::{Pump, PumpError};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::signals::Signals;

/// How long buffers may take to empty when the client is told to stop.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How long a stdout that failed, for a full disk say, is left alone.
const STDOUT_RETRY: Duration = Duration::from_secs(1);

pub(super) struct Client {
    incumbent: Incumbent<ChatRequest>,
    pump: Pump,
    items: Items,
    kept: Option<Kept>,
    signals: Signals,
    linger: Duration,
    mode: Mode,
    /// A quit was asked for: nothing is left for a next process.
    for_good: bool,
}

/// What the loop does beside answering at the control socket.
enum Mode {
    Pumping,
    /// Nobody reads stdout: the connection is kept for a successor for a while.
    Lingering {
        until: Instant,
        unwritten: usize,
    },
    /// Stdout failed and is tried again.
    Resting {
        until: Instant,
    },
    /// A stop was asked for: buffers are emptied, nothing more is taken in.
    Stopping {
        until: Instant,
    },
    /// A program of protocol 0 takes the connection.
    Older(Older),
}

/// What signals ask for.
struct Signalled {
    stop: bool,
    upgrade: bool,
}

/// The loop goes on, or the program ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Go,
    End,
}

/// What came of a turn of the incumbent, once it is over.
enum Notice {
    Thawed(Result<Outcome, HandoverError>),
    Older(Option<Older>),
    Quit(ConnectionId),
    Closed(ConnectionId),
}

/// What a successor is told that comes at a bad moment.
const BUSY: &str = "the incumbent is ending, or being replaced already";

impl Client {
    pub(super) fn new(
        incumbent: Incumbent<ChatRequest>,
        pump: Pump,
        items: Items,
        kept: Option<Kept>,
        signals: Signals,
        linger: Duration,
    ) -> Self {
        Client { incumbent, pump, items, kept, signals, linger, mode: Mode::Pumping, for_good: false }
    }

    /// Serves until the client is replaced, stopped, or fails. `handed_over` says that the supervisor, if there is one, has
    /// known another process.
    pub(super) fn run(mut self, handed_over: bool) -> Result<Exit, Failure> {
        self.items.show(&mut self.incumbent);
        if let Some(kept) = &mut self.kept {
            kept.ready(handed_over);
        }
        let result = self.serve();
        if let Some(kept) = self.kept.take() {
            if self.for_good {
                kept.end(&self.items);
            } else {
                kept.leave(&self.pump, &self.items);
            }
        }
        // Does nothing if somebody else serves by now.
        self.incumbent.retire();
        result
    }

    fn serve(&mut self) -> Result<Exit, Failure> {
        self.keep();
        loop {
            let asked = self.wait()?;
            // What there is now is what a successor gets, a connection included that was made this moment.
            if self.pumps() {
                self.pump.look_at_attempt();
            }
            self.keep();
            if asked.upgrade {
                self.upgrade();
            }
            let mut next = if asked.stop { self.stop() } else { Next::Go };
            if next == Next::Go {
                next = self.answer()?;
            }
            if let Some(kept) = &mut self.kept
                && !matches!(self.mode, Mode::Stopping { .. })
            {
                kept.tell(&self.incumbent);
            }
            if next == Next::Go {
                next = self.go_on()?;
            }
            if next == Next::End {
                return Ok(Exit::Done);
            }
        }
    }

    /// Lets the pump work, or only waits; says what signals ask for.
    fn wait(&mut self) -> Result<Signalled, Failure> {
        let deadline = match &self.mode {
            Mode::Pumping | Mode::Older(Older::Handed { .. }) => None,
            Mode::Lingering { until, .. }
            | Mode::Resting { until }
            | Mode::Stopping { until }
            | Mode::Older(Older::Flushing { until, .. }) => Some(*until),
        };
        let watchdog = self.kept.as_ref().and_then(Kept::deadline);
        let deadline = [deadline, watchdog].into_iter().flatten().min();
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.stop(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.upgrade(), PollFlags::IN),
        ];
        let store = self.kept.as_ref().and_then(Kept::waits_for);
        fds.extend(store.map(|store| PollFd::from_borrowed_fd(store, PollFlags::OUT)));
        let reported: Vec<PollFlags> = if self.pumps() {
            let at = [deadline, self.incumbent.deadline()].into_iter().flatten().min();
            fds.push(PollFd::new(&self.incumbent, PollFlags::IN));
            match self.pump.turn(&fds, at) {
                Ok(turn) => turn.extra,
                Err(error) => {
                    self.pump_failed(error)?;
                    Vec::new()
                }
            }
        } else {
            blocking::wait(&self.incumbent, &mut fds, deadline)?;
            fds.iter().map(PollFd::revents).collect()
        };
        let asked = |index: usize| reported.get(index).is_some_and(|flags| !flags.is_empty());
        Ok(Signalled {
            stop: asked(0) && self.signals.take_stop(),
            upgrade: asked(1) && self.signals.take_upgrade(),
        })
    }

    /// Whether bytes are moved now: not while nobody takes them, and not before a store holds where they come from, go to
    /// and pass through.
    fn pumps(&self) -> bool {
        match &self.mode {
            Mode::Lingering { .. } | Mode::Resting { .. } | Mode::Older(Older::Handed { .. }) => false,
            Mode::Pumping | Mode::Stopping { .. } | Mode::Older(Older::Flushing { .. }) => {
                self.kept.as_ref().is_none_or(|kept| kept.holds_streams(&self.items))
            }
        }
    }

    fn pump_failed(&mut self, error: PumpError) -> Result<(), Failure> {
        let (unwritten, cause) = match error {
            PumpError::StdoutClosed { unwritten } => (unwritten, None),
            PumpError::Stdout { unwritten, source } => (unwritten, Some(source)),
            PumpError::GaveUp(error) => return Err(Failure::new(Exit::Failed, anyhow!("{error}"))),
            PumpError::Poll(error) => {
                return Err(Failure::new(Exit::Failed, anyhow!(error).context("cannot wait")));
            }
        };
        let now = Instant::now();
        if let Some(connection) = self.older() {
            self.refuse_older(connection, "the incumbent cannot write to its stdout");
        }
        self.mode = match cause {
            // Nobody may take over any more, so that there is nothing to wait for.
            _ if matches!(self.mode, Mode::Stopping { .. }) => Mode::Stopping { until: now },
            None => {
                tracing::error!(
                    unwritten,
                    "nobody reads stdout any more; a successor that is started within {:?} gets everything",
                    self.linger
                );
                Mode::Lingering { until: now + self.linger, unwritten }
            }
            Some(error) => {
                tracing::error!(unwritten, %error, "cannot write to stdout; nothing is lost, trying again");
                Mode::Resting { until: now + STDOUT_RETRY }
            }
        };
        Ok(())
    }

    /// SIGUSR2 has come: does what `heirloom upgrade` without options asks for.
    fn upgrade(&mut self) {
        if let Err(refusal) = self.incumbent.upgrade(Upgrade::default()) {
            let generation = self.incumbent.generation();
            tracing::warn!(generation, reason = refusal.message, "no upgrade");
        }
    }

    /// A stop was asked for: empties the buffers first; when it is asked for again, ends the client at once.
    fn stop(&mut self) -> Next {
        match self.mode {
            Mode::Pumping | Mode::Older(Older::Flushing { .. }) => {
                self.incumbent.withdraw(Instant::now(), "the incumbent was told to stop");
                self.pump.set_reading(false);
                if let Some(kept) = &mut self.kept {
                    kept.stopping();
                }
                self.mode = Mode::Stopping { until: Instant::now() + STOP_WITHIN };
                Next::Go
            }
            _ => self.abandon(),
        }
    }

    /// Ends, whatever has not been written and sent.
    fn abandon(&self) -> Next {
        if self.pump.flushed() {
            return Next::End;
        }
        let (unwritten, unsent) = (self.pump.unwritten(), self.pump.unsent());
        if !self.for_good && self.kept.as_ref().is_some_and(Kept::is_left) {
            tracing::info!(unwritten, unsent, "stopping; what nobody took is left in the store");
        } else {
            tracing::warn!(unwritten, unsent, "stopping with bytes that nobody took");
        }
        Next::End
    }

    /// Answers at the control socket until there is nothing more to answer.
    fn answer(&mut self) -> Result<Next, Failure> {
        self.incumbent.set_counter("bytes_in", self.pump.bytes_in());
        self.incumbent.set_counter("bytes_out", self.pump.bytes_out());
        loop {
            let busy = matches!(self.mode, Mode::Older(_) | Mode::Stopping { .. });
            let notice = match self.incumbent.turn(Instant::now())? {
                Turn::Idle => return Ok(Next::Go),
                Turn::Offer(offer) if busy => {
                    offer.refuse(BUSY);
                    continue;
                }
                Turn::Offer(offer) => {
                    match manifest(&self.pump, &self.items, self.kept.as_ref(), false) {
                        Ok(base) => {
                            if let Err(error) = offer.begin(base) {
                                tracing::error!("serving on: {error}");
                            }
                        }
                        Err(error) => offer.refuse(&error.to_string()),
                    }
                    continue;
                }
                Turn::Batch(batch) => {
                    batch.send(|id| descriptor(&self.pump, &self.items, self.kept.as_ref(), id));
                    continue;
                }
                // A stop would be lost in an upgrade in place: the new program knows nothing of it.
                Turn::Freeze(freeze) if busy || self.signals.stop_waits() => {
                    freeze.resume(BUSY);
                    continue;
                }
                // A successor could not tell what is in the store from what is about to be.
                Turn::Freeze(freeze) if self.kept.as_ref().is_some_and(|kept| kept.waits_for().is_some()) => {
                    freeze.resume("the incumbent's store has not taken everything yet");
                    continue;
                }
                Turn::Freeze(freeze) => match manifest(&self.pump, &self.items, self.kept.as_ref(), true) {
                    Ok(now) => {
                        let lend = |id| descriptor(&self.pump, &self.items, self.kept.as_ref(), id);
                        Notice::Thawed(freeze.release_all(now, lend))
                    }
                    Err(error) => {
                        freeze.resume(&error.to_string());
                        continue;
                    }
                },
                Turn::Request(asked) => Notice::Older(older_asks(asked, busy)),
                Turn::Quit(connection) => Notice::Quit(connection),
                Turn::Closed(connection) => Notice::Closed(connection),
                Turn::Delegated(_) => continue,
            };
            match self.hear(notice)? {
                Next::Go => {}
                end => return Ok(end),
            }
        }
    }

    fn hear(&mut self, notice: Notice) -> Result<Next, Failure> {
        match notice {
            Notice::Thawed(Ok(Outcome::Taken(by))) => {
                let generation = self.incumbent.generation();
                tracing::info!(peer_pid = by.pid, generation, items = by.items, "replaced by {by}");
                if let Some(kept) = self.kept.take() {
                    kept.hand_over(&by);
                }
                return Ok(Next::End);
            }
            Notice::Thawed(Ok(Outcome::Resumed(reason))) => {
                let generation = self.incumbent.generation();
                tracing::warn!(generation, step = %reason.step, reason = %reason.cause, "serving on");
            }
            Notice::Thawed(Ok(Outcome::Superseded(reason))) => {
                self.kept = None;
                let what = "another process holds the service lock, so that this one may not serve; the takeover ended";
                return Err(Failure::new(Exit::Failed, anyhow!("{what} {reason}")));
            }
            Notice::Thawed(Err(error)) => tracing::error!("serving on: {error}"),
            Notice::Older(None) => {}
            Notice::Older(Some(older)) => {
                self.pump.set_reading(false);
                self.mode = Mode::Older(older);
            }
            Notice::Quit(connection) if self.older() == Some(connection) => {
                tracing::info!("replaced by a program of protocol 0");
                if let Some(kept) = self.kept.take() {
                    kept.end(&self.items);
                }
                return Ok(Next::End);
            }
            Notice::Quit(_) => {
                self.for_good = true;
                return Ok(self.stop());
            }
            Notice::Closed(connection) => self.older_left(connection),
        }
        Ok(Next::Go)
    }

    /// The connection of a program of protocol 0 that is taking over.
    fn older(&self) -> Option<ConnectionId> {
        match &self.mode {
            Mode::Older(older) => Some(older.connection()),
            _ => None,
        }
    }

    /// What is due in this mode after a turn.
    fn go_on(&mut self) -> Result<Next, Failure> {
        let now = Instant::now();
        match &self.mode {
            Mode::Pumping | Mode::Older(Older::Handed { .. }) => {}
            Mode::Lingering { until, unwritten } => {
                if now >= *until {
                    let lost = *unwritten;
                    let error = anyhow!(
                        "stdout was closed, and no successor came: {lost} bytes were not written; start the next one sooner, or give this one a longer --linger"
                    );
                    return Err(Failure::new(Exit::Failed, error));
                }
            }
            Mode::Resting { until } => {
                if now >= *until {
                    self.mode = Mode::Pumping;
                }
            }
            Mode::Stopping { until } => {
                if self.pump.flushed() {
                    return Ok(Next::End);
                }
                if now >= *until {
                    return Ok(self.abandon());
                }
            }
            Mode::Older(Older::Flushing { connection, until }) => {
                let (connection, late) = (*connection, now >= *until);
                if self.pump.flushed() {
                    self.hand_to_older(connection);
                } else if late {
                    self.refuse_older(connection, "the incumbent's buffers do not empty");
                }
            }
        }
        Ok(Next::Go)
    }

    fn hand_to_older(&mut self, connection: ConnectionId) {
        match self.pump.socket().map(|socket| socket.try_clone_to_owned()).transpose() {
            Ok(descriptor) => {
                self.incumbent.answer_later(connection, b"hi".to_vec(), descriptor.into_iter().collect());
                self.mode = Mode::Older(Older::Handed { connection });
            }
            Err(error) => {
                let why = format!("the incumbent cannot duplicate the connection's descriptor: {error}");
                self.refuse_older(connection, &why);
            }
        }
    }

    /// Tells a program of protocol 0 that it does not get the connection now, and serves on.
    fn refuse_older(&mut self, connection: ConnectionId, why: &str) {
        tracing::warn!("a program of protocol 0 is refused: {why}; serving on");
        let failure = Refusal::new(FailureCode::Busy, why);
        self.incumbent.answer_later(connection, Reply::Error(failure).to_line(), Vec::new());
        self.pump_again();
    }

    /// A program of protocol 0 has gone without a commit, if it was that connection's.
    fn older_left(&mut self, connection: ConnectionId) {
        if self.older() == Some(connection) {
            tracing::warn!("the program of protocol 0 left without taking over; serving on");
            self.pump_again();
        }
    }

    fn pump_again(&mut self) {
        self.pump.set_reading(true);
        self.mode = Mode::Pumping;
    }

    /// Keeps what the pump has, and tells status and the supervisor of it.
    fn keep(&mut self) {
        let (new, ended) = self.items.update(&self.pump);
        let changed = !new.is_empty() || !ended.is_empty();
        if changed {
            self.items.show(&mut self.incumbent);
        }
        let Some(kept) = &mut self.kept else { return };
        kept.update(&mut self.pump, &self.items, &new, ended);
        kept.show_life(Instant::now());
        if changed {
            kept.status(if self.pump.socket().is_some() { "connected" } else { "connecting" });
        }
    }
}

/// Lets a program of protocol 0 in, if there is nothing else going on.
fn older_asks(mut asked: Asked<'_, ChatRequest>, busy: bool) -> Option<Older> {
    let ChatRequest::RequestFds = asked.request()?;
    let why =
        if busy { Some(BUSY.to_owned()) } else { asked.check_unit().err().map(|failure| failure.message) };
    if let Some(why) = why {
        tracing::warn!(reason = why, "a program of protocol 0 is refused");
        asked.refuse(&why);
        return None;
    }
    tracing::info!("a program of protocol 0 asks for the connection");
    asked.watch();
    Some(Older::Flushing { connection: asked.defer(), until: Instant::now() + FLUSH_WITHIN })
}

/// Everything as it is now, and `frozen` as well what travels in the freeze alone.
fn manifest(pump: &Pump, items: &Items, kept: Option<&Kept>, frozen: bool) -> Result<Base, CodecError> {
    let mut state = pump.state();
    state.streams = items.that_travel(Travels::Never).collect();
    let mut entries = items.entries(frozen);
    entries.extend(kept.map(|kept| kept.ledger().0));
    entries.sort_by_key(|entry| entry.id);
    Ok(Base {
        state: Some(Cbor::encode(&state)?),
        items: entries,
        next_id: items.next_id(),
        ..Base::default()
    })
}

/// Lends what a successor is to get.
fn descriptor<'c>(
    pump: &'c Pump,
    items: &Items,
    kept: Option<&'c Kept>,
    id: ItemId,
) -> Option<BorrowedFd<'c>> {
    let ledger = kept.map(Kept::ledger).filter(|(entry, _)| entry.id == id);
    ledger.map(|(_, descriptor)| descriptor).or_else(|| items.descriptor(pump, id))
}
