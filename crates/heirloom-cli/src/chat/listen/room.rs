//! Who is connected, and who hears what: state alone, without a socket or a clock.
//!
//! Everybody hears what anybody else says, line by line, and who comes and goes. Whatever changes that is an [`Event`], so
//! that the same events always make the same room: a journal of them is as good as the room itself. Only how much of an outbox
//! has been sent is no event, since the kernel knows it.

use std::collections::BTreeMap;

use heirloom::ItemId;

use super::client::{Client, name};
use super::event::Event;

/// Everybody who is connected.
#[derive(Debug)]
pub(super) struct Room {
    /// Whoever comes has this id or a higher one.
    next_id: ItemId,
    clients: BTreeMap<ItemId, Client>,
    /// Nobody is heard any more.
    closed: bool,
    counters: Counters,
}

/// What has passed through, in all generations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) lines_in: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
}

impl Room {
    /// An empty room, to which nobody with a lower id ever comes.
    pub(super) fn new(next_id: ItemId, counters: Counters) -> Room {
        Room { next_id, clients: BTreeMap::new(), closed: false, counters }
    }

    /// Puts a client in that was here before, as if it had never been away.
    pub(super) fn resume(&mut self, client: Client) {
        self.clients.insert(client.id(), client);
    }

    /// Something has happened. By how many bytes those who hear of it have more to hear.
    pub(super) fn happen(&mut self, event: &Event<'_>) -> usize {
        match event {
            Event::Joined { id, address, counted } => self.join(Client::new(*id, address.clone(), *counted)),
            Event::Said { id, bytes } => self.hear(*id, bytes),
            Event::Left { id } => self.leave(*id),
            Event::CutOff { id } => match self.clients.remove(id) {
                Some(client) if !client.is_leaving() => self.announce_end(*id),
                _ => 0,
            },
            Event::Gone { id, .. } => {
                self.clients.remove(id);
                0
            }
            Event::Closed => {
                self.closed = true;
                0
            }
        }
    }

    /// So many bytes of what a client is to hear were sent.
    pub(super) fn sent(&mut self, id: ItemId, count: usize) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.sent(count);
            add(&mut self.counters.bytes_out, count as u64);
        }
    }

    /// Nothing can be sent to a client any more.
    pub(super) fn deafen(&mut self, id: ItemId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.deafen();
        }
    }
}

/// What there is to be seen.
impl Room {
    /// Everybody, in the order of their ids, also those who are leaving.
    pub(super) fn clients(&self) -> impl Iterator<Item = &Client> {
        self.clients.values()
    }

    pub(super) fn client(&self, id: ItemId) -> Option<&Client> {
        self.clients.get(&id)
    }

    /// Who hears what is said.
    pub(super) fn listeners(&self) -> impl Iterator<Item = &Client> {
        self.clients.values().filter(|client| !client.is_leaving())
    }

    pub(super) fn next_id(&self) -> ItemId {
        self.next_id
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }
}

impl Room {
    fn join(&mut self, client: Client) -> usize {
        let id = client.id();
        let here: Vec<String> =
            self.listeners().map(|c| format!("{} as <{}>", c.address(), c.name())).collect();
        let here = if here.is_empty() { "nobody".to_owned() } else { here.join(", ") };
        let announcement = format!("<announce> {} is connected as <{}>.\n", client.address(), client.name());
        self.next_id = self.next_id.max(ItemId(id.0.saturating_add(1)));
        self.clients.insert(id, client);
        let said = self.say(None, announcement.into_bytes());
        if let Some(client) = self.clients.get_mut(&id) {
            client.offer(&format!("<announce> already connected: {here}.\n").into_bytes().into());
        }
        said
    }

    fn hear(&mut self, id: ItemId, bytes: &[u8]) -> usize {
        let Some(client) = self.clients.get_mut(&id) else { return 0 };
        let (lines, text) = client.said(bytes);
        add(&mut self.counters.bytes_in, bytes.len() as u64);
        if self.closed {
            return 0;
        }
        add(&mut self.counters.lines_in, lines);
        self.say(Some(id), text)
    }

    /// A client has nothing more to say: the others get its last line, and it gets what was said until now.
    fn leave(&mut self, id: ItemId) -> usize {
        let Some(client) = self.clients.get_mut(&id) else { return 0 };
        let last_words = client.leave();
        if self.closed {
            return 0;
        }
        add(&mut self.counters.lines_in, u64::from(!last_words.is_empty()));
        self.say(None, last_words) + self.announce_end(id)
    }

    fn announce_end(&mut self, id: ItemId) -> usize {
        self.say(None, format!("<announce> <{}> is disconnected.\n", name(id)).into_bytes())
    }

    /// Says something to everybody else. How long it is.
    fn say(&mut self, from: Option<ItemId>, text: Vec<u8>) -> usize {
        if text.is_empty() {
            return 0;
        }
        let text = text.into();
        for (&id, client) in &mut self.clients {
            if Some(id) != from && !client.is_leaving() {
                client.offer(&text);
            }
        }
        text.len()
    }
}

/// Counts on from where another process has begun, which may be anywhere.
pub(super) fn add(counter: &mut u64, more: u64) {
    *counter = counter.saturating_add(more);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::listen::event::Counted;

    /// A room whose counters another process has brought to their end.
    #[test]
    fn counters_stay_at_their_end() {
        let counters = Counters { lines_in: u64::MAX, bytes_in: u64::MAX - 1, bytes_out: u64::MAX };
        let id = ItemId(u64::MAX);
        let mut room = Room::new(id, counters);
        room.happen(&Event::Joined { id, address: "somewhere".into(), counted: Counted::default() });
        room.happen(&Event::Said { id, bytes: b"one\ntwo\n"[..].into() });
        room.sent(id, 1);
        let end = Counters { lines_in: u64::MAX, bytes_in: u64::MAX, bytes_out: u64::MAX };
        assert_eq!((room.counters(), room.next_id()), (end, id));
    }
}
