//! A takeover as it runs at the incumbent: the machine, the channel, and the manifest that was offered.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::busy_poll::BusyPoll;
use crate::channel::{Channel, Incoming, SendError};
use crate::clock;
use crate::control::request::Hello;
use crate::crash::{self, Point};
use crate::item::ItemId;
use crate::manifest::Listing;
use crate::peer::Peer;
use crate::protocol::{self, IncumbentAction, ToIncumbent, ToSuccessor};

/// How soon a packet that the kernel had no room for is tried again.
const RETRY: Duration = Duration::from_millis(1);

pub(crate) struct Takeover {
    pub(crate) machine: protocol::Incumbent,
    pub(crate) channel: Channel,
    pub(crate) successor: Peer,
    /// The successor is no part of this process's unit.
    pub(crate) outsider: bool,
    pub(crate) hello: Hello,
    pub(crate) started: Instant,
    pub(crate) offered: Option<Offered>,
    pub(crate) frozen_at_ns: Option<u64>,
    /// For the freeze.
    pub(crate) busy_poll: BusyPoll,
    /// The sealed delta, from the freeze until it is sent.
    pub(crate) delta: Option<OwnedFd>,
    pub(crate) items: u64,
    pub(crate) bytes: u64,
    /// What only the application can do next.
    pub(crate) want: Option<Want>,
    /// A packet for which there was no room, and when to try it again.
    blocked: Option<(ToSuccessor, Instant)>,
    /// Whether it was said that too many descriptors are in flight.
    waits_for_others: bool,
    pub(crate) channel_closed: bool,
}

/// The base manifest as it was sent.
pub(crate) struct Offered {
    pub(crate) listing: Listing,
    pub(crate) memfd: OwnedFd,
}

/// What the application is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Offer,
    Batch(Vec<ItemId>),
    Freeze,
}

/// What the incumbent itself has to do for the machine.
pub(crate) enum Task {
    Unlock,
    Relock,
    End(protocol::IncumbentOutcome),
}

impl Takeover {
    pub(crate) fn new(
        machine: protocol::Incumbent,
        channel: Channel,
        successor: Peer,
        outsider: bool,
        hello: Hello,
        look: Duration,
    ) -> Self {
        Takeover {
            machine,
            channel,
            successor,
            outsider,
            hello,
            started: Instant::now(),
            offered: None,
            frozen_at_ns: None,
            busy_poll: BusyPoll::new(look),
            delta: None,
            items: 0,
            bytes: 0,
            want: None,
            blocked: None,
            waits_for_others: false,
            channel_closed: false,
        }
    }

    /// Carries out what the machine asks, until it waits for something, the application, or the incumbent.
    pub(crate) fn run(&mut self, now: Instant) -> Option<Task> {
        loop {
            if self.machine.is_ending() {
                self.want = None;
                self.blocked.take_if(|(message, _)| !matches!(message, ToSuccessor::Abort { .. }));
            }
            if self.want.is_some() {
                return None;
            }
            if let Some((message, when)) = self.blocked.take() {
                if now < when {
                    self.blocked = Some((message, when));
                    return None;
                }
                self.send(now, message);
                continue;
            }
            match self.machine.poll(now)? {
                IncumbentAction::PrepareOffer => self.want = Some(Want::Offer),
                IncumbentAction::Send(ToSuccessor::Batch { ids }) => self.want = Some(Want::Batch(ids)),
                IncumbentAction::Send(message) => self.send(now, message),
                IncumbentAction::Freeze => {
                    crash::reach(Point::FreezeAsked);
                    self.frozen_at_ns = Some(clock::monotonic_ns());
                    self.want = Some(Want::Freeze);
                }
                IncumbentAction::Drain => {
                    let _ = self.channel.shutdown_receive();
                    self.receive_all(now);
                    if self.machine.outcome().is_none() {
                        crash::reach(Point::Drained);
                    }
                    self.machine.drained(now);
                }
                IncumbentAction::Fence => {
                    if let Err(error) = self.successor.kill() {
                        tracing::warn!(successor = %self.successor, peer_pid = self.successor.pid, %error, "cannot end a lingering successor");
                    }
                }
                IncumbentAction::Unlock => return Some(Task::Unlock),
                IncumbentAction::Relock => return Some(Task::Relock),
                IncumbentAction::End(outcome) => return Some(Task::End(outcome)),
            }
        }
    }

    /// Sends a batch of descriptors; those that have ended meanwhile are left out.
    pub(crate) fn send_batch<'d>(
        &mut self,
        now: Instant,
        ids: Vec<ItemId>,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) {
        let (alive, descriptors): (Vec<ItemId>, Vec<BorrowedFd<'_>>) =
            ids.iter().filter_map(|&id| Some((id, descriptor(id)?))).unzip();
        let count = alive.len() as u64;
        let packet = ToSuccessor::Batch { ids: alive }.to_packet();
        match self.channel.send(&packet, &descriptors) {
            Ok(()) => {
                self.items += count;
                crash::reach(Point::BatchSent);
            }
            Err(error @ (SendError::Full | SendError::InFlight { .. })) => {
                self.try_again(now, ToSuccessor::Batch { ids }, &error);
            }
            Err(error) => self.send_failed(now, error),
        }
    }

    /// Feeds everything that has arrived to the machine.
    pub(crate) fn receive_all(&mut self, now: Instant) {
        while self.receive(now) {}
    }

    /// Feeds the next packet to the machine, if there is one; whether there may be more.
    pub(crate) fn receive(&mut self, now: Instant) -> bool {
        if self.channel_closed {
            return false;
        }
        match self.channel.receive() {
            Ok(Incoming::Empty) => return false,
            Ok(Incoming::Packet { bytes, descriptors }) => {
                match ToIncumbent::from_packet(&bytes, descriptors.len()) {
                    Ok(message) => {
                        read(&message);
                        self.machine.handle(now, message);
                    }
                    Err(error) => self.machine.handle_nonsense(error),
                }
            }
            Ok(Incoming::Closed) => {
                self.channel_closed = true;
                self.closed(now);
            }
            Err(error) => {
                self.channel_closed = true;
                self.machine.handle_nonsense(error);
            }
        }
        !self.channel_closed
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let blocked = self.blocked.as_ref().map(|(_, when)| *when);
        [self.machine.deadline(), blocked].into_iter().flatten().min()
    }

    fn send(&mut self, now: Instant, message: ToSuccessor) {
        if let ToSuccessor::Batch { ids } = message {
            self.want = Some(Want::Batch(ids));
            return;
        }
        let attached = match &message {
            ToSuccessor::Offer => self.offered.as_ref().map(|offered| offered.memfd.as_fd()),
            ToSuccessor::Freeze => self.delta.as_ref().map(AsFd::as_fd),
            _ => None,
        };
        let descriptors: Vec<BorrowedFd<'_>> = attached.into_iter().collect();
        match self.channel.send(&message.to_packet(), &descriptors) {
            Ok(()) => {
                sent(&message);
                if matches!(message, ToSuccessor::Offered) {
                    self.busy_poll.check_load();
                }
            }
            Err(error @ (SendError::Full | SendError::InFlight { .. })) => {
                // Behind an Abort that does not fit nothing may happen: a successor that does not read is ended.
                if matches!(message, ToSuccessor::Abort { .. }) {
                    let _ = self.successor.kill();
                }
                self.try_again(now, message, &error);
            }
            Err(error) => self.send_failed(now, error),
        }
    }

    /// There was no room for a packet. That the user's other processes take it all is worth a line: the successor is not to blame.
    fn try_again(&mut self, now: Instant, message: ToSuccessor, error: &SendError) {
        if matches!(error, SendError::InFlight { .. }) && !self.waits_for_others {
            self.waits_for_others = true;
            tracing::warn!(successor = %self.successor, peer_pid = self.successor.pid, %error, "the takeover waits");
        }
        self.blocked = Some((message, now + RETRY));
    }

    /// The channel has ended. Where the successor's exit cannot be seen, that has to stand for it.
    fn closed(&mut self, now: Instant) {
        self.machine.handle_closed();
        if self.successor.pidfd().is_none() {
            self.machine.handle_exited(now);
        }
    }

    fn send_failed(&mut self, now: Instant, error: SendError) {
        // What the successor sent before it closed says more than the failed send: read it first.
        self.receive_all(now);
        match error {
            SendError::Closed => self.closed(now),
            error => self.machine.abort(format_args!("cannot send to the successor: {error}")),
        }
    }
}

/// The points that lie behind the reading of a message.
fn read(message: &ToIncumbent) {
    match message {
        ToIncumbent::Accept => crash::reach(Point::AcceptRead),
        ToIncumbent::Taken => crash::reach(Point::TakenRead),
        ToIncumbent::Credit | ToIncumbent::Ready | ToIncumbent::Abort { .. } => {}
    }
}

/// The points that lie behind the sending of a message.
fn sent(message: &ToSuccessor) {
    match message {
        ToSuccessor::Offer => crash::reach(Point::OfferBegun),
        ToSuccessor::Offered => crash::reach(Point::OfferSent),
        ToSuccessor::Freeze => crash::reach(Point::DeltaSent),
        ToSuccessor::Released => crash::reach(Point::ReleasedSent),
        ToSuccessor::Abort { .. } => crash::reach(Point::AbortSent),
        ToSuccessor::Batch { .. } => {}
    }
}
