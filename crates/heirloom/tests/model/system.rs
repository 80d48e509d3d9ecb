//! The two processes, the channel between them, the service lock, an upgrade in place as a rival of the takeover, and a
//! third process that wants the lock too: a crash restart, or anybody who starts by hand.

use std::time::{Duration, Instant};

use heirloom::ItemId;
use heirloom::protocol::{
    Fencing, Incumbent, IncumbentAction, IncumbentOutcome, Successor, SuccessorAction, SuccessorOutcome,
    Times, ToIncumbent, ToSuccessor,
};
use stateright::{Model, Property};

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weakening {
    /// The incumbent exits when it has read `Accept`.
    CommitAtAccept,
    /// The incumbent resumes without saying so.
    NoAbort,
    /// The service lock excludes nobody.
    NoLock,
    /// The incumbent resumes without shutting its receiving side.
    NoShutdown,
    /// The incumbent shuts its receiving side but does not read what is left.
    NoDrain,
    /// The successor takes the end of the channel for a release: without reading what is queued, and without knowing
    /// that the incumbent has exited.
    EndIsRelease,
    /// The incumbent becomes a new program in place while a takeover is going on.
    ExecBesideTakeover,
}

pub(crate) struct Takeover {
    weakening: Option<Weakening>,
    fencing: Fencing,
    now: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Process {
    Running,
    Crashed,
    Exited,
}

/// How far the incumbent is with an upgrade in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum InPlace {
    No,
    /// Everything is stopped for an execve, with the lock held.
    Frozen,
    /// It is the new program.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    Incumbent,
    Successor,
    Third,
}

/// Everything there is at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct System {
    incumbent: Incumbent,
    incumbent_process: Process,
    incumbent_serves: bool,
    incumbent_asked: Option<Asked>,
    incumbent_saw_closed: bool,
    incumbent_saw_exited: bool,
    in_place: InPlace,
    /// A takeover was asked for and admitted.
    admitted: bool,
    /// The incumbent's end of the channel.
    incumbent_end: End,
    successor: Successor,
    successor_process: Process,
    /// It has closed the channel, against the rules, and does nothing more, but lives, and keeps the lock if it has it.
    successor_sulks: bool,
    successor_serves: bool,
    successor_asked: Option<Asked>,
    successor_saw_closed: bool,
    successor_saw_exited: bool,
    successor_end: End,
    to_successor: Vec<ToSuccessor>,
    to_incumbent: Vec<ToIncumbent>,
    lock: Option<Holder>,
    third_serves: bool,
    /// The incumbent has served again after its freeze: what the successor holds is out of date.
    resumed: bool,
    /// Whoever came to serve in the incumbent's stead has ended: nobody is obliged to serve any more.
    server_died: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum End {
    Open,
    /// Nothing can be sent to this end any more.
    ReceiveShut,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Asked {
    Offer,
    Freeze,
    Prepare,
    Decide,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// The driver carries out the next thing that the machine asks for; `late`: a long time has passed.
    IncumbentActs {
        late: bool,
    },
    IncumbentReads,
    IncumbentSeesClosed,
    IncumbentSeesExited,
    IncumbentTimesOut,
    IncumbentAnswers,
    IncumbentWithdraws,
    IncumbentCrashes,
    IncumbentFreezesForExec,
    ExecFails,
    ExecSucceeds,
    SuccessorIsAdmitted,
    SuccessorActs {
        late: bool,
    },
    SuccessorReads,
    SuccessorSeesClosed,
    SuccessorSeesExited,
    SuccessorTimesOut,
    SuccessorAnswers,
    SuccessorWithdraws,
    SuccessorCrashes,
    SuccessorSulks,
    /// Whoever looks after the machine ends a successor that lingers: what an incumbent that waits waits for.
    SulkingSuccessorIsEnded,
    ThirdLocksAndServes,
    ThirdEnds,
}

impl Action {
    /// Things that need not happen.
    pub(crate) fn is_adversity(self) -> bool {
        matches!(
            self,
            Action::IncumbentCrashes
                | Action::SuccessorCrashes
                | Action::SuccessorSulks
                | Action::ThirdLocksAndServes
                | Action::ThirdEnds
        )
    }
}

impl Takeover {
    pub(crate) fn new(weakening: Option<Weakening>) -> Self {
        Takeover { weakening, fencing: Fencing::default(), now: Instant::now() }
    }

    pub(crate) fn with_fencing(fencing: Fencing) -> Self {
        Takeover { fencing, ..Takeover::new(None) }
    }

    fn weak(&self, weakening: Weakening) -> bool {
        self.weakening == Some(weakening)
    }

    fn later(&self) -> Instant {
        self.now + Duration::from_secs(3600)
    }

    fn try_lock(&self, state: &mut System, who: Holder) -> bool {
        if self.weak(Weakening::NoLock) {
            return true;
        }
        let free = state.lock.is_none_or(|holder| holder == who);
        if free {
            state.lock = Some(who);
        }
        free
    }

    fn incumbent_acts(&self, state: &mut System, late: bool) -> Option<()> {
        let now = self.now;
        match state.incumbent.poll(now)? {
            IncumbentAction::PrepareOffer => state.incumbent_asked = Some(Asked::Offer),
            IncumbentAction::Freeze => state.incumbent_asked = Some(Asked::Freeze),
            IncumbentAction::Send(ToSuccessor::Abort { .. }) if self.weak(Weakening::NoAbort) => {}
            IncumbentAction::Send(message) => {
                let released = message == ToSuccessor::Released;
                if state.successor_end == End::Closed {
                    for message in std::mem::take(&mut state.to_incumbent) {
                        state.incumbent.handle(now, message);
                    }
                    state.incumbent.handle_closed();
                } else {
                    state.to_successor.push(message);
                }
                if released && self.weak(Weakening::CommitAtAccept) {
                    state.incumbent_exits();
                }
            }
            IncumbentAction::Unlock => state.unlock(Holder::Incumbent),
            IncumbentAction::Drain => {
                if !self.weak(Weakening::NoShutdown) && state.incumbent_end == End::Open {
                    state.incumbent_end = End::ReceiveShut;
                }
                if !self.weak(Weakening::NoDrain) {
                    for message in std::mem::take(&mut state.to_incumbent) {
                        state.incumbent.handle(now, message);
                    }
                }
                state.incumbent.drained(now);
            }
            IncumbentAction::Relock => {
                if self.try_lock(state, Holder::Incumbent) {
                    state.incumbent.relocked();
                } else {
                    state.incumbent.lock_held(if late { self.later() } else { now });
                }
            }
            IncumbentAction::Fence => state.successor_dies(Process::Crashed),
            IncumbentAction::End(IncumbentOutcome::Resumed(_)) => {
                state.resumed |= !state.incumbent_serves;
                state.incumbent_serves = true;
                state.incumbent_end = End::Closed;
                state.incumbent_asked = None;
            }
            IncumbentAction::End(IncumbentOutcome::Taken | IncumbentOutcome::Superseded(_)) => {
                state.incumbent_exits();
            }
        }
        Some(())
    }

    fn successor_acts(&self, state: &mut System, late: bool) -> Option<()> {
        let now = self.now;
        match state.successor.poll()? {
            SuccessorAction::Prepare => state.successor_asked = Some(Asked::Prepare),
            SuccessorAction::Decide => state.successor_asked = Some(Asked::Decide),
            SuccessorAction::Send(message) => {
                if state.incumbent_end == End::Open {
                    state.to_incumbent.push(message);
                } else {
                    self.successor_reads_all(state);
                    if state.incumbent_end == End::Closed {
                        state.successor.handle_closed(now);
                    }
                }
            }
            SuccessorAction::Lock => {
                if self.try_lock(state, Holder::Successor) {
                    state.successor.locked();
                } else {
                    state.successor.lock_held(if late { self.later() } else { now });
                }
            }
            SuccessorAction::Commit => {
                if state.incumbent_end == End::Open {
                    state.to_incumbent.push(ToIncumbent::Taken);
                    state.successor.committed();
                } else {
                    state.successor.refused(now);
                }
            }
            SuccessorAction::Unlock => state.unlock(Holder::Successor),
            SuccessorAction::End(SuccessorOutcome::Serve) => state.successor_serves = true,
            SuccessorAction::End(SuccessorOutcome::Failed(_)) => state.successor_dies(Process::Exited),
        }
        Some(())
    }

    /// While a takeover is going on no upgrade begins, and the other way round: one at a time over all transports.
    fn may_exec(&self, state: &System) -> bool {
        let alone = !state.admitted || state.incumbent_end == End::Closed;
        match self.weak(Weakening::ExecBesideTakeover) {
            false => alone && state.incumbent_serves,
            true => state.incumbent_serves || !alone,
        }
    }

    fn successor_reads_all(&self, state: &mut System) {
        for message in std::mem::take(&mut state.to_successor) {
            state.successor.handle(self.now, message);
        }
    }
}

impl System {
    pub(crate) fn serving(&self) -> usize {
        [self.incumbent_serves, self.successor_serves, self.third_serves].iter().filter(|&&s| s).count()
    }

    /// Whether somebody lives who has to see to it that the service goes on. A successor alone is obliged once the
    /// incumbent has left it everything; before that, a crash of the incumbent ends the service.
    pub(crate) fn obliged(&self) -> bool {
        match self.incumbent_process {
            Process::Running => true,
            Process::Crashed => false,
            Process::Exited => !self.server_died,
        }
    }

    /// Whether a process that neither serves nor will ever serve still holds duplicates of the descriptors. One that lives
    /// on without a word, against the rules, is not counted: it is ended only if it keeps the lock.
    pub(crate) fn leaks(&self) -> bool {
        self.successor_process == Process::Running
            && !self.successor_serves
            && !self.successor_sulks
            && self.admitted
            && (self.incumbent_end == End::Closed || self.incumbent_process != Process::Running)
    }

    pub(crate) fn names(&self) -> (&'static str, &'static str) {
        (self.incumbent.state_name(), self.successor.state_name())
    }

    fn unlock(&mut self, who: Holder) {
        if self.lock == Some(who) {
            self.lock = None;
        }
    }

    fn incumbent_exits(&mut self) {
        self.incumbent_process = Process::Exited;
        self.incumbent_gone();
    }

    fn incumbent_gone(&mut self) {
        self.incumbent_serves = false;
        self.incumbent_end = End::Closed;
        self.incumbent_asked = None;
        self.to_incumbent.clear();
        self.unlock(Holder::Incumbent);
    }

    fn successor_dies(&mut self, how: Process) {
        if self.successor_process == Process::Running {
            let committed = self.successor.outcome() == Some(&SuccessorOutcome::Serve);
            self.server_died |= how == Process::Crashed && (self.successor_serves || committed);
            self.successor_process = how;
            self.successor_serves = false;
            self.successor_end = End::Closed;
            self.successor_asked = None;
            self.to_successor.clear();
            self.unlock(Holder::Successor);
        }
    }
}

impl Model for Takeover {
    type State = System;
    type Action = Action;

    fn init_states(&self) -> Vec<System> {
        vec![System {
            incumbent: Incumbent::with_batch(self.now, Times::default(), 1).fencing(self.fencing),
            incumbent_process: Process::Running,
            incumbent_serves: true,
            incumbent_asked: None,
            incumbent_saw_closed: false,
            incumbent_saw_exited: false,
            in_place: InPlace::No,
            admitted: false,
            incumbent_end: End::Open,
            successor: Successor::new(self.now, Times::default()),
            successor_process: Process::Running,
            successor_sulks: false,
            successor_serves: false,
            successor_asked: None,
            successor_saw_closed: false,
            successor_saw_exited: false,
            successor_end: End::Open,
            to_successor: Vec::new(),
            to_incumbent: Vec::new(),
            lock: Some(Holder::Incumbent),
            third_serves: false,
            resumed: false,
            server_died: false,
        }]
    }

    fn actions(&self, state: &System, actions: &mut Vec<Action>) {
        if state.incumbent_process == Process::Running {
            actions.push(Action::IncumbentCrashes);
            match state.in_place {
                InPlace::No if self.may_exec(state) => actions.push(Action::IncumbentFreezesForExec),
                InPlace::Frozen => actions.extend([Action::ExecFails, Action::ExecSucceeds]),
                InPlace::No | InPlace::Done => {}
            }
            let at_it = state.admitted && state.incumbent_end != End::Closed;
            if at_it {
                actions.push(Action::IncumbentActs { late: false });
                actions.push(Action::IncumbentActs { late: true });
                if !state.to_incumbent.is_empty() {
                    actions.push(Action::IncumbentReads);
                } else {
                    if state.successor_end == End::Closed && !state.incumbent_saw_closed {
                        actions.push(Action::IncumbentSeesClosed);
                    }
                    if state.successor_process != Process::Running && !state.incumbent_saw_exited {
                        actions.push(Action::IncumbentSeesExited);
                    }
                }
                if state.incumbent.deadline().is_some() {
                    actions.push(Action::IncumbentTimesOut);
                }
                if state.incumbent_asked.is_some() {
                    actions.push(Action::IncumbentAnswers);
                    actions.push(Action::IncumbentWithdraws);
                }
            }
        }
        if state.successor_process == Process::Running {
            actions.push(Action::SuccessorCrashes);
            if !state.admitted {
                if state.incumbent_process == Process::Running && state.in_place != InPlace::Frozen {
                    actions.push(Action::SuccessorIsAdmitted);
                }
            } else if !state.successor_serves && !state.successor_sulks {
                actions.push(Action::SuccessorSulks);
                actions.push(Action::SuccessorActs { late: false });
                actions.push(Action::SuccessorActs { late: true });
                if !state.to_successor.is_empty() {
                    actions.push(Action::SuccessorReads);
                }
                let at_the_end = state.to_successor.is_empty();
                let sees_the_end = at_the_end || self.weak(Weakening::EndIsRelease);
                if sees_the_end && state.incumbent_end == End::Closed && !state.successor_saw_closed {
                    actions.push(Action::SuccessorSeesClosed);
                }
                let incumbent_ended = state.incumbent_process != Process::Running;
                if at_the_end && incumbent_ended && !state.successor_saw_exited {
                    actions.push(Action::SuccessorSeesExited);
                }
                if state.successor.deadline().is_some() {
                    actions.push(Action::SuccessorTimesOut);
                }
                if state.successor_asked.is_some() {
                    actions.push(Action::SuccessorAnswers);
                    actions.push(Action::SuccessorWithdraws);
                }
            }
        }
        if state.successor_sulks && self.fencing == Fencing::Wait {
            actions.push(Action::SulkingSuccessorIsEnded);
        }
        if state.third_serves {
            actions.push(Action::ThirdEnds);
        } else {
            actions.push(Action::ThirdLocksAndServes);
        }
    }

    fn next_state(&self, before: &System, action: Action) -> Option<System> {
        let mut state = before.clone();
        let (now, later) = (self.now, self.later());
        match action {
            Action::IncumbentActs { late } => self.incumbent_acts(&mut state, late)?,
            Action::IncumbentReads => {
                let message = state.to_incumbent.remove(0);
                state.incumbent.handle(now, message);
            }
            Action::IncumbentSeesClosed => {
                state.incumbent_saw_closed = true;
                state.incumbent.handle_closed();
            }
            Action::IncumbentSeesExited => {
                state.incumbent_saw_exited = true;
                state.incumbent.handle_exited(now);
            }
            Action::IncumbentTimesOut => state.incumbent.handle_timeout(later + later.duration_since(now)),
            Action::IncumbentAnswers => match state.incumbent_asked.take()? {
                Asked::Offer => state.incumbent.offered(now, vec![ItemId(1)]),
                _ => {
                    // A machine that has given up meanwhile no longer asks for the freeze.
                    if !state.incumbent.is_ending() {
                        state.incumbent_serves = false;
                        state.incumbent.frozen(now, vec![ItemId(2)]);
                    }
                }
            },
            Action::IncumbentWithdraws => {
                state.incumbent_asked = None;
                state.incumbent.abort("withdrawn");
            }
            Action::IncumbentCrashes => {
                state.incumbent_process = Process::Crashed;
                state.incumbent_gone();
            }
            Action::IncumbentFreezesForExec => {
                state.in_place = InPlace::Frozen;
                state.incumbent_serves = false;
            }
            Action::ExecFails => {
                state.in_place = InPlace::No;
                state.incumbent_serves = true;
            }
            Action::ExecSucceeds => {
                state.in_place = InPlace::Done;
                state.incumbent_serves = true;
                if state.admitted {
                    // The channel is close-on-exec, and what the machine knew is forgotten.
                    state.incumbent_end = End::Closed;
                    state.incumbent_asked = None;
                    state.to_incumbent.clear();
                }
            }
            Action::SuccessorIsAdmitted => state.admitted = true,
            Action::SuccessorActs { late } => self.successor_acts(&mut state, late)?,
            Action::SuccessorReads => {
                let message = state.to_successor.remove(0);
                state.successor.handle(now, message);
            }
            Action::SuccessorSeesClosed => {
                state.successor_saw_closed = true;
                state.successor.handle_closed(now);
                if self.weak(Weakening::EndIsRelease) {
                    state.successor.handle_exited(now);
                }
            }
            Action::SuccessorSeesExited => {
                state.successor_saw_exited = true;
                state.successor.handle_exited(now);
            }
            Action::SuccessorTimesOut => state.successor.handle_timeout(later + later.duration_since(now)),
            Action::SuccessorAnswers => match state.successor_asked.take()? {
                Asked::Prepare => state.successor.ready(now),
                _ => state.successor.accept(now),
            },
            Action::SuccessorWithdraws => {
                state.successor_asked = None;
                state.successor.abort("withdrawn");
            }
            Action::SuccessorCrashes => state.successor_dies(Process::Crashed),
            Action::SuccessorSulks => {
                if state.successor.outcome() == Some(&SuccessorOutcome::Serve) {
                    return None;
                }
                state.successor_sulks = true;
                state.successor_end = End::Closed;
                state.to_successor.clear();
            }
            Action::SulkingSuccessorIsEnded => state.successor_dies(Process::Exited),
            Action::ThirdLocksAndServes => {
                if !self.try_lock(&mut state, Holder::Third) {
                    return None;
                }
                state.third_serves = true;
            }
            Action::ThirdEnds => {
                state.third_serves = false;
                state.unlock(Holder::Third);
                let superseded = matches!(state.incumbent.outcome(), Some(IncumbentOutcome::Superseded(_)));
                state.server_died |= superseded;
            }
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one serves", |_, state: &System| state.serving() <= 1),
            Property::always("no stale service", |_, state: &System| {
                !(state.resumed && state.successor.outcome() == Some(&SuccessorOutcome::Serve))
            }),
            Property::sometimes("the successor serves and the incumbent has exited", |_, state: &System| {
                state.successor_serves && state.incumbent_process == Process::Exited
            }),
            Property::sometimes("the incumbent resumes after its freeze", |_, state: &System| state.resumed),
            Property::sometimes("the successor inherits from a dead incumbent", |_, state: &System| {
                state.successor_serves && state.incumbent_process == Process::Crashed
            }),
            Property::sometimes(
                "the incumbent is upgraded in place, and then taken over",
                |_, state: &System| state.in_place == InPlace::Done && state.successor_serves,
            ),
            Property::sometimes("a crash restart serves when both are dead", |_, state: &System| {
                let dead = |process| process == Process::Crashed;
                state.third_serves && dead(state.incumbent_process) && dead(state.successor_process)
            }),
            Property::sometimes("the incumbent is superseded", |_, state: &System| {
                matches!(state.incumbent.outcome(), Some(IncumbentOutcome::Superseded(_)))
            }),
        ]
    }
}
