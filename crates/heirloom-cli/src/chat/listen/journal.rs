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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// Records as they are in a journal, each behind its length (u32, little-endian).
    const RELEASED: &[u8] = include_bytes!("../../../tests/fixtures/journal-v1/journal.records");

    fn parse(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while let Some((length, rest)) = bytes.split_first_chunk() {
            let (record, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
            records.push(record.to_vec());
            bytes = rest;
        }
        records
    }

    fn frame(records: &[Vec<u8>]) -> Vec<u8> {
        let framed =
            records.iter().map(|record| [&(record.len() as u32).to_le_bytes(), &record[..]].concat());
        framed.collect::<Vec<_>>().concat()
    }

    fn event(event: Event<'_>) -> Record<'_> {
        Record::Event(event)
    }

    fn joined(id: u64) -> Event<'static> {
        let counted = Counted { consumed: id, written: 1000 * id };
        Event::Joined { id: ItemId(id), address: "127.0.0.1".into(), counted }
    }

    fn said(id: u64, bytes: &'static [u8]) -> Event<'static> {
        Event::Said { id: ItemId(id), bytes: bytes.into() }
    }

    /// A checkpoint with everything that can be in one, and then every kind of record.
    fn records() -> Vec<Vec<u8>> {
        let counters = Counters { lines_in: 1, bytes_in: 2, bytes_out: 3 };
        let mut room = Room::new(ItemId(4), counters);
        for event in
            [joined(4), joined(5), said(5, b"hello\nhalf \xff"), joined(6), Event::Left { id: ItemId(6) }]
        {
            room.happen(&event);
        }
        room.sent(ItemId(4), 30);
        let events = [
            joined(7),
            said(5, b" a line\n"),
            Event::CutOff { id: ItemId(4) },
            Event::Gone { id: ItemId(6), heard: true },
            Event::Left { id: ItemId(7) },
            Event::Gone { id: ItemId(7), heard: false },
        ];
        let then = [
            Record::HandedOver { counted: vec![(ItemId(5), Counted { consumed: 30, written: 5000 })] },
            Record::Kept,
            event(Event::Closed),
        ];
        let later = events.into_iter().map(event).chain(then).map(|record| encode(&record).unwrap());
        checkpoint(&room).unwrap().into_iter().chain(later).collect()
    }

    #[test]
    fn a_journal_of_this_version_can_be_read() {
        // When this version does not write the same any more, that needs a fixture of its own.
        assert!(frame(&records()) == RELEASED);
        let replayed = replay(&parse(RELEASED), |_| Some(0)).unwrap();
        assert_eq!(
            replayed.gone,
            BTreeMap::from([(ItemId(4), false), (ItemId(6), true), (ItemId(7), false)])
        );
        assert_eq!(replayed.last_said, BTreeMap::from([(ItemId(5), 8)]));
        assert!(replayed.room.is_closed() && replayed.handed_over.is_none());
        assert_eq!(replayed.room.counters().lines_in, 3);
        let client = replayed.room.client(ItemId(5)).unwrap();
        assert_eq!(client.counted(), Counted { consumed: 25, written: 5000 });
        let heard = String::from_utf8(client.outbox().to_vec()).unwrap();
        assert!(
            heard.ends_with("<user4> is disconnected.\n<announce> <user7> is disconnected.\n"),
            "{heard}"
        );
    }

    #[test]
    fn what_was_sent_is_taken_out() {
        let all = replay(&parse(RELEASED), |_| Some(0)).unwrap();
        let whole = all.room.client(ItemId(5)).unwrap().outbox().to_vec();
        for sent in [0, 1, 50, whole.len()] {
            let replayed = replay(&parse(RELEASED), |_| Some(5000 + sent as u64)).unwrap();
            let client = replayed.room.client(ItemId(5)).unwrap();
            assert_eq!(client.outbox().to_vec(), whole[sent..]);
            assert_eq!(client.counted().written, 5000 + sent as u64);
        }
    }

    proptest! {
        #[test]
        fn any_records_are_a_room_or_an_error(record: Index, at: Index, byte: u8, cut in prop::option::of(any::<Index>())) {
            let mut records = parse(RELEASED);
            let record = record.index(records.len());
            let at = at.index(records[record].len());
            records[record][at] = byte;
            if let Some(cut) = cut {
                records.remove(cut.index(records.len()));
            }
            if let Ok(replayed) = replay(&records, |_| None) {
                checkpoint(&replayed.room).unwrap();
            }
        }
    }
}
