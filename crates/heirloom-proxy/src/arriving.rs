//! Connections that were taken over and have not moved since: each is woken by its first event, or in the quiet that follows.
//!
//! So the time between the last byte before a handover and the first after it does not depend on how many connections there are.

use std::sync::{Arc, Mutex};

use heirloom::{Bundle, Kind};

use crate::connection::{Connection, Sides, Stage};
use crate::flow::Flow;
use crate::handover::{CONNECTING, ConnectionState, FlowState, Moved, RELAYING};
use crate::id::{Key, KeyMap};
use crate::pipes::Pipe;
use crate::socket::Socket;

/// The dormant connections of a loop. Their descriptors are in the bundle until they are woken.
pub(crate) struct Dormant {
    bundle: Arc<Mutex<Bundle>>,
    sleepers: Sleepers,
}

/// All that is known of them before they are this process's own, made while nobody waits for it.
#[derive(Debug)]
pub(crate) struct Sleepers {
    connections: KeyMap<Sleeper>,
    /// The keys of all, and of some that have gone.
    keys: Vec<Key>,
    urgent: Vec<Key>,
}

impl Sleepers {
    /// With room for so many: to make more of it later has all of them moved at once.
    pub(crate) fn with_capacity(count: usize) -> Sleepers {
        let connections = KeyMap::with_capacity_and_hasher(count, Default::default());
        Sleepers { connections, keys: Vec::with_capacity(count), urgent: Vec::new() }
    }

    pub(crate) fn insert(&mut self, key: Key, sleeper: Sleeper) {
        if sleeper.urgent {
            self.urgent.push(key);
        }
        self.keys.push(key);
        self.connections.insert(key, sleeper);
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<Sleeper> {
        self.connections.remove(&key)
    }

    /// Takes in how much a connection has moved by now. Whether there is one.
    pub(crate) fn update(&mut self, moved: Moved) -> bool {
        let key = moved.key();
        let Some(sleeper) = self.connections.get_mut(&key) else { return false };
        moved.apply(&mut sleeper.state);
        // What came since it was registered is told.
        if !sleeper.registered && !std::mem::replace(&mut sleeper.urgent, true) {
            self.urgent.push(key);
        }
        true
    }
}

/// What is known of a connection that came.
#[derive(Debug)]
pub(crate) struct Sleeper {
    /// With the places of listener and backend in our own table.
    pub(crate) state: ConnectionState,
    /// Its sockets were registered with the poller of its loop, for reading.
    pub(crate) registered: bool,
    /// It is in the middle of something, or is not registered: nobody tells what is to be done.
    pub(crate) urgent: bool,
}

/// What a sleeper has become.
pub(crate) struct Woken {
    pub(crate) connection: Connection,
    pub(crate) registered: bool,
    pub(crate) urgent: bool,
}

impl Dormant {
    pub(crate) fn new(bundle: Arc<Mutex<Bundle>>, sleepers: Sleepers) -> Dormant {
        Dormant { bundle, sleepers }
    }

    pub(crate) fn has(&self, key: Key) -> bool {
        self.sleepers.connections.contains_key(&key)
    }

    pub(crate) fn len(&self) -> usize {
        self.sleepers.connections.len()
    }

    /// The next one that is still to be woken.
    pub(crate) fn next(&mut self) -> Option<Key> {
        while let Some(key) = self.sleepers.keys.pop() {
            if self.has(key) {
                return Some(key);
            }
        }
        None
    }

    /// Those that cannot wait for an event.
    pub(crate) fn take_urgent(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.sleepers.urgent)
    }

    /// Wakes one. The error is the name of what is missing.
    pub(crate) fn take(&mut self, key: Key) -> Option<Result<Woken, &'static str>> {
        let Sleeper { state, registered, urgent } = self.sleepers.remove(key)?;
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
    Ok(Flow { pipe, held, ended, done, lost, moved, ..Flow::default() })
}
