//! What becomes of the server if it is killed: the store's side of it, and everything that the supervisor is told.
//!
//! In the store are the listener, the journal and each client's connection. A connection is put there before its client joins,
//! so that the only one that a kill can end is one that is just between the two. What has ended is taken out after it was shut
//! down or reset: the next process finds it in the journal as gone, and does both.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use heirloom::notify::{Message, watchdog_interval};
use heirloom::store::{LEDGER_NAME, Store};
use heirloom::{CodecError, Entry, Incumbent, ItemId, Kind, TakenBy};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::handover::{JOURNAL_NAME, listener_entry, stored_entry};
use super::ids::Ids;
use super::switchboard::Switchboard;
use crate::reloads::Reloads;

/// How often the supervisor is told of how many there are, at most.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// How long the supervisor may take to read the last that it is told.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// The way to a supervisor with a store.
#[derive(Debug)]
pub(super) struct Keeper {
    store: Store,
    journal: Option<ItemId>,
    ledger: ItemId,
    /// Who has connected, and is not in the store yet. (Or never will be, for lack of memory.)
    arriving: VecDeque<Arrival>,
    /// How many clients the supervisor knows of, and since when.
    status: Option<(usize, Instant)>,
    /// How often the supervisor is to be told that we live, and when the next time is.
    watchdog: Option<(Duration, Instant)>,
    /// Whether the poller tells when the store takes more.
    registered: bool,
    reloads: Reloads,
}

#[derive(Debug)]
struct Arrival {
    id: ItemId,
    socket: TcpStream,
    address: String,
    is_put: bool,
}

impl Keeper {
    /// Puts what is not in the store yet, the journal first: without it nothing else is of use.
    pub(super) fn new(
        store: Store,
        ids: &mut Ids,
        journal: Option<ItemId>,
        listener: Option<(ItemId, BorrowedFd<'_>)>,
        switchboard: &Switchboard,
    ) -> io::Result<Keeper> {
        let ledger = ids.take()?;
        let journal = journal.map_or_else(|| ids.take(), Ok)?;
        let watchdog = watchdog_interval().map(|interval| (interval / 2, Instant::now()));
        let mut keeper = Keeper {
            store,
            journal: Some(journal),
            ledger,
            arriving: VecDeque::new(),
            status: None,
            watchdog,
            registered: false,
            reloads: Reloads::default(),
        };
        if let Some(file) = switchboard.journal() {
            keeper.put(Ok(journal_entry(journal)), file.as_fd());
        }
        if let Some((id, listener)) = listener {
            keeper.put(Ok(listener_entry(id)), listener);
        }
        for client in switchboard.room().clients() {
            if let Some(connection) = switchboard.descriptor(client.id()) {
                keeper.put(stored_entry(client.id(), client.address()), connection);
            }
        }
        Ok(keeper)
    }

    /// Puts something into the store, if it is not there. Whether that can be done.
    fn put(&mut self, entry: Result<Entry, CodecError>, descriptor: BorrowedFd<'_>) -> bool {
        let put = entry.map_err(anyhow::Error::from).and_then(|entry| match self.store.holds(entry.id) {
            true => Ok(()),
            false => Ok(self.store.put(entry, descriptor)?),
        });
        if let Err(error) = &put {
            tracing::error!(%error, "cannot put into the store: a kill of this process would end a connection");
        }
        put.is_ok()
    }

    /// Tells the supervisor that this process serves.
    pub(super) fn ready(&mut self) {
        self.store.notify(Message::new().ready().main_pid(std::process::id()));
    }

    /// Another process serves. The supervisor is told which; of one that is not its own it is told nothing.
    pub(super) fn replaced(mut self, by: &TakenBy) {
        if by.outsider {
            return self.store.abandon(LEAVE_WITHIN);
        }
        if let Some(pid) = by.pid {
            self.store.notify(Message::new().main_pid(pid));
            self.store.settle(LEAVE_WITHIN);
        }
    }

    /// Somebody has connected: it joins when the store holds its connection.
    pub(super) fn receive(&mut self, id: ItemId, socket: TcpStream, address: String) {
        let is_put = self.put(stored_entry(id, &address), socket.as_fd());
        self.arriving.push_back(Arrival { id, socket, address, is_put });
    }

    /// Lets those in whose connections the store holds, in the order in which they came.
    pub(super) fn admit(&mut self, switchboard: &mut Switchboard) {
        self.store.flush();
        while self.arriving.front().is_some_and(|first| !first.is_put || self.store.holds(first.id)) {
            let Some(Arrival { id, socket, address, .. }) = self.arriving.pop_front() else { return };
            if let Err(error) = switchboard.join(id, socket, address) {
                tracing::warn!(%error, "cannot let a client in");
                self.remove(id);
            }
        }
    }

    /// Nobody comes any more: this process is about to end, for good.
    pub(super) fn close(&mut self) {
        self.store.notify(Message::new().stopping());
        for Arrival { id, .. } in std::mem::take(&mut self.arriving) {
            self.remove(id);
        }
    }

    /// Takes out of the store what has ended, and tells the supervisor what is due.
    pub(super) fn turn(&mut self, now: Instant, switchboard: &mut Switchboard) {
        switchboard.take_ended().into_iter().for_each(|id| self.remove(id));
        if switchboard.journal().is_none()
            && let Some(id) = self.journal.take()
        {
            self.remove(id);
        }
        let clients = switchboard.room().listeners().count();
        let is_due = |(told, at): (usize, Instant)| told != clients && at + STATUS_EVERY <= now;
        if self.status.is_none_or(is_due) {
            self.store.notify(Message::new().status(&self.status_of(clients)));
            self.status = Some((clients, now));
        }
        if let Some((interval, at)) = &mut self.watchdog
            && *at <= now
        {
            *at = now + *interval;
            self.store.notify(Message::new().watchdog());
        }
        self.store.flush();
    }

    /// Tells of takeovers what is to be told.
    pub(super) fn tell<A>(&mut self, incumbent: &Incumbent<A>, clients: usize) {
        for message in self.reloads.turn(incumbent) {
            self.store.notify(message.status(&self.status_of(clients)));
        }
    }

    fn status_of(&self, clients: usize) -> String {
        self.reloads.status(&format!("clients: {clients}"))
    }

    /// When a turn has something to do though nothing has happened.
    pub(super) fn deadline(&self, clients: usize) -> Option<Instant> {
        let status = self.status.filter(|(told, _)| *told != clients).map(|(_, at)| at + STATUS_EVERY);
        [status, self.watchdog.map(|(_, at)| at)].into_iter().flatten().min()
    }

    /// Has the poller tell when the store takes more, as long as it does not take everything.
    pub(super) fn wait(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if self.store.is_waiting() == self.registered {
            return Ok(());
        }
        let number = self.store.as_fd().as_raw_fd();
        let mut source = SourceFd(&number);
        if self.registered {
            // It fails where the supervisor has gone: what was registered is closed then.
            let _ = registry.deregister(&mut source);
        } else {
            registry.register(&mut source, token, Interest::WRITABLE)?;
        }
        self.registered = !self.registered;
        Ok(())
    }

    /// Whether the store has not taken everything: then nothing can be handed over.
    pub(super) fn is_waiting(&self) -> bool {
        self.store.is_waiting()
    }

    /// Whether everything survives this process: there is a journal, and somebody who keeps it.
    pub(super) fn is_left(&self) -> bool {
        self.journal.is_some() && self.store.has_supervisor()
    }

    /// Leaves everything, and whoever is still arriving, to the next process.
    pub(super) fn leave(&mut self) {
        self.store.notify(Message::new().stopping());
        if !self.store.settle(LEAVE_WITHIN) {
            tracing::error!(
                "the supervisor does not read what it is told: connections that it was not given end"
            );
        }
    }

    /// Forgets everything: the server is stopped, and has ended its connections.
    pub(super) fn clear(&mut self, listener: ItemId, switchboard: &mut Switchboard) {
        switchboard.take_ended().into_iter().for_each(|id| self.remove(id));
        self.remove(listener);
        if let Some(id) = self.journal.take() {
            self.remove(id);
        }
        self.store.settle(LEAVE_WITHIN);
    }

    fn remove(&mut self, id: ItemId) {
        if let Err(error) = self.store.remove(id) {
            tracing::error!(%error, "cannot write in the ledger of the store");
        }
    }
}

/// What is handed over of it.
impl Keeper {
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> {
        let ledger =
            Entry { id: self.ledger, name: LEDGER_NAME.into(), kind: Kind::Memfd, state: Vec::new() };
        self.journal.map(journal_entry).into_iter().chain([ledger])
    }

    pub(super) fn descriptor<'k>(
        &'k self,
        id: ItemId,
        switchboard: &'k Switchboard,
    ) -> Option<BorrowedFd<'k>> {
        if id == self.ledger {
            return Some(self.store.ledger());
        }
        switchboard.journal().filter(|_| Some(id) == self.journal).map(AsFd::as_fd)
    }
}

fn journal_entry(id: ItemId) -> Entry {
    Entry { id, name: JOURNAL_NAME.into(), kind: Kind::Memfd, state: Vec::new() }
}
