//! The incumbent's machine against a successor that sends anything at any time, closes, dies, or says nothing.
//!
//! The driver keeps to its contract. Each byte is something that happens; when they are over, the driver goes on by itself
//! until the machine has ended, which it has to.

use std::time::{Duration, Instant};

use heirloom::ItemId;
use heirloom::protocol::{
    BATCH, Incumbent, IncumbentAction, IncumbentOutcome, Times, ToIncumbent, ToSuccessor, WINDOW,
};

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
    Offer,
    Freeze,
    Drain,
    Relock,
}

/// The machine, and what its driver and its peer have seen.
struct Case {
    machine: Incumbent,
    now: Instant,
    asked: Option<Asked>,
    early: usize,
    late: usize,
    /// How many items are to be sent by now, and how many were.
    due: u64,
    sent: u64,
    batches: u32,
    credits: u32,
    offered: bool,
    ready: bool,
    freezing: bool,
    frozen: bool,
    accepted: bool,
    unlocked: bool,
    released: bool,
    aborted: bool,
    drained: bool,
    relocked: bool,
    refused: bool,
    taken: bool,
    closed: bool,
    exited: bool,
    /// A third process has the lock.
    rival: bool,
    ended: Option<IncumbentOutcome>,
}

impl Case {
    fn new(input: &mut Input<'_>) -> Case {
        let now = Instant::now();
        let times = Times { retry: Duration::from_millis(50), ..Times::default() };
        let batch = 1 + input.number() % BATCH;
        Case {
            machine: Incumbent::with_batch(now, times, batch),
            now,
            asked: None,
            early: input.number() * 8,
            late: input.number() % 64,
            due: 0,
            sent: 0,
            batches: 0,
            credits: 0,
            offered: false,
            ready: false,
            freezing: false,
            frozen: false,
            accepted: false,
            unlocked: false,
            released: false,
            aborted: false,
            drained: false,
            relocked: false,
            refused: false,
            taken: false,
            closed: false,
            exited: false,
            rival: input.number() % 4 == 1,
            ended: None,
        }
    }

    fn happen(&mut self, what: u8, input: &mut Input<'_>) {
        match what % 16 {
            0 => {
                let (descriptors, length) = (input.number() % 2, input.number());
                match ToIncumbent::from_packet(input.bytes(length), descriptors) {
                    Ok(message) => self.receive(message),
                    Err(error) => {
                        self.machine.handle_nonsense(error);
                        assert!(self.machine.is_ending());
                    }
                }
            }
            1 => self.receive(ToIncumbent::Credit),
            2 => self.receive(ToIncumbent::Ready),
            3 => self.receive(ToIncumbent::Accept),
            4 => self.receive(ToIncumbent::Taken),
            5 => self.receive(ToIncumbent::abort("enough")),
            6 => {
                self.now += Duration::from_millis(input.number() as u64);
                self.machine.handle_timeout(self.now);
            }
            7 => self.wait(),
            8 => self.close(),
            9 => {
                self.exited = true;
                self.machine.handle_exited(self.now);
            }
            10 => self.machine.abort("the operator says so"),
            11 => self.answer(),
            12..=13 => drop(self.act()),
            _ => {
                while self.act() {
                    self.answer();
                }
            }
        }
        self.check();
    }

    /// A message of the successor, of which the channel brings nothing any more once it is drained.
    fn receive(&mut self, message: ToIncumbent) {
        if self.drained {
            return;
        }
        let (state, ending) = (self.machine.state_name(), self.machine.is_ending());
        self.machine.handle(self.now, message.clone());
        match message {
            ToIncumbent::Credit => self.credits += 1,
            ToIncumbent::Ready => self.ready |= state == "Offered",
            ToIncumbent::Accept => self.accepted |= state == "Frozen",
            ToIncumbent::Taken => self.taken |= self.accepted,
            ToIncumbent::Abort { .. } => assert!(self.machine.is_ending()),
        }
        let (name, credit) = (self.machine.state_name(), message == ToIncumbent::Credit);
        assert!(ending || credit || name != state, "{message:?} in {state} has to lead somewhere");
    }

    fn close(&mut self) {
        self.closed = true;
        self.machine.handle_closed();
        assert!(self.machine.is_ending());
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
            Some(Asked::Offer) => {
                let ids = (0..self.early as u64).map(|id| ItemId(self.sent + id)).collect();
                if self.machine.state_name() == "Preparing" {
                    self.due += self.early as u64;
                }
                self.machine.offered(self.now, ids);
            }
            Some(Asked::Freeze) => {
                let ids = (0..self.late as u64).map(|id| ItemId(self.sent + id)).collect();
                if self.machine.state_name() == "Freezing" {
                    self.due += self.late as u64;
                }
                self.machine.frozen(self.now, ids);
            }
            Some(Asked::Drain) => {
                self.drained = true;
                self.machine.drained(self.now);
            }
            Some(Asked::Relock) if self.rival => {
                self.refused = true;
                self.machine.lock_held(self.now);
            }
            Some(Asked::Relock) => {
                self.relocked = true;
                self.machine.relocked();
            }
        }
    }

    /// Carries out one action; false if there was none.
    fn act(&mut self) -> bool {
        // A driver that is asked for something answers before it asks for more, or for something else.
        let Some(action) = self.machine.poll(self.now) else { return false };
        assert!(self.ended.is_none(), "{action:?} after the end");
        match action {
            IncumbentAction::PrepareOffer => {
                assert!(!self.offered && !self.aborted && self.asked.is_none());
                self.asked = Some(Asked::Offer);
            }
            IncumbentAction::Send(message) => {
                self.send(&message);
                if self.closed {
                    self.machine.handle_closed();
                }
            }
            IncumbentAction::Freeze => {
                assert!(self.offered && self.ready && !self.freezing && !self.aborted);
                self.freezing = true;
                self.asked = Some(Asked::Freeze);
            }
            IncumbentAction::Unlock => {
                assert!(self.frozen && self.accepted && !self.unlocked && !self.aborted);
                self.unlocked = true;
            }
            IncumbentAction::Drain => {
                assert!(self.aborted && !self.drained, "first it says that it resumes");
                self.asked = Some(Asked::Drain);
            }
            IncumbentAction::Relock => {
                assert!(self.drained && self.accepted && !self.relocked);
                self.asked = Some(Asked::Relock);
            }
            IncumbentAction::Fence => {
                assert!(self.drained && (self.refused || self.exited), "nobody is ended who lets go");
                self.exited = true;
                self.machine.handle_exited(self.now);
            }
            IncumbentAction::End(outcome) => self.end(outcome),
        }
        true
    }

    fn send(&mut self, message: &ToSuccessor) {
        assert!(!self.aborted, "{message:?} after Abort");
        match message {
            ToSuccessor::Offer => assert!(self.batches == 0 && !self.offered),
            ToSuccessor::Batch { ids } => {
                assert!(!ids.is_empty() && ids.len() <= BATCH);
                for &id in ids {
                    assert_eq!(id, ItemId(self.sent), "each once, in order");
                    self.sent += 1;
                }
                assert!(self.sent <= self.due && !self.frozen);
                self.batches += 1;
                assert!(self.batches - self.credits.min(self.batches) <= WINDOW, "more than was asked for");
            }
            ToSuccessor::Offered => {
                assert!(self.sent == self.due && !self.offered);
                self.offered = true;
            }
            ToSuccessor::Freeze => {
                assert!(self.sent == self.due && self.freezing && !self.frozen);
                self.frozen = true;
            }
            ToSuccessor::Released => {
                assert!(self.unlocked && !self.released);
                self.released = true;
            }
            ToSuccessor::Abort { .. } => self.aborted = true,
        }
        assert!(message.to_packet().len() <= heirloom::channel::MAX_PACKET);
    }

    fn end(&mut self, outcome: IncumbentOutcome) {
        match &outcome {
            IncumbentOutcome::Taken => assert!(self.taken && self.accepted),
            IncumbentOutcome::Resumed(_) => {
                assert!(self.aborted && self.drained && (self.relocked || !self.unlocked));
            }
            IncumbentOutcome::Superseded(_) => {
                assert!(self.drained && self.refused && self.exited && !self.relocked);
            }
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

    /// The driver alone, with a successor that says nothing more.
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
