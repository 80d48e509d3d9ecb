//! The journal of a room: what the next process makes the room of again, when this one is killed.
//!
//! A checkpoint is the room as it is; behind it comes each [`Event`], before anybody notices anything of it. What the journal
//! need not tell, since the kernel does: how much of what a client has sent was taken from its socket, and how much of its
//! outbox was sent ([`Counted`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use heirloom::store::Journal;
use heirloom::{Cbor, Codec, ItemId, Limits};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::event::{Counted, Event};
use super::outbox::Outbox;
use super::room::{Counters, Room};
use crate::chat::bytes;

/// The largest journal that is read: what is unsent to many may be in it, and three times that until it is tidied.
const LARGEST: usize = 4 << 30;
/// How many records are replayed before it is looked again what of their outcome was sent long ago.
const OFTEN: usize = 1000;

/// The journal of a room that is served.
#[derive(Debug)]
pub(super) struct RoomJournal(Journal);

/// What is in it. See [`Event`] for what may change.
#[derive(Debug, Serialize, Deserialize)]
enum Record<'r> {
    /// A checkpoint: texts and clients follow.
    Room {
        next_id: ItemId,
        closed: bool,
        lines_in: u64,
        bytes_in: u64,
        bytes_out: u64,
    },
    /// Something that clients are still to hear. It has a number: how many came before it since the checkpoint.
    Text {
        #[serde(with = "bytes")]
        text: Cow<'r, [u8]>,
    },
    Client(Saved),
    Event(Event<'r>),
    /// From here on another process serves, which may know nothing of this journal. When it does, it begins with a checkpoint.
    HandedOver {
        counted: Vec<(ItemId, Counted)>,
    },
    /// It does not: the one that writes this does.
    Kept,
}

/// A client in a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    id: ItemId,
    address: String,
    #[serde(with = "bytes")]
    half_line: Vec<u8>,
    leaving: bool,
    counted: Counted,
    /// The numbers of the texts that it is still to hear, and how much of the first was sent.
    texts: Vec<u64>,
    sent: u64,
}

impl RoomJournal {
    /// A new one. It counts from its first checkpoint on.
    pub(super) fn create() -> io::Result<RoomJournal> {
        Journal::create("chat").map(RoomJournal)
    }

    /// One that another process has written, and what is in it.
    pub(super) fn open(file: OwnedFd) -> anyhow::Result<(RoomJournal, Vec<Vec<u8>>)> {
        let limits = Limits { manifest_bytes: LARGEST, ..Limits::default() };
        let (journal, records) = Journal::open(file, &limits)?;
        Ok((RoomJournal(journal), records))
    }

    /// Writes down what happens. When this has returned it has happened, whatever becomes of this process.
    pub(super) fn append(&mut self, event: &Event<'_>) -> io::Result<()> {
        self.write(&Record::Event(event.clone()))?;
        #[cfg(test)]
        super::killed::appended(event);
        Ok(())
    }

    /// Writes down that another process may serve from now on, and from where.
    pub(super) fn hand_over(&mut self, room: &Room) -> io::Result<()> {
        let counted = room.clients().map(|client| (client.id(), client.counted())).collect();
        self.write(&Record::HandedOver { counted })
    }

    /// Writes down that it did not come to that.
    pub(super) fn keep(&mut self) -> io::Result<()> {
        self.write(&Record::Kept)
    }

    /// Puts the room as it is in place of everything.
    pub(super) fn checkpoint(&mut self, room: &Room) -> io::Result<()> {
        self.0.checkpoint(checkpoint(room)?)
    }

    /// Makes a checkpoint where that is worth its while.
    pub(super) fn tidy(&mut self, room: &Room) -> io::Result<()> {
        if self.0.wants_checkpoint() { self.checkpoint(room) } else { Ok(()) }
    }

    fn write(&mut self, record: &Record<'_>) -> io::Result<()> {
        self.0.append(&encode(record)?)
    }
}

impl AsFd for RoomJournal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The room as records. A text that waits for many is there once.
fn checkpoint(room: &Room) -> io::Result<Vec<Vec<u8>>> {
    let Counters { lines_in, bytes_in, bytes_out } = room.counters();
    let (next_id, closed) = (room.next_id(), room.is_closed());
    let mut records = vec![encode(&Record::Room { next_id, closed, lines_in, bytes_in, bytes_out })?];
    let mut numbers: HashMap<*const u8, u64> = HashMap::new();
    for client in room.clients() {
        let (texts, sent) = client.outbox().texts();
        let mut saved = Vec::new();
        for text in texts {
            let next = numbers.len() as u64;
            let number = *numbers.entry(text.as_ptr()).or_insert(next);
            if number == next {
                records.push(encode(&Record::Text { text: Cow::Borrowed(text) })?);
            }
            saved.push(number);
        }
        records.push(encode(&Record::Client(Saved {
            id: client.id(),
            address: client.address().into(),
            half_line: client.half_line().into(),
            leaving: client.is_leaving(),
            counted: client.counted(),
            texts: saved,
            sent: sent as u64,
        }))?);
    }
    Ok(records)
}

fn encode(record: &Record<'_>) -> io::Result<Vec<u8>> {
    Cbor::encode(record).map_err(io::Error::other)
}

/// What a journal says.
#[derive(Debug)]
pub(super) struct Replay {
    /// The room, with everything that the kernel says was sent taken out of the outboxes.
    pub(super) room: Room,
    /// How long the last thing was that a client has said, which need not have been taken from its socket.
    pub(super) last_said: BTreeMap<ItemId, u64>,
    /// Who was there and is no more, and whether it has heard everything.
    pub(super) gone: BTreeMap<ItemId, bool>,
    /// Another process may have served since, from here on.
    pub(super) handed_over: Option<BTreeMap<ItemId, Counted>>,
}

/// Makes the room again. `written` tells how much was written to a client's connection by now, as the kernel counts.
pub(super) fn replay(records: &[Vec<u8>], written: impl Fn(ItemId) -> Option<u64>) -> anyhow::Result<Replay> {
    let (first, records) = records.split_first().context("it is empty")?;
    let Record::Room { next_id, closed, lines_in, bytes_in, bytes_out } = decode(first)? else {
        return Err(anyhow!("it does not begin with a checkpoint"));
    };
    let mut room = Room::new(next_id, Counters { lines_in, bytes_in, bytes_out });
    if closed {
        room.happen(&Event::Closed);
    }
    let mut replay = Replay { room, last_said: BTreeMap::new(), gone: BTreeMap::new(), handed_over: None };
    let mut texts = Vec::new();
    for (number, record) in records.iter().enumerate() {
        match decode(record)? {
            Record::Room { .. } => return Err(anyhow!("a checkpoint is in its middle")),
            Record::Text { text } => texts.push(Arc::from(text)),
            Record::Client(saved) => replay.room.resume(saved.client(&texts)?),
            Record::Event(event) => replay.event(&event),
            Record::HandedOver { counted } => replay.handed_over = Some(counted.into_iter().collect()),
            Record::Kept => replay.handed_over = None,
        }
        if number % OFTEN == 0 {
            replay.send(&written);
        }
    }
    replay.send(&written);
    Ok(replay)
}

fn decode(record: &[u8]) -> anyhow::Result<Record<'static>> {
    Cbor::decode(record).context("a record cannot be read")
}

impl Saved {
    fn client(self, texts: &[Arc<[u8]>]) -> anyhow::Result<Client> {
        let text = |&number: &u64| usize::try_from(number).ok().and_then(|number| texts.get(number)).cloned();
        let unsent: Option<Vec<Arc<[u8]>>> = self.texts.iter().map(text).collect();
        let unsent = unsent.context("a text is missing")?;
        let outbox = Outbox::of(unsent, usize::try_from(self.sent)?);
        Ok(Client::resume(self.id, self.address, self.half_line, outbox, self.leaving, self.counted))
    }
}

impl Replay {
    fn event(&mut self, event: &Event<'_>) {
        self.handed_over = None;
        match event {
            Event::Said { id, bytes } => drop(self.last_said.insert(*id, bytes.len() as u64)),
            Event::CutOff { id } => drop(self.gone.insert(*id, false)),
            Event::Gone { id, heard } => drop(self.gone.insert(*id, *heard)),
            Event::Joined { .. } | Event::Left { .. } | Event::Closed => {}
        }
        self.room.happen(event);
    }

    /// Takes out of the outboxes what was sent. To whom nothing can be sent any more, everything was.
    fn send(&mut self, written: impl Fn(ItemId) -> Option<u64>) {
        let sent: Vec<(ItemId, usize)> = self
            .room
            .clients()
            .map(|client| {
                let sent =
                    written(client.id()).map_or(u64::MAX, |all| all.saturating_sub(client.counted().written));
                (
                    client.id(),
                    usize::try_from(sent).map_or(usize::MAX, |sent| sent.min(client.outbox().len())),
                )
            })
            .collect();
        sent.into_iter().for_each(|(id, count)| self.room.sent(id, count));
    }
}
