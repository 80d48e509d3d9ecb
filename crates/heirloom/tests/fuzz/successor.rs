//! The successor's machine against an incumbent that sends anything at any time, closes, dies, or says nothing.
//!
//! As for the incumbent: the driver keeps to its contract, and goes on by itself when the bytes are over.

use std::time::{Duration, Instant};

use heirloom::protocol::{Successor, SuccessorAction, SuccessorOutcome, Times, ToIncumbent, ToSuccessor};

use crate::input::Input;

/// A machine that has not ended after so many steps of its driver never does.
const TOO_LONG: usize = 10_000;

pub(crate) fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut case = Case::new(&mut input);
    while let Some(byte) = input.next() {
        case.happen(byte, &mut input);
    }
    case.finish();
}

/// What the machine waits for the driver to do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Asked {
    Prepare,
    Decide,
    Lock,
    Commit,
}

/// The machine, and what its driver and its peer have seen.
struct Case {
    machine: Successor,
    now: Instant,
    asked: Option<Asked>,
    batches: u32,
    credits: u32,
    offered: bool,
    prepared: bool,
    ready: bool,
    froze: bool,
    decided: bool,
    accepted: bool,
    released: bool,
    locked: bool,
    committed: bool,
    aborted: bool,
    withdrawn: bool,
    closed: bool,
    exited: bool,
    /// Another process has the lock.
    rival: bool,
    /// The incumbent has shut its receiving side.
    deaf: bool,
    ended: Option<SuccessorOutcome>,
}

impl Case {
    fn new(input: &mut Input<'_>) -> Case {
        let now = Instant::now();
        let times = Times { retry: Duration::from_millis(50), ..Times::default() };
        let flags = input.number();
        Case {
            machine: Successor::new(now, times),
            now,
            asked: None,
            batches: 0,
            credits: 0,
            offered: false,
            prepared: false,
            ready: false,
            froze: false,
            decided: false,
            accepted: false,
            released: false,
            locked: false,
            committed: false,
            aborted: false,
            withdrawn: false,
            closed: false,
            exited: false,
            rival: flags & 1 != 0,
            deaf: flags & 2 != 0,
            ended: None,
        }
    }

    fn happen(&mut self, what: u8, input: &mut Input<'_>) {
        match what % 16 {
            0 => {
                let (descriptors, length) = (input.number() % 4, input.number());
                match ToSuccessor::from_packet(input.bytes(length), descriptors) {
                    Ok(message) => self.receive(message),
                    Err(error) => self.machine.handle_nonsense(error),
                }
            }
            1 => self.receive(ToSuccessor::Offer),
            2 => self.receive(ToSuccessor::Batch { ids: Vec::new() }),
            3 => self.receive(ToSuccessor::Offered),
            4 => self.receive(ToSuccessor::Freeze),
            5 => self.receive(ToSuccessor::Released),
            6 => self.receive(ToSuccessor::abort("it serves on")),
            7 => {
                self.now += Duration::from_millis(input.number() as u64);
                self.machine.handle_timeout(self.now);
            }
            8 => self.wait(),
            9 => {
                self.closed = true;
                self.machine.handle_closed(self.now);
            }
            10 => {
                self.exited = true;
                self.machine.handle_exited(self.now);
            }
            11 => self.machine.abort("the operator says so"),
            12 => self.answer(),
            13 => self.rival = !self.rival,
            14 => drop(self.act()),
            _ => {
                while self.act() {
                    self.answer();
                }
            }
        }
        self.check();
    }

    /// A message of the incumbent. After the end of the channel there are none.
    fn receive(&mut self, message: ToSuccessor) {
        if self.closed {
            return;
        }
        let (state, before) = (self.machine.state_name(), self.machine.outcome().is_some());
        self.machine.handle(self.now, message.clone());
        let failed = matches!(self.machine.outcome(), Some(SuccessorOutcome::Failed(_)));
        match &message {
            ToSuccessor::Offer => assert!(before || failed || state == "Asking"),
            ToSuccessor::Batch { .. } => {
                assert!(before || failed || ["Receiving", "Ready"].contains(&state));
                self.batches += u32::from(!before && !failed);
            }
            ToSuccessor::Offered => self.offered |= state == "Receiving",
            ToSuccessor::Freeze => self.froze |= state == "Ready",
            ToSuccessor::Released => self.released |= state == "Accepted",
            ToSuccessor::Abort { .. } => {
                // What comes when it has ended is not read: everything that a dead incumbent had sent was read before.
                self.withdrawn |= !before;
                assert!(before || failed, "an incumbent that serves on is believed");
            }
        }
    }

    /// Time passes until something is due.
    fn wait(&mut self) {
        if let Some(deadline) = self.machine.deadline() {
            self.now = self.now.max(deadline);
            self.machine.handle_timeout(self.now);
        }
    }

    /// Does what the machine asked for and what takes a while.
    fn answer(&mut self) {
        match self.asked.take() {
            None => {}
            Some(Asked::Prepare) => {
                self.prepared = true;
                self.machine.ready(self.now);
            }
            Some(Asked::Decide) => {
                self.decided = true;
                self.machine.accept(self.now);
            }
            Some(Asked::Lock) if self.rival => self.machine.lock_held(self.now),
            Some(Asked::Lock) => {
                self.locked = true;
                self.machine.locked();
            }
            // A channel that is closed takes nothing, and what was sent before it was closed is all read.
            Some(Asked::Commit) if self.deaf || self.closed => self.machine.refused(self.now),
            Some(Asked::Commit) => {
                self.committed |= self.machine.state_name() == "Committing";
                self.machine.committed();
            }
        }
    }

    /// Carries out one action; false if there was none.
    fn act(&mut self) -> bool {
        let Some(action) = self.machine.poll() else { return false };
        assert!(self.ended.is_none(), "{action:?} after the end");
        match action {
            SuccessorAction::Send(message) => {
                self.send(&message);
                if self.closed {
                    self.machine.handle_closed(self.now);
                }
            }
            SuccessorAction::Prepare => {
                assert!(self.offered && !self.prepared);
                self.asked = Some(Asked::Prepare);
            }
            SuccessorAction::Decide => {
                assert!(self.froze && self.ready && !self.decided);
                self.asked = Some(Asked::Decide);
            }
            SuccessorAction::Lock => {
                assert!(self.decided && (self.released || self.exited), "nobody has given it up");
                self.asked = Some(Asked::Lock);
            }
            SuccessorAction::Commit => {
                assert!(self.locked && self.accepted && self.released);
                self.asked = Some(Asked::Commit);
            }
            SuccessorAction::Unlock => {
                assert!(self.locked && !self.committed);
                self.locked = false;
            }
            SuccessorAction::End(outcome) => self.end(outcome),
        }
        true
    }

    fn send(&mut self, message: &ToIncumbent) {
        assert!(!self.aborted, "{message:?} after Abort");
        match message {
            ToIncumbent::Credit => {
                self.credits += 1;
                assert!(self.credits <= self.batches);
            }
            ToIncumbent::Ready => {
                assert!(self.prepared && !self.ready);
                self.ready = true;
            }
            ToIncumbent::Accept => {
                assert!(self.decided && !self.accepted);
                self.accepted = true;
            }
            ToIncumbent::Taken => panic!("Taken is sent by Commit alone"),
            ToIncumbent::Abort { .. } => self.aborted = true,
        }
        assert!(message.to_packet().len() <= heirloom::channel::MAX_PACKET);
    }

    fn end(&mut self, outcome: SuccessorOutcome) {
        match &outcome {
            SuccessorOutcome::Serve => {
                assert!(self.locked && self.decided && !self.aborted);
                assert!(self.committed || self.exited, "it has committed, or inherits from the dead");
                assert!(self.committed || !self.withdrawn, "an incumbent that has resumed left nothing");
            }
            SuccessorOutcome::Failed(_) => assert!(!self.committed),
        }
        assert_eq!(self.machine.outcome(), Some(&outcome));
        self.ended = Some(outcome);
    }

    fn check(&self) {
        if let Some(outcome) = &self.ended {
            assert_eq!(self.machine.outcome(), Some(outcome), "the end is final");
            assert_eq!(self.machine.deadline(), None);
        }
    }

    /// The driver alone, with an incumbent that says nothing more.
    fn finish(mut self) {
        for _ in 0..TOO_LONG {
            if self.ended.is_some() {
                assert!(!self.act());
                return self.check();
            }
            if !self.act() {
                if self.asked.is_some() {
                    self.answer();
                } else {
                    assert!(
                        self.machine.deadline().is_some(),
                        "{} waits for nothing",
                        self.machine.state_name()
                    );
                    self.wait();
                }
            }
        }
        panic!("it does not end: {:?}", self.machine);
    }
}
