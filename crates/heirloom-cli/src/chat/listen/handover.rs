//! What a server hands over: its listener, and each client's connection with what was begun.
//!
//! There is no state beside that of the clients. Counters travel with the incumbent's own record, user numbers are the
//! ids of items, which are never given out twice.

use std::collections::BTreeSet;
use std::io;
use std::net::{TcpListener, TcpStream};

use anyhow::{Context, anyhow};
use heirloom::manifest::Base;
use heirloom::runtime::mio::register;
use heirloom::{Bundle, Cbor, Codec, CodecError, Entry, Incumbent, ItemId, Kind, Limits};
use mio::{Interest, Poll};
use serde::{Deserialize, Serialize};

use super::client::{Client, name, token};
use super::door::Door;
use super::room::{Counters, Room};
use super::size::LARGEST;
use crate::chat::bytes;

/// The name of the listener among the items.
const LISTENER_NAME: &str = "listener";

/// The state of a client's item.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct ClientState {
    /// Where it comes from, as the others were told.
    address: String,
    /// What it has said of a line that has not ended.
    #[serde(with = "bytes")]
    half_line: Vec<u8>,
    /// What it is still to hear.
    #[serde(with = "bytes")]
    unsent: Vec<u8>,
    /// It has nothing more to say, and leaves when it has heard that.
    leaving: bool,
}

/// The limits of a server's manifest, in which everything must have room that may be unsent.
pub(super) fn limits() -> Limits {
    Limits { item_state_bytes: LARGEST + (16 << 20), manifest_bytes: 1 << 30, ..Limits::default() }
}

/// Everything as it is now.
pub(super) fn manifest(listener: ItemId, room: &Room) -> Result<Base, CodecError> {
    let listener =
        Entry { id: listener, name: LISTENER_NAME.into(), kind: Kind::TcpListener, state: Vec::new() };
    let mut items = vec![listener];
    for (id, client, leaving) in room.all() {
        let state = ClientState {
            address: client.address().into(),
            half_line: client.half_line().into(),
            unsent: client.outbox().to_vec(),
            leaving,
        };
        items.push(Entry { id, name: client.name(), kind: Kind::TcpStream, state: Cbor::encode(&state)? });
    }
    items.sort_unstable_by_key(|entry| entry.id);
    Ok(Base { items, next_id: room.next_id().0, ..Base::default() })
}

/// What status shows: the same items.
pub(super) fn items(listener: ItemId, room: &Room) -> impl Iterator<Item = (ItemId, String, Kind)> {
    let clients = room.all().map(|(id, client, _)| (id, client.name(), Kind::TcpStream));
    std::iter::once((listener, LISTENER_NAME.to_owned(), Kind::TcpListener)).chain(clients)
}

/// Whether this version could serve what was handed over. No descriptor is touched.
pub(super) fn check<'e>(entries: impl Iterator<Item = &'e Entry>) -> anyhow::Result<()> {
    let mut listeners = 0;
    for entry in entries {
        if is_client(entry) {
            state(&entry.state, &entry.name)?;
        }
        listeners += usize::from(is_listener(entry));
    }
    match listeners {
        1 => Ok(()),
        _ => Err(anyhow!("there is to be one listener, and there are {listeners}")),
    }
}

/// A poller, and what was registered with it while the incumbent still served.
pub(super) struct Ahead {
    poll: Poll,
    registered: BTreeSet<ItemId>,
}

impl Ahead {
    /// Nothing was registered.
    pub(super) fn nothing() -> io::Result<Ahead> {
        Ok(Ahead { poll: Poll::new()?, registered: BTreeSet::new() })
    }

    /// Registers everything that there is already. The poller must not be polled before the takeover has succeeded.
    pub(super) fn everything(bundle: &Bundle) -> io::Result<Ahead> {
        let mut ahead = Ahead::nothing()?;
        for entry in bundle.entries().filter(|entry| is_listener(entry) || is_client(entry)) {
            if let Some(descriptor) = bundle.descriptor(entry.id) {
                register(ahead.poll.registry(), descriptor, token(entry.id), Interest::READABLE)?;
                ahead.registered.insert(entry.id);
            }
        }
        Ok(ahead)
    }
}

/// What a server serves.
pub(super) struct Parts {
    pub(super) poll: Poll,
    pub(super) listener: ItemId,
    pub(super) door: Door,
    pub(super) room: Room,
}

/// Takes everything out of a bundle that now belongs to this process, whatever of it was registered ahead.
pub(super) fn resume<A>(
    mut bundle: Bundle,
    incumbent: &Incumbent<A>,
    ahead: Ahead,
    backlog: usize,
) -> anyhow::Result<Parts> {
    let Ahead { poll, registered } = ahead;
    let next_id = bundle.next_id();
    let clients: Vec<ItemId> =
        bundle.entries().filter(|entry| is_client(entry)).map(|entry| entry.id).collect();
    let listener = bundle.take::<TcpListener>(LISTENER_NAME)?;
    let door = Door::new(listener.descriptor);
    if !registered.contains(&listener.id) {
        door.register(poll.registry(), token(listener.id)).context("cannot wait for clients")?;
    }
    let mut room = Room::new(poll.registry().try_clone()?, backlog, next_id, counters(incumbent));
    for id in clients {
        let item = bundle.take_id::<TcpStream>(id)?;
        let state = state(&item.state, &item.name)?;
        let client = Client::resume(id, item.descriptor, state.address, state.half_line, state.unsent);
        if !registered.contains(&id) {
            client.register(poll.registry()).with_context(|| format!("cannot wait for {}", item.name))?;
        }
        room.resume(id, client, state.leaving);
    }
    for entry in bundle.close_rest() {
        tracing::warn!(item = %entry, "closed an item that this version does not know");
    }
    Ok(Parts { poll, listener: listener.id, door, room })
}

/// Sets the counters, which travel with the incumbent.
pub(super) fn set_counters<A>(incumbent: &mut Incumbent<A>, counters: Counters) {
    incumbent.set_counter("lines_in", counters.lines_in);
    incumbent.set_counter("bytes_in", counters.bytes_in);
    incumbent.set_counter("bytes_out", counters.bytes_out);
}

fn counters<A>(incumbent: &Incumbent<A>) -> Counters {
    Counters {
        lines_in: incumbent.counter("lines_in"),
        bytes_in: incumbent.counter("bytes_in"),
        bytes_out: incumbent.counter("bytes_out"),
    }
}

fn is_listener(entry: &Entry) -> bool {
    entry.name == LISTENER_NAME && entry.kind == Kind::TcpListener
}

fn is_client(entry: &Entry) -> bool {
    entry.kind == Kind::TcpStream && entry.name == name(entry.id)
}

fn state(bytes: &[u8], of: &str) -> anyhow::Result<ClientState> {
    if bytes.is_empty() {
        return Ok(ClientState::default());
    }
    Cbor::decode(bytes).with_context(|| format!("the state of {of} cannot be read"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    const RELEASED: &[u8] = include_bytes!("../../../tests/fixtures/state-v1/client.cbor");

    #[test]
    fn the_state_of_a_client_of_0_1_can_be_read() {
        let expected = ClientState {
            address: "127.0.0.1:50000".into(),
            half_line: "lín".into(),
            unsent: (0..=255).collect(),
            leaving: true,
        };
        assert_eq!(state(RELEASED, "user1").unwrap(), expected);
        // This version still writes the same. When it does not any more, that needs a fixture of its own.
        assert_eq!(Cbor::encode(&expected).unwrap(), RELEASED);
        assert_eq!(state(b"", "user1").unwrap(), ClientState::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_an_error(cut: Index, at: Index, byte: u8) {
            let mut bytes = RELEASED.to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(1 + cut.index(2 * bytes.len()));
            if let Ok(read) = state(&bytes, "user1") {
                prop_assert_eq!(state(&Cbor::encode(&read).unwrap(), "user1").unwrap(), read);
            }
        }
    }
}
