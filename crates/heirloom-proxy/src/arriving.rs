//! Connections that were taken over and have not moved since: each is woken by its first event, or in the quiet that follows. Those
//! that are registered nowhere, as after an upgrade in place, have no event, and are woken without a pause, the ones that had moved
//! last first.
//!
//! So the time between the last byte before a handover and the first after it does not depend on how many connections there are.

use std::sync::{Arc, Mutex};

use heirloom::{Bundle, Kind};

use crate::connection::{Connection, Stage};
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
    /// How many are registered nowhere, and are not urgent.
    unheard: usize,
}

impl Sleepers {
    /// With room for so many: to make more of it later has all of them moved at once.
    pub(crate) fn with_capacity(count: usize) -> Sleepers {
        let connections = KeyMap::with_capacity_and_hasher(count, Default::default());
        Sleepers { connections, keys: Vec::with_capacity(count), urgent: Vec::new(), unheard: 0 }
    }

    pub(crate) fn insert(&mut self, key: Key, sleeper: Sleeper) {
        if sleeper.urgent {
            self.urgent.push(key);
        }
        self.unheard += usize::from(sleeper.is_unheard());
        self.keys.push(key);
        self.connections.insert(key, sleeper);
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<Sleeper> {
        let removed = self.connections.remove(&key);
        self.unheard -= usize::from(removed.as_ref().is_some_and(Sleeper::is_unheard));
        removed
    }

    /// Takes in how much a connection has moved by now. Whether there is one.
    pub(crate) fn update(&mut self, moved: Moved) -> bool {
        let key = moved.key();
        let Some(sleeper) = self.connections.get_mut(&key) else { return false };
        moved.apply(&mut sleeper.state);
        // What came since it was registered is told.
        if sleeper.is_unheard() {
            sleeper.urgent = true;
            self.unheard -= 1;
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

impl Sleeper {
    /// Whether nobody would tell if there was something to do now, and nobody looks.
    fn is_unheard(&self) -> bool {
        !self.registered && !self.urgent
    }
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

    /// Whether some would not be heard before they are woken.
    pub(crate) fn has_unheard(&self) -> bool {
        self.sleepers.unheard > 0
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::decode;

    fn moved(key: Key) -> Moved {
        // As it is written down: an array of the id, what went each way, and when.
        let id = u8::try_from(key.first().0).unwrap();
        assert!(id < 24);
        decode(&[0x84, id, 1, 2, 3], "it").unwrap()
    }

    #[test]
    fn only_those_that_nobody_would_hear_are_waited_for() {
        let keys: Vec<Key> = [2, 4, 6, 8, 10].into_iter().map(|id| Key::of(heirloom::ItemId(id))).collect();
        let mut sleepers = Sleepers::with_capacity(keys.len());
        for (&key, (registered, urgent)) in
            keys.iter().zip([(true, false), (true, true), (false, true), (false, false), (false, false)])
        {
            let state = ConnectionState { stage: RELAYING, ..ConnectionState::default() };
            sleepers.insert(key, Sleeper { state, registered, urgent });
        }
        assert_eq!((sleepers.unheard, &sleepers.urgent[..]), (2, &keys[1..3]));
        // One moves, so that it is looked at next; the others are as they were.
        keys[..4].iter().for_each(|&key| assert!(sleepers.update(moved(key))));
        assert_eq!((sleepers.unheard, &sleepers.urgent[..]), (1, &keys[1..4]));
        assert_eq!(sleepers.connections[&keys[0]].state.up.moved, 1);
        for &key in &keys {
            assert!(sleepers.remove(key).is_some());
            assert!(sleepers.remove(key).is_none());
        }
        assert_eq!(sleepers.unheard, 0);
        assert!(!sleepers.update(moved(keys[0])));
    }
}
