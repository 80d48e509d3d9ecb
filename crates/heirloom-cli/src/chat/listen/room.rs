//! Who is connected, and who hears what.
//!
//! Everybody hears what anybody else says, line by line, and who comes and goes. Nobody waits for anybody: what a client
//! does not take at once waits in its outbox, and who has more than the backlog in it is cut off. Each turn reads from
//! each client once at most, so that one who talks much does not keep the others from being heard.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use heirloom::ItemId;
use mio::Registry;

use super::client::{Client, Heard, Offered, name};

/// How much is read from one client before the others have their turn.
const SHARE: usize = 64 * 1024;
/// How long a client that has nothing more to say may take to hear the rest.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// Everybody who is connected.
pub(super) struct Room {
    registry: Registry,
    backlog: usize,
    next_id: ItemId,
    clients: BTreeMap<ItemId, Client>,
    /// Who has nothing more to say and hears nothing new, and until when the rest is sent.
    leaving: BTreeMap<ItemId, (Client, Instant)>,
    /// Who may have said something that has not been read.
    ready: BTreeSet<ItemId>,
    /// Who did not get something, since too much is unsent.
    too_slow: BTreeSet<ItemId>,
    /// Whether something may be in an outbox that has not been tried.
    unflushed: bool,
    /// Nobody is heard any more.
    closing: bool,
    /// Whether somebody came or went since [`Room::take_changed`].
    changed: bool,
    counters: Counters,
    buffer: Vec<u8>,
}

/// What has passed through, in all generations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) lines_in: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
}

impl Room {
    /// An empty room, whose next client has this id. Its clients are watched by this registry's poller.
    pub(super) fn new(registry: Registry, backlog: usize, next_id: ItemId, counters: Counters) -> Room {
        Room {
            registry,
            backlog,
            next_id,
            clients: BTreeMap::new(),
            leaving: BTreeMap::new(),
            ready: BTreeSet::new(),
            too_slow: BTreeSet::new(),
            unflushed: false,
            closing: false,
            changed: true,
            counters,
            buffer: vec![0; SHARE],
        }
    }

    /// Puts a client in that was here before, as if it had never been away. The poller watches it already.
    pub(super) fn resume(&mut self, id: ItemId, client: Client, leaving: bool) {
        if leaving {
            self.leaving.insert(id, (client, Instant::now() + LEAVE_WITHIN));
        } else {
            self.clients.insert(id, client);
        }
        self.unflushed = true;
    }

    /// Somebody has connected, with a socket that is non-blocking.
    pub(super) fn join(&mut self, socket: TcpStream, address: String) -> io::Result<()> {
        let id = self.next_id;
        let client = Client::new(id, socket, address);
        // Where the counting began is what another process said.
        let next = id.0.checked_add(1).ok_or_else(|| io::Error::other("no user number is left"))?;
        client.register(&self.registry)?;
        self.next_id = ItemId(next);
        let here: Vec<String> =
            self.clients.values().map(|c| format!("{} as <{}>", c.address(), c.name())).collect();
        let here = if here.is_empty() { "nobody".to_owned() } else { here.join(", ") };
        tracing::debug!(user = client.name(), address = client.address(), "connected");
        let announcement = format!("<announce> {} is connected as <{}>.\n", client.address(), client.name());
        self.clients.insert(id, client);
        self.changed = true;
        self.say(None, announcement.into_bytes());
        self.tell(id, format!("<announce> already connected: {here}.\n").into_bytes());
        Ok(())
    }

    /// The poller has told something of a client. One that has ended meanwhile is nobody.
    pub(super) fn hear_of(&mut self, id: ItemId, readable: bool, writable: bool) {
        if readable && self.clients.contains_key(&id) {
            self.ready.insert(id);
        }
        let leaving = self.leaving.get_mut(&id).map(|(client, _)| client);
        if writable && let Some(client) = self.clients.get_mut(&id).or(leaving) {
            client.unblock();
            self.unflushed = true;
        }
    }

    /// Reads from each client that has said something, once, and sends to everybody what can be sent.
    pub(super) fn turn(&mut self, now: Instant) {
        for id in std::mem::take(&mut self.ready) {
            self.hear(id, now);
        }
        while let Some(id) = self.too_slow.pop_first() {
            self.cut_off(id);
        }
        if std::mem::take(&mut self.unflushed) {
            self.flush();
        }
        self.see_off(now);
    }

    /// Whether another turn has something to do at once.
    pub(super) fn has_more(&self) -> bool {
        !self.ready.is_empty() || !self.too_slow.is_empty() || self.unflushed
    }

    /// When a turn has something to do though nothing has happened.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.leaving.values().map(|(_, until)| *until).min()
    }

    /// From here on nobody is heard: outboxes only become emptier. What clients send is still read, and dropped.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    /// How many bytes are unsent.
    pub(super) fn unsent(&self) -> usize {
        self.all().map(|(_, client, _)| client.outbox().len()).sum()
    }

    /// Ends every connection; those to which something is unsent in the middle.
    pub(super) fn end(&mut self) {
        let leaving = std::mem::take(&mut self.leaving).into_values().map(|(client, _)| client);
        for mut client in std::mem::take(&mut self.clients).into_values().chain(leaving) {
            if client.outbox().is_empty() {
                client.drain(&mut self.buffer);
                client.end(&self.registry);
            } else {
                client.reset(&self.registry);
            }
        }
    }
}

/// What there is to be shown and handed over.
impl Room {
    /// Everybody, in the order of their ids, and whether they are leaving.
    pub(super) fn all(&self) -> impl Iterator<Item = (ItemId, &Client, bool)> {
        let mut all: Vec<_> = self.clients.iter().map(|(&id, client)| (id, client, false)).collect();
        all.extend(self.leaving.iter().map(|(&id, (client, _))| (id, client, true)));
        all.sort_unstable_by_key(|&(id, ..)| id);
        all.into_iter()
    }

    pub(super) fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        let leaving = || self.leaving.get(&id).map(|(client, _)| client);
        self.clients.get(&id).or_else(leaving).map(Client::descriptor)
    }

    /// How many can hear what is said.
    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// The id of the client that comes next.
    pub(super) fn next_id(&self) -> ItemId {
        self.next_id
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether somebody came or went since this was last asked.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}

impl Room {
    /// Reads once from a client.
    fn hear(&mut self, id: ItemId, now: Instant) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        match client.read(&mut self.buffer) {
            Heard::Nothing => {}
            Heard::Said { bytes, lines, text } => {
                add(&mut self.counters.bytes_in, bytes as u64);
                // There may be more, of which the poller does not tell again.
                self.ready.insert(id);
                if !self.closing {
                    add(&mut self.counters.lines_in, lines);
                    self.say(Some(id), text);
                }
            }
            Heard::Ended(error) => self.leave(id, error, now),
        }
    }

    /// A client has nothing more to say: the others get its last line, and it gets what was said until now.
    fn leave(&mut self, id: ItemId, error: Option<io::Error>, now: Instant) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        match error {
            Some(error) => tracing::debug!(user = client.name(), %error, "disconnected"),
            None => tracing::debug!(user = client.name(), "disconnected"),
        }
        let last_words = client.last_words();
        self.leaving.insert(id, (client, now + LEAVE_WITHIN));
        self.unflushed = true;
        if !self.closing {
            add(&mut self.counters.lines_in, u64::from(!last_words.is_empty()));
            self.say(None, last_words);
            self.announce_end(id);
        }
    }

    /// A client does not read what it asked for: it is not to cost more memory.
    fn cut_off(&mut self, id: ItemId) {
        let Some(client) = self.clients.remove(&id) else { return };
        tracing::warn!(
            user = client.name(),
            address = client.address(),
            unsent = client.outbox().len(),
            "cut off, since it does not read"
        );
        client.reset(&self.registry);
        self.changed = true;
        self.announce_end(id);
    }

    fn announce_end(&mut self, id: ItemId) {
        self.say(None, format!("<announce> <{}> is disconnected.\n", name(id)).into_bytes());
    }

    /// Says something to everybody else.
    fn say(&mut self, from: Option<ItemId>, text: Vec<u8>) {
        if text.is_empty() {
            return;
        }
        let text = text.into();
        for (&id, client) in &mut self.clients {
            if Some(id) != from
                && !self.too_slow.contains(&id)
                && client.offer(&text, self.backlog, &mut self.counters.bytes_out) == Offered::TooSlow
            {
                self.too_slow.insert(id);
            }
        }
        self.unflushed = true;
    }

    /// Tells one something, who has only just come.
    fn tell(&mut self, id: ItemId, text: Vec<u8>) {
        if let Some(client) = self.clients.get_mut(&id)
            && client.offer(&text.into(), usize::MAX, &mut self.counters.bytes_out) == Offered::Kept
        {
            self.unflushed = true;
        }
    }

    /// Sends to everybody what can be sent.
    fn flush(&mut self) {
        let leaving = self.leaving.iter_mut().map(|(id, (client, _))| (id, client));
        for (&id, client) in self.clients.iter_mut().chain(leaving) {
            let flushed = client.flush(&mut self.counters.bytes_out);
            if let Err(error) = flushed.and_then(|()| client.ask(&self.registry)) {
                tracing::debug!(user = client.name(), %error, "cannot send");
                client.deafen();
                // What it has said before is to be heard; then it leaves.
                self.ready.insert(id);
            }
        }
    }

    /// Ends the connections of those who leave and have heard everything, or do not listen.
    fn see_off(&mut self, now: Instant) {
        let over = |(client, until): &(Client, Instant)| client.outbox().is_empty() || *until <= now;
        let over: Vec<ItemId> =
            self.leaving.iter().filter(|(_, leaving)| over(leaving)).map(|(&id, _)| id).collect();
        for (client, _) in over.iter().filter_map(|id| self.leaving.remove(id)) {
            self.changed = true;
            if client.outbox().is_empty() {
                client.end(&self.registry);
            } else {
                let (user, unsent) = (client.name(), client.outbox().len());
                tracing::warn!(user, unsent, "cut off: it left, and does not read what it is still to hear");
                client.reset(&self.registry);
            }
        }
    }
}

/// Counts on from where another process has begun, which may be anywhere.
fn add(counter: &mut u64, more: u64) {
    *counter = counter.saturating_add(more);
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A room whose numbers another process has brought to their end.
    #[test]
    fn without_a_user_number_nobody_joins_and_counters_stay_at_their_end() {
        let poll = mio::Poll::new().unwrap();
        let counters = Counters { lines_in: u64::MAX, bytes_in: u64::MAX - 1, bytes_out: u64::MAX };
        let registry = poll.registry().try_clone().unwrap();
        let mut room = Room::new(registry, 1000, ItemId(u64::MAX - 1), counters);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            ours.set_nonblocking(true).unwrap();
            (ours, listener.accept().unwrap().0)
        };
        let (last, mut theirs) = connect();
        room.join(last, "somewhere".into()).unwrap();
        let (one_more, _theirs) = connect();
        let error = room.join(one_more, "elsewhere".into()).unwrap_err();
        assert!(error.to_string().contains("no user number is left"), "{error}");
        assert_eq!(room.len(), 1);

        io::Write::write_all(&mut theirs, b"one\ntwo\n").unwrap();
        let started = Instant::now();
        while room.counters().bytes_in < u64::MAX {
            assert!(started.elapsed() < Duration::from_secs(60), "waited for too long");
            room.hear_of(ItemId(u64::MAX - 1), true, true);
            room.turn(Instant::now());
        }
        assert_eq!(room.counters(), Counters { lines_in: u64::MAX, bytes_in: u64::MAX, bytes_out: u64::MAX });
    }
}
