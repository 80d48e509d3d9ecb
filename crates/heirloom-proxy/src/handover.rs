//! What a proxy hands over, as it is written down: its listeners, its connections, and the pipes that hold bytes.
//!
//! Of a connection the client's item has the state; the backend's socket and the pipes are found by their ids. Maps with integer
//! keys: a newer version adds keys, an older one skips them. Where there are many of a kind and each is small, it is an array, to
//! the end of which a newer version adds.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use heirloom::{Entry, ItemId, Kind};
use minicbor::{Decode, Encode};

use crate::clock::Time;
use crate::connection::{Connection, Stage};
use crate::flow::Flow;
use crate::id::{Key, Keys};
use crate::pipes::Pipe;
use crate::table::{Table, Traffic};

/// What the items are called.
pub(crate) const LISTENER: &str = "listener";
pub(crate) const CLIENT: &str = "client";
pub(crate) const BACKEND: &str = "backend";
pub(crate) const PIPE: &str = "pipe";

/// The state of the whole: what connections refer to, by its place here.
#[derive(Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct ServiceState {
    #[cbor(n(0), default)]
    pub(crate) listeners: Vec<ListenerState>,
    #[cbor(n(1), default)]
    pub(crate) backends: Vec<BackendState>,
    /// What the rates are reckoned from.
    #[cbor(n(2), default)]
    pub(crate) samples: Vec<Sample>,
    /// Connections whose items say how much they had moved before. Most of those that have changed by the freeze are here, where
    /// one costs a tenth of what it costs there. Who does not know of this has older counts.
    #[cbor(n(3), default, encode_with = "Encode::encode", is_nil = "Vec::is_empty")]
    pub(crate) moved: Vec<Moved>,
}

/// A connection of which nothing has changed since the offer but how much it has passed on, and when it did last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Moved {
    /// The id of the client's item.
    #[n(0)]
    id: u64,
    #[n(1)]
    up: u64,
    #[n(2)]
    down: u64,
    #[n(3)]
    active: Time,
}

#[derive(Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct ListenerState {
    #[n(0)]
    pub(crate) name: String,
    #[n(1)]
    pub(crate) address: String,
    #[cbor(n(2), default)]
    pub(crate) traffic: TrafficState,
}

#[derive(Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct BackendState {
    #[n(0)]
    pub(crate) pool: String,
    #[n(1)]
    pub(crate) name: String,
    #[n(2)]
    pub(crate) address: String,
    #[cbor(n(3), default)]
    pub(crate) traffic: TrafficState,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct TrafficState {
    #[cbor(n(0), default)]
    pub(crate) connections: u64,
    #[cbor(n(1), default)]
    pub(crate) failed: u64,
    #[cbor(n(2), default)]
    pub(crate) up: u64,
    #[cbor(n(3), default)]
    pub(crate) down: u64,
}

/// What all listeners together had passed on at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Sample {
    #[cbor(n(0), default)]
    pub(crate) at: Time,
    #[cbor(n(1), default)]
    pub(crate) traffic: TrafficState,
}

/// The state of a listener's item.
#[derive(Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct DoorState {
    #[cbor(n(0), default)]
    pub(crate) listener: usize,
}

/// The state of a client's item: all of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct ConnectionState {
    #[cbor(n(0), default)]
    pub(crate) listener: usize,
    #[cbor(n(1), default)]
    pub(crate) backend: Option<usize>,
    #[cbor(n(2), default)]
    pub(crate) stage: u8,
    /// Whether there is a backend's socket.
    #[cbor(n(3), default)]
    pub(crate) has_server: bool,
    #[cbor(n(4), default)]
    pub(crate) from: Option<String>,
    #[cbor(n(5), default)]
    pub(crate) accepted: Time,
    #[cbor(n(6), default)]
    pub(crate) connected: Option<Time>,
    #[cbor(n(7), default)]
    pub(crate) active: Time,
    #[cbor(n(8), default)]
    pub(crate) until: Option<Time>,
    #[cbor(n(9), default)]
    pub(crate) up: FlowState,
    #[cbor(n(10), default)]
    pub(crate) down: FlowState,
}

impl ConnectionState {
    /// Whether it waits for a backend.
    pub(crate) fn waits(&self) -> bool {
        ![CONNECTING, RELAYING].contains(&self.stage)
    }

    /// Whether it does nothing before one of its sockets tells of something to read.
    pub(crate) fn is_calm(&self) -> bool {
        self.stage == RELAYING && [&self.up, &self.down].iter().all(|flow| flow.is_calm())
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct FlowState {
    #[cbor(n(0), default)]
    pub(crate) moved: u64,
    #[cbor(n(1), default)]
    pub(crate) ended: bool,
    #[cbor(n(2), default)]
    pub(crate) done: bool,
    #[cbor(n(3), default)]
    pub(crate) lost: bool,
    /// The id of the pipe's reading end, where there is a pipe; that of the writing end is the next.
    #[cbor(n(4), default)]
    pub(crate) pipe: Option<u64>,
    /// How many bytes are in the pipe.
    #[cbor(n(5), default)]
    pub(crate) held: usize,
}

impl FlowState {
    /// It holds nothing, and an end that it has heard was passed on.
    fn is_calm(&self) -> bool {
        self.pipe.is_none() && self.ended == self.done
    }
}

pub(crate) const WAITING: u8 = 0;
pub(crate) const CONNECTING: u8 = 1;
pub(crate) const RELAYING: u8 = 2;

/// A descriptor that is lent to be sent.
#[derive(Clone, Debug)]
pub(crate) enum Lent {
    Socket(Arc<OwnedFd>),
    Reader(Pipe),
    Writer(Pipe),
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Lent::Socket(socket) => socket.as_fd(),
            Lent::Reader(pipe) => pipe.reader().as_fd(),
            Lent::Writer(pipe) => pipe.writer().as_fd(),
        }
    }
}

/// Items with their descriptors.
pub(crate) type Items = Vec<(Entry, Lent)>;

impl ServiceState {
    pub(crate) fn of(table: &Table, samples: Vec<Sample>, moved: Vec<Moved>) -> ServiceState {
        let listeners = table.listeners.iter().map(|listener| ListenerState {
            name: listener.name.as_ref().into(),
            address: listener.address.clone(),
            traffic: TrafficState::of(&listener.traffic),
        });
        let backends = table.backends.iter().map(|backend| BackendState {
            pool: backend.pool.clone(),
            name: backend.name.as_ref().into(),
            address: backend.address.clone(),
            traffic: TrafficState::of(&backend.traffic),
        });
        ServiceState { listeners: listeners.collect(), backends: backends.collect(), samples, moved }
    }
}

impl Moved {
    /// What of a connection has changed since the offer, if that is all.
    pub(crate) fn of(key: Key, connection: &Connection) -> Option<Moved> {
        let Connection { up, down, active, .. } = connection;
        // What has come to an end by now may have done so since then.
        let goes_on = |flow: &Flow| flow.pipe.is_none() && !flow.ended && !flow.done && !flow.lost;
        let is_all =
            connection.offered && connection.stage == Stage::Relaying && [up, down].into_iter().all(goes_on);
        is_all.then(|| Moved { id: key.first().0, up: up.moved, down: down.moved, active: *active })
    }

    pub(crate) fn key(self) -> Key {
        Key::of(ItemId(self.id))
    }

    /// Brings what was offered up to date.
    pub(crate) fn apply(self, state: &mut ConnectionState) {
        state.active = self.active;
        for (flow, moved) in [(&mut state.up, self.up), (&mut state.down, self.down)] {
            (flow.moved, flow.held) = (moved, 0);
        }
    }
}

impl TrafficState {
    pub(crate) fn of(traffic: &Traffic) -> TrafficState {
        TrafficState {
            connections: traffic.connections.load(Ordering::Relaxed),
            failed: traffic.failed.load(Ordering::Relaxed),
            up: traffic.up.load(Ordering::Relaxed),
            down: traffic.down.load(Ordering::Relaxed),
        }
    }

    /// Goes on counting from there.
    pub(crate) fn set(self, traffic: &Traffic) {
        traffic.connections.store(self.connections, Ordering::Relaxed);
        traffic.failed.store(self.failed, Ordering::Relaxed);
        traffic.up.store(self.up, Ordering::Relaxed);
        traffic.down.store(self.down, Ordering::Relaxed);
    }
}

/// Writes a state down. Nothing of ours is one that cannot be.
pub(crate) fn encode(state: &impl Encode<()>) -> Vec<u8> {
    minicbor::to_vec(state).unwrap_or_default()
}

pub(crate) fn decode<'b, T: Decode<'b, ()>>(bytes: &'b [u8], of: &str) -> Result<T, String> {
    minicbor::decode(bytes).map_err(|error| format!("the state of {of} cannot be read: {error}"))
}

/// What of a connection is written down when there is time for it: its state and its sockets.
#[derive(Debug)]
pub(crate) struct Snapshot {
    key: Key,
    from: Option<SocketAddr>,
    state: ConnectionState,
    client: Lent,
    client_kind: Kind,
    server: Option<(Lent, Kind)>,
    pipes: Vec<(Key, Pipe)>,
}

impl Snapshot {
    /// A connection as it is, with its pipes if there are `keys` for them.
    pub(crate) fn of(key: Key, connection: &Connection, keys: Option<&Keys>) -> Snapshot {
        let mut pipes = Vec::new();
        let mut flow = |flow: &Flow| {
            let pipe = flow.pipe.as_ref().zip(keys).map(|(pipe, keys)| {
                let key = keys.take();
                pipes.push((key, pipe.clone()));
                key.first().0
            });
            let Flow { moved, ended, done, lost, held, .. } = *flow;
            FlowState { moved, ended, done, lost, pipe, held }
        };
        let state = ConnectionState {
            listener: connection.listener,
            backend: connection.backend,
            stage: match connection.stage {
                Stage::Waiting => WAITING,
                Stage::Connecting => CONNECTING,
                Stage::Relaying => RELAYING,
            },
            has_server: connection.server.is_some(),
            from: None,
            accepted: connection.accepted,
            connected: connection.connected,
            active: connection.active,
            until: connection.until,
            up: flow(&connection.up),
            down: flow(&connection.down),
        };
        let lent = |socket: &crate::socket::Socket| Lent::Socket(Arc::clone(socket.shared()));
        Snapshot {
            key,
            from: connection.from,
            state,
            client: lent(&connection.client),
            client_kind: connection.client.kind(),
            server: connection.server.as_ref().map(|server| (lent(server), server.kind())),
            pipes,
        }
    }

    fn encoded(&self) -> Vec<u8> {
        encode(&ConnectionState { from: self.from.map(|from| from.to_string()), ..self.state.clone() })
    }

    /// The state of the client's item, and what else there is of items: pipes only.
    pub(crate) fn changed(self, pipes: &mut Items) -> (ItemId, Vec<u8>) {
        let (id, state) = (self.key.first(), self.encoded());
        pipes.extend(pipe_items(self.pipes));
        (id, state)
    }

    /// All of its items.
    pub(crate) fn items(self, items: &mut Items) {
        let entry = |id, name: &str, kind, state| Entry { id, name: name.into(), kind, state };
        let state = self.encoded();
        items.push((entry(self.key.first(), CLIENT, self.client_kind, state), self.client));
        if let Some((server, kind)) = self.server {
            items.push((entry(self.key.second(), BACKEND, kind, Vec::new()), server));
        }
        items.extend(pipe_items(self.pipes));
    }
}

fn pipe_items(pipes: Vec<(Key, Pipe)>) -> impl Iterator<Item = (Entry, Lent)> {
    let entry = |id, kind| Entry { id, name: PIPE.into(), kind, state: Vec::new() };
    pipes.into_iter().flat_map(move |(key, pipe)| {
        let reader = (entry(key.first(), Kind::PipeReader), Lent::Reader(pipe.clone()));
        [reader, (entry(key.second(), Kind::PipeWriter), Lent::Writer(pipe))]
    })
}

/// The item of a listener.
pub(crate) fn door_item(key: Key, listener: usize, kind: Kind, socket: &Arc<OwnedFd>) -> (Entry, Lent) {
    let state = encode(&DoorState { listener });
    (Entry { id: key.first(), name: LISTENER.into(), kind, state }, Lent::Socket(Arc::clone(socket)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    const RELEASED: &[u8] = include_bytes!("../tests/fixtures/state-v1/proxy.cbor");
    const RELEASED_CONNECTION: &[u8] = include_bytes!("../tests/fixtures/state-v1/connection.cbor");

    fn traffic(from: u64) -> TrafficState {
        TrafficState { connections: from, failed: from + 1, up: from + 2, down: u64::MAX }
    }

    fn of_0_1() -> (ServiceState, ConnectionState) {
        let service = ServiceState {
            listeners: vec![ListenerState {
                name: "web".into(),
                address: "0.0.0.0:443".into(),
                traffic: traffic(1),
            }],
            backends: vec![BackendState {
                pool: "app".into(),
                name: "one".into(),
                address: "unix:/run/app.sock".into(),
                traffic: traffic(5),
            }],
            samples: vec![Sample { at: 7, traffic: traffic(9) }],
            moved: Vec::new(),
        };
        let flow =
            FlowState { moved: 1 << 40, ended: true, done: false, lost: false, pipe: Some(42), held: 100 };
        let connection = ConnectionState {
            listener: 0,
            backend: Some(0),
            stage: RELAYING,
            has_server: true,
            from: Some("[::1]:50000".into()),
            accepted: 1,
            connected: Some(2),
            active: 3,
            until: Some(4),
            up: flow,
            down: FlowState { done: true, lost: true, ..FlowState::default() },
        };
        (service, connection)
    }

    #[test]
    fn the_state_of_0_1_can_be_read() {
        let (service, connection) = of_0_1();
        assert_eq!(decode::<ServiceState>(RELEASED, "it").unwrap(), service);
        assert_eq!(decode::<ConnectionState>(RELEASED_CONNECTION, "it").unwrap(), connection);
        // This version still writes the same. When it does not any more, that needs a fixture of its own.
        assert_eq!(encode(&service), RELEASED);
        assert_eq!(encode(&connection), RELEASED_CONNECTION);
    }

    #[test]
    fn a_newer_state_is_read_and_an_older_one_has_defaults() {
        // Keys that are not known, and hardly any that are.
        let newer = [0xa2, 0x01, 0x07, 0x18, 0x63, 0x82, 0x01, 0x02];
        let read: ConnectionState = decode(&newer, "it").unwrap();
        assert_eq!(read, ConnectionState { backend: Some(7), ..ConnectionState::default() });
        // An array with more at its end.
        let read: Moved = decode(&[0x85, 7, 1, 2, 3, 4], "it").unwrap();
        assert_eq!(read, Moved { id: 7, up: 1, down: 2, active: 3 });
    }

    #[test]
    fn what_has_moved_is_what_the_item_would_say() {
        let offered = ConnectionState {
            up: FlowState { moved: 1, held: 100, ..FlowState::default() },
            active: 3,
            ..of_0_1().1
        };
        let moved = Moved { id: 7, up: 1 << 40, down: 5, active: 9 };
        let state = ServiceState { moved: vec![moved], ..of_0_1().0 };
        assert_eq!(decode::<ServiceState>(&encode(&state), "it").unwrap(), state);
        let mut now = offered.clone();
        moved.apply(&mut now);
        let up = FlowState { moved: 1 << 40, ..FlowState::default() };
        let down = FlowState { moved: 5, held: 0, ..offered.down.clone() };
        assert_eq!(now, ConnectionState { up, down, active: 9, ..offered });
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_an_error(cut: Index, at: Index, byte: u8, which: bool) {
            let mut bytes = if which { RELEASED } else { RELEASED_CONNECTION }.to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(1 + cut.index(2 * bytes.len()));
            if let Ok(read) = decode::<ServiceState>(&bytes, "it") {
                prop_assert_eq!(decode::<ServiceState>(&encode(&read), "it").unwrap(), read);
            }
            if let Ok(read) = decode::<ConnectionState>(&bytes, "it") {
                prop_assert_eq!(decode::<ConnectionState>(&encode(&read), "it").unwrap(), read);
            }
        }
    }
}
