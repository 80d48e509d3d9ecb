//! The connections of everybody in the room: what they say goes in, what they are to hear goes out.
//!
//! Nobody waits for anybody: what a client does not take at once waits in its outbox, and who has more than the backlog in it
//! is cut off. Each turn reads from each client once at most, so that one who talks much does not keep the others from being
//! heard.
//!
//! Where there is a [journal](RoomJournal), nothing is lost or repeated if this process is killed, at whatever moment:
//!
//! - What a client has sent is looked at, written down, and only then taken from its socket. Killed in between, the next
//!   process takes it.
//! - Everything else that happens is written down too before anything comes of it. Killed after that, it has happened: the next
//!   process does what comes of it. Killed before, it happens then, or something else does.
//! - What is sent follows from what is written down. How much of it was sent is known to the kernel.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::mem;
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use heirloom::ItemId;
use mio::Registry;

use super::client::{Client, name};
use super::connection::Connection;
use super::event::{Counted, Event};
use super::journal::RoomJournal;
use super::room::Room;

/// How much is read from one client before the others have their turn.
const SHARE: usize = 64 * 1024;
/// How long a client that has nothing more to say may take to hear the rest.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// A room, with everybody in it connected.
#[derive(Debug)]
pub(super) struct Switchboard {
    registry: Registry,
    backlog: usize,
    room: Room,
    journal: Option<RoomJournal>,
    /// One for each client in the room.
    connections: BTreeMap<ItemId, Connection>,
    /// Who is leaving, and until when the rest is sent.
    leave_until: BTreeMap<ItemId, Instant>,
    /// Who may have said something that has not been read.
    ready: BTreeSet<ItemId>,
    /// Who is to be cut off, since too much is unsent.
    too_slow: BTreeSet<ItemId>,
    /// Whether something may be in an outbox that has not been tried.
    unflushed: bool,
    /// Whether somebody came or went since [`Switchboard::take_changed`].
    changed: bool,
    /// Whose connections were ended since [`Switchboard::take_ended`].
    ended: Vec<ItemId>,
    buffer: Vec<u8>,
}

impl Switchboard {
    /// For a room in which nobody is connected yet. Connections are watched by this registry's poller.
    pub(super) fn new(registry: Registry, backlog: usize, room: Room) -> Switchboard {
        Switchboard {
            registry,
            backlog,
            room,
            journal: None,
            connections: BTreeMap::new(),
            leave_until: BTreeMap::new(),
            ready: BTreeSet::new(),
            too_slow: BTreeSet::new(),
            unflushed: false,
            changed: true,
            ended: Vec::new(),
            buffer: vec![0; SHARE],
        }
    }

    /// Connects a client that is in the room. The poller watches it already.
    pub(super) fn resume(&mut self, id: ItemId, connection: Connection) {
        if self.room.client(id).is_some_and(Client::is_leaving) {
            self.leave_until.insert(id, Instant::now() + LEAVE_WITHIN);
        }
        self.connections.insert(id, connection);
        self.unflushed = true;
    }

    /// Writes the room down as it is, and from here on what happens.
    pub(super) fn write_down(&mut self, mut journal: RoomJournal) -> io::Result<()> {
        journal.checkpoint(&self.room)?;
        self.journal = Some(journal);
        Ok(())
    }

    /// Somebody has connected, with a socket that is non-blocking. Its id is none that was there before.
    pub(super) fn join(&mut self, id: ItemId, socket: TcpStream, address: String) -> io::Result<()> {
        let connection = Connection::new(socket);
        let counted = if self.journal.is_some() { connection.count()? } else { Counted::default() };
        connection.register(&self.registry, id)?;
        self.connections.insert(id, connection);
        self.changed = true;
        tracing::debug!(user = name(id), address, "connected");
        self.happen(&Event::Joined { id, address, counted });
        Ok(())
    }

    /// The poller has told something of a client. One that has ended meanwhile is nobody.
    pub(super) fn hear_of(&mut self, id: ItemId, readable: bool, writable: bool) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if writable {
            connection.unblock();
            self.unflushed = true;
        }
        if readable && !self.leave_until.contains_key(&id) {
            self.ready.insert(id);
        }
    }

    /// Reads from each client that has said something, once, and sends to everybody what can be sent.
    pub(super) fn turn(&mut self, now: Instant) {
        for id in mem::take(&mut self.ready) {
            self.hear(id, now);
        }
        while let Some(id) = self.too_slow.pop_first() {
            self.cut_off(id);
        }
        if mem::take(&mut self.unflushed) {
            self.flush();
        }
        self.see_off(now);
        self.write_with(|journal, room| journal.tidy(room));
    }

    /// Whether another turn has something to do at once.
    pub(super) fn has_more(&self) -> bool {
        !self.ready.is_empty() || !self.too_slow.is_empty() || self.unflushed
    }

    /// When a turn has something to do though nothing has happened.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.leave_until.values().min().copied()
    }

    /// A client that is in the room and has no connection any more leaves.
    pub(super) fn lose(&mut self, id: ItemId) {
        if self.room.client(id).is_some_and(|client| !client.is_leaving()) {
            self.happen(&Event::Left { id });
        }
        self.happen(&Event::Gone { id, heard: false });
        self.gone(id);
    }

    /// From here on nobody is heard: outboxes only become emptier. What clients send is still read, and dropped.
    pub(super) fn close(&mut self) {
        self.happen(&Event::Closed);
    }

    /// How many bytes are unsent.
    pub(super) fn unsent(&self) -> usize {
        self.room.clients().map(|client| client.outbox().len()).sum()
    }

    /// Ends every connection; those to which something is unsent in the middle.
    pub(super) fn end(&mut self) {
        for (id, connection) in mem::take(&mut self.connections) {
            if self.room.client(id).is_some_and(|client| client.outbox().is_empty()) {
                connection.drain(&mut self.buffer);
                connection.end(&self.registry);
            } else {
                connection.reset(&self.registry);
            }
            self.ended.push(id);
        }
    }

    /// [Ends](Switchboard::end) every connection, and begins with an empty room.
    pub(super) fn reopen(mut self) -> Switchboard {
        self.flush();
        self.end();
        let room = Room::new(self.room.next_id(), self.room.counters());
        Switchboard { ended: self.ended, ..Switchboard::new(self.registry, self.backlog, room) }
    }
}

/// What there is to be shown, stored and handed over.
impl Switchboard {
    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(super) fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        self.connections.get(&id).map(Connection::descriptor)
    }

    pub(super) fn journal(&self) -> Option<&RoomJournal> {
        self.journal.as_ref()
    }

    /// Whether somebody came or went since this was last asked.
    pub(super) fn take_changed(&mut self) -> bool {
        mem::take(&mut self.changed)
    }

    /// The connection of somebody who is not in the room has ended.
    pub(super) fn forget(&mut self, id: ItemId) {
        self.ended.push(id);
    }

    /// Whose connections were ended since this was last asked.
    pub(super) fn take_ended(&mut self) -> Vec<ItemId> {
        mem::take(&mut self.ended)
    }

    /// Another process may serve from here on, which may know nothing of the journal.
    pub(super) fn hand_over(&mut self) {
        self.write_with(RoomJournal::hand_over);
    }

    /// It does not serve.
    pub(super) fn keep(&mut self) {
        self.write_with(|journal, _| journal.keep());
    }
}

impl Switchboard {
    /// Lets something happen: it is written down, and then it has.
    fn happen(&mut self, event: &Event<'_>) {
        self.write_with(|journal, _| journal.append(event));
        let more = self.room.happen(event);
        if more > 0 {
            self.unflushed = true;
            self.find_slow(event.id(), self.backlog.saturating_add(more));
        }
    }

    /// Finds who has more unsent than it may, though it was tried to send it.
    fn find_slow(&mut self, except: Option<ItemId>, limit: usize) {
        let over = |client: &&Client| client.outbox().len() > limit && Some(client.id()) != except;
        let over: Vec<ItemId> = self.room.listeners().filter(over).map(Client::id).collect();
        for id in over {
            // The poller may not have been asked for a while. An error shows at the next flush.
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.unblock();
            }
            let _ = self.send(id);
            if self.room.client(id).is_some_and(|client| client.outbox().len() > limit) {
                self.too_slow.insert(id);
            }
        }
    }

    /// Reads once from a client.
    fn hear(&mut self, id: ItemId, now: Instant) {
        let Some(connection) = self.connections.get(&id) else { return };
        let Some(client) = self.room.client(id).filter(|client| !client.is_leaving()) else { return };
        // When nobody is heard any more, nothing is written down of it.
        let peeks = self.journal.is_some() && !self.room.is_closed();
        let mut buffer = mem::take(&mut self.buffer);
        let read = if peeks { connection.peek(&mut buffer) } else { connection.read(&mut buffer) };
        match read {
            Ok(0) => self.leave(id, None, now),
            Ok(_) if self.room.is_closed() => drop(self.ready.insert(id)),
            Ok(count) => {
                self.happen(&Event::Said { id, bytes: Cow::Borrowed(&buffer[..count]) });
                // There may be more, of which the poller does not tell again.
                self.ready.insert(id);
                if peeks {
                    self.discard(id, &mut buffer[..count]);
                }
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock if client.is_deaf() => self.leave(id, None, now),
                ErrorKind::WouldBlock => {}
                ErrorKind::Interrupted => drop(self.ready.insert(id)),
                _ => self.leave(id, Some(error), now),
            },
        }
        self.buffer = buffer;
    }

    /// Drops what was written down.
    fn discard(&mut self, id: ItemId, bytes: &mut [u8]) {
        let Some(connection) = self.connections.get(&id) else { return };
        if let Err(error) = connection.discard(bytes) {
            // It was there a moment ago, and nobody else takes it.
            tracing::error!(user = name(id), %error, "cannot take what was read; cutting it off");
            self.too_slow.insert(id);
        }
    }

    /// A client has nothing more to say: the others get its last line, and it gets what was said until now.
    fn leave(&mut self, id: ItemId, error: Option<io::Error>, now: Instant) {
        match error {
            Some(error) => tracing::debug!(user = name(id), %error, "disconnected"),
            None => tracing::debug!(user = name(id), "disconnected"),
        }
        self.happen(&Event::Left { id });
        self.leave_until.insert(id, now + LEAVE_WITHIN);
    }

    /// A client does not read what it asked for: it is not to cost more memory.
    fn cut_off(&mut self, id: ItemId) {
        // Who has left meanwhile hears nothing more.
        let Some(client) = self.room.client(id).filter(|client| !client.is_leaving()) else { return };
        let Some(connection) = self.connections.remove(&id) else { return };
        tracing::warn!(
            user = client.name(),
            address = client.address(),
            unsent = client.outbox().len(),
            "cut off, since it does not read"
        );
        self.happen(&Event::CutOff { id });
        connection.reset(&self.registry);
        self.gone(id);
    }

    /// Sends to everybody what can be sent.
    fn flush(&mut self) {
        let waiting = self.room.clients().filter(|client| !client.outbox().is_empty());
        for id in waiting.map(Client::id).collect::<Vec<ItemId>>() {
            let sent = self.send(id);
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if let Err(error) = sent.and_then(|()| connection.ask(&self.registry, id)) {
                tracing::debug!(user = name(id), %error, "cannot send");
                self.room.deafen(id);
                // What it has said before is to be heard; then it leaves.
                self.ready.insert(id);
            }
        }
    }

    /// Sends to a client what the kernel takes.
    fn send(&mut self, id: ItemId) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        while let Some(client) = self.room.client(id) {
            match connection.send(client.outbox())? {
                0 => break,
                sent => self.room.sent(id, sent),
            }
        }
        Ok(())
    }

    /// Ends the connections of those who leave and have heard everything, or do not listen.
    fn see_off(&mut self, now: Instant) {
        let heard = |id: &ItemId| self.room.client(*id).is_none_or(|client| client.outbox().is_empty());
        let over: Vec<(ItemId, bool)> = self
            .leave_until
            .iter()
            .map(|(&id, &until)| (id, heard(&id), until))
            .filter(|&(_, heard, until)| heard || until <= now)
            .map(|(id, heard, _)| (id, heard))
            .collect();
        for (id, heard) in over {
            self.leave_until.remove(&id);
            let Some(connection) = self.connections.remove(&id) else { continue };
            if !heard {
                let unsent = self.room.client(id).map_or(0, |client| client.outbox().len());
                tracing::warn!(
                    user = name(id),
                    unsent,
                    "cut off: it left, and does not read what it is still to hear"
                );
            }
            self.happen(&Event::Gone { id, heard });
            if heard {
                connection.end(&self.registry);
            } else {
                connection.reset(&self.registry);
            }
            self.gone(id);
        }
    }

    fn gone(&mut self, id: ItemId) {
        self.changed = true;
        self.forget(id);
    }

    /// Writes in the journal, if there is one. One that cannot be written any more is given up: it must not be believed later.
    fn write_with(&mut self, write: impl FnOnce(&mut RoomJournal, &Room) -> io::Result<()>) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = write(journal, &self.room)
        {
            tracing::error!(%error, "cannot write the journal: a kill of this process would end all connections");
            self.journal = None;
        }
    }
}
