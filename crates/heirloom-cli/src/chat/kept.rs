//! What the client keeps in the store, so that a process that is killed takes nothing with it.
//!
//! Kept are the connection, both ends of the two pipes, stdin, stdout and the note of what is being written; and the state, in
//! which there are no bytes on their way. All of it is compared with the pump between two turns: what is new is put, what
//! has ended is removed. Until the store holds them, neither the streams nor the connection is touched.
//!
//! A process that ends in order takes its stdin and stdout out of the store, and leaves the connection and the pipes: whoever
//! started it decides whether there will be a next one (a restart) or not (then the store ends, and the connection with it).

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use heirloom::notify::{Message, Notifier, watchdog_interval};
use heirloom::store::{LEDGER_NAME, Store, StoreError};
use heirloom::{Bundle, BundleError, Cbor, Codec, Entry, Incumbent, ItemId, Kind, TakenBy};
use heirloom_sys::tcp_counters;
use serde::{Deserialize, Serialize};

use super::items::{Items, Part, Travels};
use super::pump::{Pump, PumpState};
use super::reconnect::Reconnect;
use crate::reloads::Reloads;

/// How long the supervisor may take to read the last that it is told.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// The store, and what is in it of the client's.
pub(super) struct Kept {
    store: Store,
    /// Under which id the ledger is handed over.
    ledger: ItemId,
    saved: PumpState,
    /// Whose state it is: that of a service at another address is of no use.
    service: String,
    /// What there was already, and the store does not hold: an incumbent without one had it.
    unput: Vec<(Part, ItemId)>,
    /// What could not be put. It is served all the same, and lost with the process.
    unkept: Vec<ItemId>,
    watchdog: Option<Watchdog>,
    reloads: Reloads,
    status: &'static str,
}

/// When the supervisor is to hear of us.
struct Watchdog {
    every: Duration,
    next: Instant,
}

/// The state as it is kept: that of the pump at one moment, and what the kernel had counted by then.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Saved {
    pump: PumpState,
    /// Bytes read from and written to the connection, if there was one.
    counted: Option<(u64, u64)>,
    /// The service's name.
    service: String,
}

impl Saved {
    /// What was kept last; what a new service has, if nothing was.
    pub(super) fn read(bundle: &Bundle) -> Result<Saved, BundleError> {
        Ok(bundle.state()?.unwrap_or_default())
    }

    /// Whether it is the state of another service than this, such as one with another server.
    pub(super) fn is_of_another(&self, service: &str) -> bool {
        !self.service.is_empty() && self.service != service
    }

    /// The number of the connection at that time.
    pub(super) fn connection_id(&self) -> u64 {
        self.pump.connection_id
    }

    /// The state, with the bytes that the connection has carried since.
    pub(super) fn until_now(self, connection: Option<&TcpStream>) -> PumpState {
        let mut state = self.pump;
        let now = connection.and_then(|connection| counted(connection.as_fd()));
        if let (Some((read, written)), Some(now)) = (self.counted, now) {
            state.bytes_in = state.bytes_in.saturating_add(now.0.saturating_sub(read));
            state.bytes_out = state.bytes_out.saturating_add(now.1.saturating_sub(written));
        }
        state
    }
}

impl Kept {
    /// Goes on with a store. `ledger` is the id of its ledger among the items; `left` is what another process has left, which may
    /// have had no store.
    pub(super) fn new(store: Store, ledger: ItemId, service: String, mut left: Vec<(Part, ItemId)>) -> Self {
        left.retain(|(_, id)| !store.holds(*id));
        let watchdog =
            watchdog_interval().map(|interval| Watchdog { every: interval / 2, next: Instant::now() });
        let (saved, unkept) = (PumpState::default(), Vec::new());
        let (reloads, status) = (Reloads::default(), "");
        Kept { store, ledger, saved, service, unput: left, unkept, watchdog, reloads, status }
    }

    /// Says that the service is there; of one that was `handed_over` also which process it is.
    pub(super) fn ready(&mut self, handed_over: bool) {
        let message = Message::new().ready();
        self.store.notify(if handed_over { message.main_pid(std::process::id()) } else { message });
    }

    pub(super) fn stopping(&mut self) {
        self.store.notify(Message::new().stopping());
    }

    pub(super) fn status(&mut self, status: &'static str) {
        self.status = status;
        self.store.notify(Message::new().status(&self.reloads.status(status)));
    }

    /// Tells of takeovers what is to be told.
    pub(super) fn tell<A>(&mut self, incumbent: &Incumbent<A>) {
        for message in self.reloads.turn(incumbent) {
            self.store.notify(message.status(&self.reloads.status(self.status)));
        }
    }

    /// Removes what nobody has any more.
    pub(super) fn remove(&mut self, ids: impl IntoIterator<Item = ItemId>) {
        for id in ids {
            report(self.store.remove(id));
        }
    }

    /// Saves the state if it has changed, removes what has ended and puts what is new; lets the pump use what the store holds
    /// by now.
    pub(super) fn update(
        &mut self,
        pump: &mut Pump,
        items: &Items,
        new: &[(Part, ItemId)],
        ended: Vec<ItemId>,
    ) {
        self.save(pump);
        self.remove(ended);
        for &(part, id) in std::mem::take(&mut self.unput).iter().chain(new) {
            if let Some(descriptor) = items.descriptor(pump, id) {
                let put = self.store.put(part.entry(id), descriptor);
                self.unkept.extend(put.is_err().then_some(id));
                report(put);
            }
        }
        self.store.flush();
        let connection = items.id(Part::Server(pump.connection_id()));
        if connection.is_some_and(|id| self.holds(id)) {
            pump.connection_is_held();
        }
    }

    /// Whether the store holds the pipes and the standard streams.
    pub(super) fn holds_streams(&self, items: &Items) -> bool {
        let mut streams = items.that_travel(Travels::Late).chain(items.that_travel(Travels::Never));
        streams.all(|id| self.holds(id))
    }

    /// Whether an item survives this process, or nothing can be done about it.
    fn holds(&self, id: ItemId) -> bool {
        self.store.holds(id) || self.unkept.contains(&id)
    }

    fn save(&mut self, pump: &Pump) {
        let mut state = pump.state();
        // What is counted all the time would be written all the time: the kernel counts it too.
        (state.bytes_in, state.bytes_out) = (self.saved.bytes_in, self.saved.bytes_out);
        if state == self.saved {
            return;
        }
        (state.bytes_in, state.bytes_out) = (pump.bytes_in(), pump.bytes_out());
        let saved = self.saved_of(pump, state);
        self.set(&saved);
        self.saved = saved.pump;
    }

    fn saved_of(&self, pump: &Pump, state: PumpState) -> Saved {
        Saved { counted: pump.socket().and_then(counted), pump: state, service: self.service.clone() }
    }

    fn set(&mut self, saved: &Saved) {
        match Cbor::encode(saved) {
            Ok(state) => report(self.store.set_state(&state)),
            Err(error) => tracing::error!(%error, "cannot write the state down for the store"),
        }
    }

    /// What to poll for writing, if the supervisor has not taken everything.
    pub(super) fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        self.store.is_waiting().then(|| self.store.as_fd())
    }

    /// When it has to be told again that we are alive.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.watchdog.as_ref().map(|watchdog| watchdog.next)
    }

    /// Tells the supervisor that we are alive, if it is time.
    pub(super) fn show_life(&mut self, now: Instant) {
        if let Some(watchdog) = self.watchdog.as_mut().filter(|watchdog| watchdog.next <= now) {
            watchdog.next = now + watchdog.every;
            // One that waits already says the same.
            if !self.store.is_waiting() {
                self.store.notify(Message::new().watchdog());
            }
        }
    }

    /// The ledger as an item that is handed over.
    pub(super) fn ledger(&self) -> (Entry, BorrowedFd<'_>) {
        let entry = Entry { id: self.ledger, name: LEDGER_NAME.into(), kind: Kind::Memfd, state: Vec::new() };
        (entry, self.store.ledger())
    }

    /// Whether somebody keeps what is left.
    pub(super) fn is_left(&self) -> bool {
        self.store.has_supervisor()
    }

    /// Ends in order: the next process has a stdin and a stdout of its own, and tries anew to connect.
    pub(super) fn leave(mut self, pump: &Pump, items: &Items) {
        let mut state = pump.state();
        state.reconnect = Reconnect::default();
        self.set(&self.saved_of(pump, state));
        self.remove(items.that_travel(Travels::Never));
        if !self.store.settle(LEAVE_WITHIN) {
            tracing::error!("the supervisor does not read what it is told: the connection may end");
        }
    }

    /// Another process serves. The supervisor is told which, as the last thing; of one that is not its own it is told nothing.
    pub(super) fn hand_over(self, by: &TakenBy) {
        if by.outsider {
            return self.store.abandon(LEAVE_WITHIN);
        }
        // Past what the store has not sent: nothing else is this process's business any more.
        let supervisor = Notifier::from_environment();
        let message = by.pid.map(|pid| Message::new().main_pid(pid));
        let told =
            supervisor.and_then(|it| it.zip(message).map(|(it, message)| it.send(&message)).transpose());
        if let Err(error) = told {
            tracing::warn!(%error, "the supervisor is not told of the successor");
        }
    }

    /// Ends for good, or lets a program go on that knows no store: nothing is left.
    pub(super) fn end(mut self, items: &Items) {
        self.set(&Saved::default());
        let all = [Travels::Early, Travels::Late, Travels::Never];
        self.remove(all.into_iter().flat_map(|travels| items.that_travel(travels)));
        self.store.settle(LEAVE_WITHIN);
    }
}

fn counted(connection: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let counters = tcp_counters(connection).ok()?;
    Some((counters.consumed(), counters.written()))
}

fn report(result: Result<(), StoreError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a kill of this process would lose something");
    }
}
