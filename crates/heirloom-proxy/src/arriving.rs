//! Connections that were taken over and have not moved since: each is woken by its first event, or in the quiet that follows.
//!
//! So the time between the last byte before a handover and the first after it does not depend on how many connections there are.

use std::sync::{Arc, Mutex};

use heirloom::{Bundle, Kind};

use crate::connection::{Connection, Sides, Stage};
use crate::flow::Flow;
use crate::handover::{CONNECTING, ConnectionState, FlowState, RELAYING};
use crate::id::{Key, KeyMap};
use crate::pipes::Pipe;
use crate::socket::Socket;

/// The dormant connections of a loop. Their descriptors are in the bundle until they are woken.
pub(crate) struct Dormant {
    bundle: Arc<Mutex<Bundle>>,
    connections: KeyMap<Sleeper>,
}

/// What is known of a connection that came.
#[derive(Debug)]
pub(crate) struct Sleeper {
    /// With the places of listener and backend in our own table.
    pub(crate) state: ConnectionState,
    /// Its sockets were registered with the poller of its loop, for reading.
    pub(crate) registered: bool,
    /// It was not idle at the freeze: nobody tells what is to be done.
    pub(crate) urgent: bool,
}

/// What a sleeper has become.
pub(crate) struct Woken {
    pub(crate) connection: Connection,
    pub(crate) registered: bool,
    pub(crate) urgent: bool,
}

impl Dormant {
    pub(crate) fn new(bundle: Arc<Mutex<Bundle>>, connections: KeyMap<Sleeper>) -> Dormant {
        Dormant { bundle, connections }
    }

    pub(crate) fn has(&self, key: Key) -> bool {
        self.connections.contains_key(&key)
    }

    pub(crate) fn any(&self) -> Option<Key> {
        self.connections.keys().next().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Those that cannot wait for an event.
    pub(crate) fn urgent(&self) -> Vec<Key> {
        self.connections.iter().filter(|(_, sleeper)| sleeper.urgent).map(|(key, _)| *key).collect()
    }

    /// Wakes one. The error is the name of what is missing.
    pub(crate) fn take(&mut self, key: Key) -> Option<Result<Woken, &'static str>> {
        let Sleeper { state, registered, urgent } = self.connections.remove(&key)?;
        let mut bundle = self.bundle.lock().expect("nobody panics with it");
        let connection = connection(&mut bundle, key, &state);
        Some(connection.map(|connection| Woken { connection, registered, urgent }))
    }
}

fn connection(bundle: &mut Bundle, key: Key, state: &ConnectionState) -> Result<Connection, &'static str> {
    let mut socket = |id, what| {
        let kind = bundle.entry(id).map_or(Kind::Other, |entry| entry.kind);
        bundle.remove(id).map(|descriptor| Socket::new(descriptor, kind)).ok_or(what)
    };
    let client = socket(key.first(), "the client's socket is missing")?;
    let server =
        state.has_server.then(|| socket(key.second(), "the backend's socket is missing")).transpose()?;
    let from = state.from.as_ref().and_then(|from| from.parse().ok());
    let mut connection = Connection::new(state.listener, client, from, state.accepted);
    connection.backend = state.backend;
    connection.stage = match state.stage {
        RELAYING => Stage::Relaying,
        CONNECTING => Stage::Connecting,
        _ => Stage::Waiting,
    };
    connection.server = server;
    connection.connected = state.connected;
    connection.active = state.active;
    connection.until = state.until;
    connection.watched = Sides::default();
    connection.up = flow(bundle, &state.up)?;
    connection.down = flow(bundle, &state.down)?;
    Ok(connection)
}

fn flow(bundle: &mut Bundle, state: &FlowState) -> Result<Flow, &'static str> {
    let FlowState { moved, ended, done, lost, pipe, held } = *state;
    let pipe = match pipe {
        Some(id) => {
            let key = Key::of(heirloom::ItemId(id));
            let ends = bundle.remove(key.first()).zip(bundle.remove(key.second()));
            let (reader, writer) = ends.ok_or("a pipe is missing")?;
            Some(Pipe::adopt(reader, writer))
        }
        None => None,
    };
    Ok(Flow { pipe, held, readable: false, writable: false, ended, done, lost, moved })
}
