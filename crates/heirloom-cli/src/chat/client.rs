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
    Asked, Cbor, Codec, CodecError, ConnectionId, Entry, HandoverError, Incumbent, ItemId, Kind, Outcome,
    Turn,
};
use rustix::event::{PollFd, PollFlags};

use super::SERVER;
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
    signals: Signals,
    linger: Duration,
    mode: Mode,
    /// Which connection status was last told of.
    shown: Option<u64>,
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
        signals: Signals,
        linger: Duration,
    ) -> Self {
        Client { incumbent, pump, signals, linger, mode: Mode::Pumping, shown: None }
    }

    /// Serves until the client is replaced, stopped, or fails.
    pub(super) fn run(mut self) -> Result<Exit, Failure> {
        let result = self.serve();
        // Does nothing if somebody else serves by now.
        self.incumbent.retire();
        result
    }

    fn serve(&mut self) -> Result<Exit, Failure> {
        loop {
            self.show();
            let asked = self.wait()?;
            if asked.upgrade {
                self.upgrade();
            }
            let mut next = if asked.stop { self.stop() } else { Next::Go };
            if next == Next::Go {
                next = self.answer()?;
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
        let signals = [
            PollFd::from_borrowed_fd(self.signals.stop(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.upgrade(), PollFlags::IN),
        ];
        let reported: Vec<PollFlags> = match &self.mode {
            Mode::Lingering { .. } | Mode::Resting { .. } | Mode::Older(Older::Handed { .. }) => {
                let mut fds = signals.to_vec();
                blocking::wait(&self.incumbent, &mut fds, deadline)?;
                fds.iter().map(PollFd::revents).collect()
            }
            Mode::Pumping | Mode::Stopping { .. } | Mode::Older(Older::Flushing { .. }) => {
                let at = [deadline, self.incumbent.deadline()].into_iter().flatten().min();
                let [stop, upgrade] = signals;
                let extra = [stop, upgrade, PollFd::new(&self.incumbent, PollFlags::IN)];
                match self.pump.turn(&extra, at) {
                    Ok(turn) => turn.extra,
                    Err(error) => {
                        self.pump_failed(error)?;
                        Vec::new()
                    }
                }
            }
        };
        let asked = |index: usize| reported.get(index).is_some_and(|flags| !flags.is_empty());
        Ok(Signalled {
            stop: asked(0) && self.signals.take_stop(),
            upgrade: asked(1) && self.signals.take_upgrade(),
        })
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
            tracing::warn!("no upgrade: {refusal}");
        }
    }

    /// A signal has come: empties the buffers first; a second signal ends the client at once.
    fn stop(&mut self) -> Next {
        match self.mode {
            Mode::Pumping | Mode::Older(Older::Flushing { .. }) => {
                self.incumbent.withdraw(Instant::now(), "the incumbent was told to stop");
                self.pump.set_reading(false);
                self.mode = Mode::Stopping { until: Instant::now() + STOP_WITHIN };
                Next::Go
            }
            _ => self.abandon(),
        }
    }

    /// Ends, whatever has not been written and sent.
    fn abandon(&self) -> Next {
        if !self.pump.flushed() {
            let (unwritten, unsent) = (self.pump.unwritten(), self.pump.unsent());
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
                    match manifest(&self.pump) {
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
                    batch.send(|id| descriptor(&self.pump, id));
                    continue;
                }
                // A stop would be lost in an upgrade in place: the new program knows nothing of it.
                Turn::Freeze(freeze) if busy || self.signals.stop_waits() => {
                    freeze.resume(BUSY);
                    continue;
                }
                Turn::Freeze(freeze) => match manifest(&self.pump) {
                    Ok(now) => Notice::Thawed(freeze.release_all(now, |id| descriptor(&self.pump, id))),
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
                tracing::info!("replaced by {by}");
                return Ok(Next::End);
            }
            Notice::Thawed(Ok(Outcome::Resumed(reason))) => {
                tracing::warn!("serving on; the takeover ended {reason}");
            }
            Notice::Thawed(Ok(Outcome::Superseded(reason))) => {
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
                return Ok(Next::End);
            }
            Notice::Quit(_) => {
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

    /// Tells status which connection there is.
    fn show(&mut self) {
        let connection = self.pump.socket().map(|_| self.pump.connection_id());
        if self.shown != connection {
            self.shown = connection;
            let item = connection.map(|id| (ItemId(id), SERVER.to_string(), Kind::TcpStream));
            self.incumbent.set_items(item);
        }
    }
}

/// Lets a program of protocol 0 in, if there is nothing else going on.
fn older_asks(mut asked: Asked<'_, ChatRequest>, busy: bool) -> Option<Older> {
    let ChatRequest::RequestFds = asked.request()?;
    if busy {
        asked.refuse(BUSY);
        return None;
    }
    tracing::info!("a program of protocol 0 asks for the connection");
    asked.watch();
    Some(Older::Flushing { connection: asked.defer(), until: Instant::now() + FLUSH_WITHIN })
}

/// Everything as it is now. An item's id is the number of its connection: each has a new one.
fn manifest(pump: &Pump) -> Result<Base, CodecError> {
    let state = Cbor::encode(&pump.state())?;
    let item = pump.socket().map(|_| Entry {
        id: ItemId(pump.connection_id()),
        name: SERVER.into(),
        kind: Kind::TcpStream,
        state: Vec::new(),
    });
    Ok(Base {
        state: Some(state),
        items: item.into_iter().collect(),
        next_id: pump.connection_id() + 1,
        ..Base::default()
    })
}

fn descriptor(pump: &Pump, id: ItemId) -> Option<BorrowedFd<'_>> {
    pump.socket().filter(|_| ItemId(pump.connection_id()) == id)
}
