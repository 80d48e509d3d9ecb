//! The successor's side of a takeover.
//!
//! It promises that the successor touches nothing before it has committed, and that it never serves once the
//! incumbent may have resumed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Cause, Reason, Step, Times, ToIncumbent, ToSuccessor};

/// The successor's state machine, for one takeover whose Hello was accepted.
///
/// ```
/// use heirloom::protocol::*;
/// use std::time::Instant;
///
/// let now = Instant::now();
/// let mut machine = Successor::new(now, Times::default());
/// machine.handle(now, ToSuccessor::Offer);
/// machine.handle(now, ToSuccessor::Offered);
/// assert_eq!(machine.poll(), Some(SuccessorAction::Prepare));
/// machine.ready(now);
/// assert_eq!(machine.poll(), Some(SuccessorAction::Send(ToIncumbent::Ready)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Successor {
    state: State,
    times: Times,
    deadline: Option<Instant>,
    give_up: Option<Instant>,
    actions: VecDeque<SuccessorAction>,
    incumbent_exited: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// The base manifest is awaited.
    Asking,
    /// Descriptors arrive.
    Receiving,
    /// The application prepares itself on the offer.
    Preparing,
    /// `Ready` is sent; late descriptors and `Freeze` are awaited.
    Ready,
    /// The application decodes everything.
    Deciding,
    /// `Accept` is sent; `Released` is awaited.
    Accepted,
    /// The channel is closed without an `Abort`; the incumbent's exit, or its `Abort`, is awaited.
    Orphaned,
    /// The lock is awaited; `commit`: then `Taken` is sent. Without, the incumbent is known to have exited.
    Locking {
        commit: bool,
    },
    /// The lock is held; `Taken` is being sent.
    Committing,
    Ended(SuccessorOutcome),
}

/// What the driver of a successor has to do next.
///
/// ```
/// use heirloom::protocol::*;
/// use std::time::Instant;
///
/// let mut machine = Successor::new(Instant::now(), Times::default());
/// machine.abort("changed my mind");
/// assert!(matches!(machine.poll(), Some(SuccessorAction::Send(ToIncumbent::Abort { .. }))));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SuccessorAction {
    /// Send this message. If the channel is closed call [`Successor::handle_closed`], after all that is still queued
    /// was handled.
    Send(ToIncumbent),
    /// Every early item has arrived: prepare (register with a poller, decode the base state), then call
    /// [`Successor::ready`] or [`Successor::abort`].
    Prepare,
    /// The delta has arrived: decode everything, then call [`Successor::accept`] or [`Successor::abort`].
    Decide,
    /// Try to take the service lock, then call [`Successor::locked`] or [`Successor::lock_held`].
    Lock,
    /// Send [`ToIncumbent::Taken`], then call [`Successor::committed`] or, if the channel refused it,
    /// [`Successor::refused`].
    Commit,
    /// Unlock the service lock.
    Unlock,
    /// The takeover has ended.
    End(SuccessorOutcome),
}

/// How a takeover ended for the successor.
///
/// ```
/// use heirloom::protocol::*;
/// use std::time::Instant;
///
/// let now = Instant::now();
/// let mut machine = Successor::new(now, Times::default());
/// machine.handle_exited(now);
/// let Some(SuccessorOutcome::Failed(reason)) = machine.outcome() else { panic!() };
/// assert_eq!(reason.cause, Cause::Exited);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SuccessorOutcome {
    /// Serve.
    Serve,
    /// Close everything that was received; the incumbent, if it lives, serves on.
    Failed(Reason),
}

impl Successor {
    /// Starts the takeover.
    pub fn new(now: Instant, times: Times) -> Self {
        Successor {
            state: State::Asking,
            times,
            deadline: Some(now + times.offer),
            give_up: None,
            actions: VecDeque::new(),
            incumbent_exited: false,
        }
    }

    /// The next thing to do; `None` until something happens.
    pub fn poll(&mut self) -> Option<SuccessorAction> {
        self.actions.pop_front()
    }

    /// When [`Successor::handle_timeout`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// A message has arrived.
    pub fn handle(&mut self, now: Instant, message: ToSuccessor) {
        match (&self.state, message) {
            (State::Ended(_), _) => {}
            (_, ToSuccessor::Abort { reason }) => self.fail(Cause::Withdrawn(reason), false),
            (State::Asking, ToSuccessor::Offer) => self.enter(State::Receiving, now, self.times.offer),
            (State::Receiving, ToSuccessor::Batch { .. }) => {
                self.actions.push_back(SuccessorAction::Send(ToIncumbent::Credit));
                self.deadline = Some(now + self.times.offer);
            }
            (State::Ready, ToSuccessor::Batch { .. }) => {
                self.actions.push_back(SuccessorAction::Send(ToIncumbent::Credit));
            }
            (State::Receiving, ToSuccessor::Offered) => {
                self.state = State::Preparing;
                self.deadline = None;
                self.actions.push_back(SuccessorAction::Prepare);
            }
            (State::Ready, ToSuccessor::Freeze) => {
                self.state = State::Deciding;
                self.deadline = None;
                self.actions.push_back(SuccessorAction::Decide);
            }
            (State::Accepted, ToSuccessor::Released) => {
                self.state = State::Locking { commit: true };
                self.deadline = None;
                self.actions.push_back(SuccessorAction::Lock);
            }
            // The channel was found closed while sending, with messages from before still to be read.
            (State::Orphaned, ToSuccessor::Released) => {}
            (state, message) => {
                let what = format!("{message:?} in state {}", state.name());
                self.fail(Cause::Nonsense(what), true);
            }
        }
    }

    /// A packet has arrived that is no message.
    pub fn handle_nonsense(&mut self, what: impl ToString) {
        if !self.has_ended() {
            self.fail(Cause::Nonsense(what.to_string()), true);
        }
    }

    /// The channel is closed, and everything that had been sent was handled. That alone releases nothing.
    pub fn handle_closed(&mut self, now: Instant) {
        match self.state {
            State::Accepted => self.orphan(now),
            // What was asked of the application comes first; its answer will find the channel closed.
            State::Deciding => {}
            State::Orphaned | State::Locking { .. } | State::Committing | State::Ended(_) => {}
            State::Asking | State::Receiving | State::Preparing | State::Ready => {
                self.fail(Cause::Closed, false)
            }
        }
    }

    /// The incumbent's process has exited, and everything that it had sent was handled.
    pub fn handle_exited(&mut self, now: Instant) {
        self.incumbent_exited = true;
        match self.state {
            State::Accepted | State::Orphaned => self.inherit(now),
            State::Deciding | State::Locking { .. } | State::Committing | State::Ended(_) => {}
            State::Asking | State::Receiving | State::Preparing | State::Ready => {
                self.fail(Cause::Exited, false)
            }
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.state {
            State::Asking | State::Receiving => self.fail(Cause::Timeout(self.times.offer), true),
            State::Ready => self.fail(Cause::Timeout(self.times.ready), true),
            State::Accepted | State::Orphaned => self.fail(Cause::Timeout(self.times.released), true),
            State::Locking { .. } => self.actions.push_back(SuccessorAction::Lock),
            State::Preparing | State::Deciding | State::Committing | State::Ended(_) => {}
        }
    }

    /// After [`SuccessorAction::Prepare`]: the application could serve at once.
    pub fn ready(&mut self, now: Instant) {
        if self.state == State::Preparing {
            self.actions.push_back(SuccessorAction::Send(ToIncumbent::Ready));
            self.enter(State::Ready, now, self.times.ready);
        }
    }

    /// After [`SuccessorAction::Decide`]: everything is decoded and held.
    pub fn accept(&mut self, now: Instant) {
        if self.state == State::Deciding {
            self.give_up = Some(now + self.times.released);
            self.enter(State::Accepted, now, self.times.released);
            if self.incumbent_exited {
                self.inherit(now);
            } else {
                self.actions.push_back(SuccessorAction::Send(ToIncumbent::Accept));
            }
        }
    }

    /// After [`SuccessorAction::Lock`]: we hold it.
    pub fn locked(&mut self) {
        match self.state {
            State::Locking { commit: true } => {
                self.state = State::Committing;
                self.actions.push_back(SuccessorAction::Commit);
            }
            State::Locking { commit: false } => self.end(SuccessorOutcome::Serve),
            _ => {}
        }
    }

    /// After [`SuccessorAction::Lock`]: somebody else holds it.
    pub fn lock_held(&mut self, now: Instant) {
        if matches!(self.state, State::Locking { .. }) {
            if self.give_up.is_none_or(|give_up| now >= give_up) {
                self.fail(Cause::LockHeld, true);
            } else {
                self.deadline = Some(now + self.times.retry);
            }
        }
    }

    /// After [`SuccessorAction::Commit`]: `Taken` is in the incumbent's queue. This is the commit point.
    pub fn committed(&mut self) {
        if self.state == State::Committing {
            self.end(SuccessorOutcome::Serve);
        }
    }

    /// After [`SuccessorAction::Commit`]: the channel refused `Taken`. The incumbent has either resumed, and said so
    /// in an `Abort` that is still to be read, or it is dead.
    pub fn refused(&mut self, now: Instant) {
        if self.state == State::Committing {
            self.actions.push_back(SuccessorAction::Unlock);
            if self.incumbent_exited { self.inherit(now) } else { self.orphan(now) }
        }
    }

    /// Our own side cannot go on, or does not want to.
    pub fn abort(&mut self, why: impl ToString) {
        if !self.has_ended() {
            self.fail(Cause::Local(why.to_string()), true);
        }
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&SuccessorOutcome> {
        match &self.state {
            State::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// The state's name in `docs/protocol.md`.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    fn orphan(&mut self, now: Instant) {
        self.enter(State::Orphaned, now, self.times.released);
    }

    fn inherit(&mut self, now: Instant) {
        self.give_up = Some(now + self.times.released);
        self.state = State::Locking { commit: false };
        self.deadline = None;
        self.actions.push_back(SuccessorAction::Lock);
    }

    fn fail(&mut self, cause: Cause, tell: bool) {
        let reason = Reason { step: self.state.step(), cause };
        self.actions.clear();
        if tell {
            self.actions.push_back(SuccessorAction::Send(ToIncumbent::abort(&reason)));
        }
        self.end(SuccessorOutcome::Failed(reason));
    }

    fn enter(&mut self, state: State, now: Instant, limit: Duration) {
        self.state = state;
        self.deadline = Some(now + limit);
    }

    fn end(&mut self, outcome: SuccessorOutcome) {
        self.deadline = None;
        self.actions.push_back(SuccessorAction::End(outcome.clone()));
        self.state = State::Ended(outcome);
    }
}

impl State {
    fn step(&self) -> Step {
        match self {
            State::Asking | State::Receiving => Step::Offer,
            State::Preparing => Step::Ready,
            State::Ready => Step::Freeze,
            State::Deciding => Step::Accept,
            State::Accepted | State::Orphaned => Step::Released,
            State::Locking { .. } | State::Committing | State::Ended(_) => Step::Taken,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            State::Asking => "Asking",
            State::Receiving => "Receiving",
            State::Preparing => "Preparing",
            State::Ready => "Ready",
            State::Deciding => "Deciding",
            State::Accepted => "Accepted",
            State::Orphaned => "Orphaned",
            State::Locking { commit: true } => "Locking",
            State::Locking { commit: false } => "Inheriting",
            State::Committing => "Committing",
            State::Ended(SuccessorOutcome::Serve) => "Serving",
            State::Ended(SuccessorOutcome::Failed(_)) => "Failed",
        }
    }
}
