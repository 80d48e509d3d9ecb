//! The incumbent's side of a takeover.
//!
//! It promises that after anything but the reading of `Taken` the incumbent serves on, and that it never does so
//! while the successor could.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{BATCH, Cause, Fencing, Reason, Step, Times, ToIncumbent, ToSuccessor, WINDOW};
use crate::item::ItemId;

/// The incumbent's state machine, for one takeover whose Hello was accepted.
///
/// ```
/// use heirloom::protocol::*;
/// use std::time::Instant;
///
/// let now = Instant::now();
/// let mut machine = Incumbent::new(now, Times::default());
/// assert_eq!(machine.poll(now), Some(IncumbentAction::PrepareOffer));
/// machine.offered(now, Vec::new());
/// assert_eq!(machine.poll(now), Some(IncumbentAction::Send(ToSuccessor::Offer)));
/// assert_eq!(machine.poll(now), Some(IncumbentAction::Send(ToSuccessor::Offered)));
/// machine.handle(now, ToIncumbent::Ready);
/// assert_eq!(machine.poll(now), Some(IncumbentAction::Freeze));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Incumbent {
    state: State,
    times: Times,
    fencing: Fencing,
    deadline: Option<Instant>,
    actions: VecDeque<IncumbentAction>,
    unsent: VecDeque<ItemId>,
    batch: usize,
    credit: u32,
    successor_gone: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// The application prepares the base manifest.
    Preparing,
    /// Batches are sent as credit allows.
    Offering,
    /// Everything is offered; `Ready` is awaited.
    Offered,
    /// The application was told to freeze.
    Freezing,
    /// Frozen; the descriptors of late items are sent.
    Completing,
    /// `Freeze` is sent; `Accept` is awaited.
    Frozen,
    /// `Released` is sent and the lock is free; `Taken` is awaited.
    Released,
    /// `Abort` is sent; what the successor sent before is read to its end.
    Draining {
        reason: Reason,
        released: bool,
    },
    /// No `Taken` was found; the lock is taken again.
    Relocking {
        reason: Reason,
        until: Option<Instant>,
        fence: Option<Instant>,
    },
    Ended(IncumbentOutcome),
}

/// What the driver of an incumbent has to do next.
///
/// ```
/// use heirloom::protocol::{Incumbent, IncumbentAction, Times};
/// use std::time::Instant;
///
/// let now = Instant::now();
/// let mut machine = Incumbent::new(now, Times::default());
/// assert_eq!(machine.poll(now), Some(IncumbentAction::PrepareOffer));
/// assert_eq!(machine.poll(now), None, "it waits for the application");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum IncumbentAction {
    /// Write down the base manifest, then call [`Incumbent::offered`].
    PrepareOffer,
    /// Send this message. If the channel is closed call [`Incumbent::handle_closed`]; if it is full, try again later,
    /// before any other action.
    Send(ToSuccessor),
    /// Stop touching every descriptor, then call [`Incumbent::frozen`].
    Freeze,
    /// Unlock the service lock.
    Unlock,
    /// Shut the receiving side of the channel, feed what is left in it to [`Incumbent::handle`], then call
    /// [`Incumbent::drained`].
    Drain,
    /// Try to take the service lock, then call [`Incumbent::relocked`] or [`Incumbent::lock_held`].
    Relock,
    /// End the successor, which lingers and may hold the lock, if it can be ended safely (by pidfd).
    Fence,
    /// The takeover has ended.
    End(IncumbentOutcome),
}

/// How a takeover ended for the incumbent.
///
/// ```
/// use heirloom::protocol::IncumbentOutcome;
///
/// fn must_exit(outcome: &IncumbentOutcome) -> bool {
///     !matches!(outcome, IncumbentOutcome::Resumed(_))
/// }
/// assert!(must_exit(&IncumbentOutcome::Taken));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum IncumbentOutcome {
    /// The successor serves. Exit.
    Taken,
    /// Serve on.
    Resumed(Reason),
    /// Another process holds the service lock: a third one, which serves, or, with [`Fencing::GiveUp`], a successor that
    /// lingers. Exit, and say so.
    Superseded(Reason),
}

impl Incumbent {
    /// Starts the takeover.
    pub fn new(now: Instant, times: Times) -> Self {
        Self::with_batch(now, times, BATCH)
    }

    /// Starts the takeover with at most `batch` descriptors a message: small ones make a model checker's work small.
    pub fn with_batch(now: Instant, times: Times, batch: usize) -> Self {
        Incumbent {
            state: State::Preparing,
            times,
            fencing: Fencing::default(),
            deadline: Some(now + times.offer),
            actions: VecDeque::from([IncumbentAction::PrepareOffer]),
            unsent: VecDeque::new(),
            batch: batch.clamp(1, BATCH),
            credit: WINDOW,
            successor_gone: false,
        }
    }

    /// Sets what is done about an aborted successor that keeps the lock.
    #[must_use]
    pub fn fencing(mut self, fencing: Fencing) -> Self {
        self.fencing = fencing;
        self
    }

    /// The next thing to do; `None` until something happens.
    pub fn poll(&mut self, now: Instant) -> Option<IncumbentAction> {
        if self.actions.is_empty() {
            self.send_batches(now);
        }
        self.actions.pop_front()
    }

    /// When [`Incumbent::handle_timeout`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The application has written down its base manifest; these are the items whose descriptors travel early.
    pub fn offered(&mut self, now: Instant, items: Vec<ItemId>) {
        if self.state == State::Preparing {
            self.unsent = items.into();
            self.actions.push_back(IncumbentAction::Send(ToSuccessor::Offer));
            self.enter(State::Offering, now, self.times.offer);
        }
    }

    /// The application touches nothing any more; these items are not yet sent. Their descriptors go first, then the
    /// delta.
    pub fn frozen(&mut self, now: Instant, late: Vec<ItemId>) {
        if self.state == State::Freezing {
            self.unsent = late.into();
            self.enter(State::Completing, now, self.times.accept);
        }
    }

    /// A message has arrived.
    pub fn handle(&mut self, now: Instant, message: ToIncumbent) {
        match (&self.state, message) {
            (State::Released, ToIncumbent::Taken) => self.end(IncumbentOutcome::Taken),
            (State::Draining { released, .. }, message) => {
                if *released && message == ToIncumbent::Taken {
                    self.end(IncumbentOutcome::Taken);
                }
            }
            (State::Relocking { .. } | State::Ended(_), _) => {}
            (_, ToIncumbent::Abort { reason }) => self.resume(Cause::Withdrawn(reason)),
            (State::Offering | State::Offered | State::Completing | State::Frozen, ToIncumbent::Credit)
                if self.credit < WINDOW =>
            {
                self.credit += 1;
                if self.state == State::Offering {
                    self.deadline = Some(now + self.times.offer);
                }
            }
            (State::Offered, ToIncumbent::Ready) => {
                self.state = State::Freezing;
                self.deadline = None;
                self.actions.push_back(IncumbentAction::Freeze);
            }
            (State::Frozen, ToIncumbent::Accept) => {
                self.actions.push_back(IncumbentAction::Unlock);
                self.actions.push_back(IncumbentAction::Send(ToSuccessor::Released));
                self.enter(State::Released, now, self.times.taken);
            }
            (state, message) => {
                let what = format!("{message:?} in state {}", state.name());
                self.resume(Cause::Nonsense(what));
            }
        }
    }

    /// A packet has arrived that is no message.
    pub fn handle_nonsense(&mut self, what: impl ToString) {
        if !self.is_ending() {
            self.resume(Cause::Nonsense(what.to_string()));
        }
    }

    /// The successor has closed the channel, and everything that it had sent was handled. It may still live, and hold
    /// the service lock.
    pub fn handle_closed(&mut self) {
        if !self.is_ending() {
            self.resume(Cause::Closed);
        }
    }

    /// The successor's process has exited, and everything that it had sent was handled.
    pub fn handle_exited(&mut self, now: Instant) {
        self.successor_gone = true;
        match &mut self.state {
            State::Relocking { until, .. } => {
                *until = until.or(Some(now + self.times.relock));
                self.deadline = Some(now);
            }
            State::Draining { .. } | State::Ended(_) => {}
            _ => self.resume(Cause::Exited),
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match &mut self.state {
            State::Preparing => {
                self.resume(Cause::Local("the application did not write down its state in time".into()));
            }
            State::Offering => self.resume(Cause::Timeout(self.times.offer)),
            State::Offered => self.resume(Cause::Timeout(self.times.ready)),
            State::Completing | State::Frozen => self.resume(Cause::Timeout(self.times.accept)),
            State::Released => self.resume(Cause::Timeout(self.times.taken)),
            State::Relocking { fence, until, .. } => {
                if fence.is_some_and(|fence| now >= fence) {
                    *fence = None;
                    match self.fencing {
                        Fencing::Kill => self.actions.push_back(IncumbentAction::Fence),
                        Fencing::Wait => {}
                        // After one more try.
                        Fencing::GiveUp => *until = until.or(Some(now)),
                    }
                }
                self.actions.push_back(IncumbentAction::Relock);
            }
            State::Freezing | State::Draining { .. } | State::Ended(_) => {}
        }
    }

    /// Our own side cannot go on, or does not want to.
    pub fn abort(&mut self, why: impl ToString) {
        if !self.is_ending() {
            self.resume(Cause::Local(why.to_string()));
        }
    }

    /// After [`IncumbentAction::Drain`]: the receiving side is shut and empty. No `Taken` can follow.
    pub fn drained(&mut self, now: Instant) {
        let State::Draining { reason, released } = &self.state else { return };
        let reason = reason.clone();
        if *released {
            self.state = State::Relocking {
                reason,
                until: self.successor_gone.then(|| now + self.times.relock),
                fence: Some(now + self.times.fence),
            };
            self.actions.push_back(IncumbentAction::Relock);
        } else {
            self.end(IncumbentOutcome::Resumed(reason));
        }
    }

    /// After [`IncumbentAction::Relock`]: we hold the lock.
    pub fn relocked(&mut self) {
        if let State::Relocking { reason, .. } = &self.state {
            self.end(IncumbentOutcome::Resumed(reason.clone()));
        }
    }

    /// After [`IncumbentAction::Relock`]: somebody else holds the lock. While it may be the successor, which cannot
    /// serve any more, it is waited for; when that is gone, whoever holds it serves.
    pub fn lock_held(&mut self, now: Instant) {
        let State::Relocking { reason, until, .. } = &self.state else { return };
        if until.is_some_and(|until| now >= until) {
            self.end(IncumbentOutcome::Superseded(reason.clone()));
        } else {
            self.deadline = Some(now + self.times.retry);
        }
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&IncumbentOutcome> {
        match &self.state {
            State::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Whether it is past asking anything of the application: it has ended, or is on the way to serving on.
    pub fn is_ending(&self) -> bool {
        matches!(self.state, State::Draining { .. } | State::Relocking { .. } | State::Ended(_))
    }

    /// The state's name in `docs/protocol.md`.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn send_batches(&mut self, now: Instant) {
        if !matches!(self.state, State::Offering | State::Completing) {
            return;
        }
        if !self.unsent.is_empty() {
            if self.credit > 0 {
                self.credit -= 1;
                let ids = self.unsent.drain(..self.batch.min(self.unsent.len())).collect();
                self.actions.push_back(IncumbentAction::Send(ToSuccessor::Batch { ids }));
            }
        } else if self.state == State::Offering {
            self.actions.push_back(IncumbentAction::Send(ToSuccessor::Offered));
            self.enter(State::Offered, now, self.times.ready);
        } else {
            self.actions.push_back(IncumbentAction::Send(ToSuccessor::Freeze));
            self.state = State::Frozen;
        }
    }

    fn resume(&mut self, cause: Cause) {
        let reason = Reason { step: self.state.step(), cause };
        let released = self.state == State::Released;
        self.actions.clear();
        self.unsent.clear();
        self.deadline = None;
        self.actions.push_back(IncumbentAction::Send(ToSuccessor::abort(&reason)));
        self.actions.push_back(IncumbentAction::Drain);
        self.state = State::Draining { reason, released };
    }

    fn enter(&mut self, state: State, now: Instant, limit: Duration) {
        self.state = state;
        self.deadline = Some(now + limit);
    }

    fn end(&mut self, outcome: IncumbentOutcome) {
        self.deadline = None;
        self.actions.clear();
        self.actions.push_back(IncumbentAction::End(outcome.clone()));
        self.state = State::Ended(outcome);
    }
}

impl State {
    fn step(&self) -> Step {
        match self {
            State::Preparing | State::Offering => Step::Offer,
            State::Offered => Step::Ready,
            State::Freezing | State::Completing => Step::Freeze,
            State::Frozen => Step::Accept,
            State::Released => Step::Taken,
            State::Draining { reason, .. } | State::Relocking { reason, .. } => reason.step,
            State::Ended(_) => Step::Taken,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            State::Preparing => "Preparing",
            State::Offering => "Offering",
            State::Offered => "Offered",
            State::Freezing => "Freezing",
            State::Completing => "Completing",
            State::Frozen => "Frozen",
            State::Released => "Released",
            State::Draining { .. } => "Draining",
            State::Relocking { .. } => "Relocking",
            State::Ended(IncumbentOutcome::Taken) => "Taken",
            State::Ended(IncumbentOutcome::Resumed(_)) => "Resumed",
            State::Ended(IncumbentOutcome::Superseded(_)) => "Superseded",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actions(machine: &mut Incumbent) -> Vec<IncumbentAction> {
        std::iter::from_fn(|| machine.poll(Instant::now())).collect()
    }

    fn frozen(now: Instant) -> Incumbent {
        let mut machine = Incumbent::new(now, Times::default());
        machine.offered(now, vec![ItemId(1)]);
        actions(&mut machine);
        machine.handle(now, ToIncumbent::Credit);
        machine.handle(now, ToIncumbent::Ready);
        assert_eq!(actions(&mut machine), [IncumbentAction::Freeze]);
        machine.frozen(now, vec![]);
        assert_eq!(actions(&mut machine), [IncumbentAction::Send(ToSuccessor::Freeze)]);
        machine
    }

    #[test]
    fn no_more_batches_than_credit() {
        let now = Instant::now();
        let mut machine = Incumbent::with_batch(now, Times::default(), 1);
        machine.offered(now, (1..=20).map(ItemId).collect());
        let sent = actions(&mut machine);
        assert_eq!(sent.len(), 2 + WINDOW as usize, "prepare, offer and a window of batches");
        machine.handle(now, ToIncumbent::Credit);
        assert_eq!(actions(&mut machine).len(), 1);
    }

    #[test]
    fn credit_beyond_the_window_is_nonsense() {
        let now = Instant::now();
        let mut machine = Incumbent::new(now, Times::default());
        machine.offered(now, vec![]);
        actions(&mut machine);
        machine.handle(now, ToIncumbent::Credit);
        assert!(matches!(actions(&mut machine)[0], IncumbentAction::Send(ToSuccessor::Abort { .. })));
    }

    #[test]
    fn a_taken_found_after_the_abort_still_counts() {
        let now = Instant::now();
        let mut machine = frozen(now);
        machine.handle(now, ToIncumbent::Accept);
        actions(&mut machine);
        machine.handle_timeout(now + Times::default().taken);
        assert_eq!(actions(&mut machine).last(), Some(&IncumbentAction::Drain));
        machine.handle(now, ToIncumbent::Taken);
        machine.drained(now);
        assert_eq!(machine.outcome(), Some(&IncumbentOutcome::Taken));
    }

    #[test]
    fn a_taken_before_released_commits_nothing() {
        let now = Instant::now();
        let mut machine = frozen(now);
        machine.handle(now, ToIncumbent::Taken);
        machine.drained(now);
        let Some(IncumbentOutcome::Resumed(reason)) = machine.outcome() else { panic!("{machine:?}") };
        assert_eq!(reason.step, Step::Accept);
        assert!(matches!(reason.cause, Cause::Nonsense(_)));
    }

    /// An incumbent that is to resume, while its successor has the lock.
    fn relocking(now: Instant, fencing: Fencing) -> Incumbent {
        let mut machine = frozen(now).fencing(fencing);
        machine.handle(now, ToIncumbent::Accept);
        machine.handle_timeout(now + Times::default().taken);
        machine.drained(now);
        assert_eq!(actions(&mut machine).last(), Some(&IncumbentAction::Relock));
        machine.lock_held(now);
        machine
    }

    #[test]
    fn whoever_waits_for_a_lingering_successor_waits_until_the_lock_is_free() {
        let now = Instant::now();
        let mut machine = relocking(now, Fencing::Wait);
        for minutes in 1..60 {
            let now = now + Duration::from_secs(60 * minutes);
            machine.handle_timeout(now);
            assert_eq!(actions(&mut machine), [IncumbentAction::Relock]);
            machine.lock_held(now);
        }
        machine.relocked();
        assert!(matches!(machine.outcome(), Some(IncumbentOutcome::Resumed(_))));
    }

    #[test]
    fn whoever_gives_up_on_a_lingering_successor_tries_once_more() {
        let now = Instant::now();
        let late = now + Times::default().fence;
        let mut machine = relocking(now, Fencing::GiveUp);
        machine.handle_timeout(late);
        assert_eq!(actions(&mut machine), [IncumbentAction::Relock]);
        let mut lucky = machine.clone();
        lucky.relocked();
        assert!(matches!(lucky.outcome(), Some(IncumbentOutcome::Resumed(_))));
        machine.lock_held(late);
        assert!(matches!(machine.outcome(), Some(IncumbentOutcome::Superseded(_))));
        // One that has gone leaves the lock to somebody, who is given the usual time to let go of it.
        let mut machine = relocking(now, Fencing::GiveUp);
        machine.handle_exited(late);
        machine.handle_timeout(late);
        machine.lock_held(late);
        assert_eq!(machine.outcome(), None);
    }

    #[test]
    fn a_lingering_successor_with_the_lock_is_fenced_and_a_third_process_yields_superseded() {
        let now = Instant::now();
        let times = Times::default();
        let mut machine = relocking(now, Fencing::Kill);
        machine.handle_timeout(now + times.fence);
        assert_eq!(actions(&mut machine), [IncumbentAction::Fence, IncumbentAction::Relock]);
        machine.lock_held(now + times.fence);
        machine.handle_exited(now + times.fence);
        let late = now + times.fence + times.relock;
        machine.handle_timeout(late);
        assert_eq!(actions(&mut machine), [IncumbentAction::Relock]);
        machine.lock_held(late);
        assert!(matches!(machine.outcome(), Some(IncumbentOutcome::Superseded(_))));
    }
}
