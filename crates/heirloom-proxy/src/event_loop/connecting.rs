//! How a connection comes by a backend: one after the other is tried, until one accepts.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heirloom::runtime::mio::{deregister, register};
use rustix::io::Errno;

use super::{EventLoop, is_shortage};
use crate::clock::nanoseconds;
use crate::connection::{Connection, How, Stage};
use crate::flow::Flow;
use crate::id::{Key, Side, token};
use crate::socket::{BOTH, Socket};
use crate::table::Table;

/// When a backend is tried again that is a UNIX socket with a full queue, of which nothing tells.
const AGAIN: Duration = Duration::from_millis(5);
/// When it is tried again where descriptors are used up: before more clients are accepted.
const SHORT_AGAIN: Duration = Duration::from_millis(20);

/// A socket for this backend of a listener.
pub(super) fn socket_for(table: &Table, listener: usize, backend: usize) -> io::Result<Socket> {
    let place = table.backends[backend].place.as_ref();
    let (pool, place) = table.pool(listener).zip(place).ok_or(io::ErrorKind::NotFound)?;
    Socket::to(place, pool.tcp)
}

impl EventLoop {
    /// Takes in a connection that was just accepted, with the socket for its backend. What its client says meanwhile is told once,
    /// and known when it is connected.
    pub(super) fn begin(&mut self, key: Key, connection: Connection, server: Option<Socket>) {
        self.connections.insert(key, Box::new(connection));
        self.touch(key);
        self.note_young(key);
        if self.watch_client(key) {
            self.connect_with(key, server);
        }
    }

    /// Has the poller tell of the client, if it does not already. Whether it does.
    fn watch_client(&mut self, key: Key) -> bool {
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if connection.watched[Side::Client].is_some() {
            return true;
        }
        match register(&self.registry, connection.client.as_fd(), token(key.first()), BOTH) {
            Ok(()) => {
                connection.watched[Side::Client] = Some(BOTH);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "cannot wait for a client");
                self.end(key, How::Refused);
                false
            }
        }
    }

    /// Tries backends until one is being connected to.
    pub(super) fn connect(&mut self, key: Key) {
        self.connect_with(key, None);
    }

    /// The same, with this socket for the first one.
    fn connect_with(&mut self, key: Key, mut socket: Option<Socket>) {
        let shared = Arc::clone(&self.shared);
        let table = &shared.table;
        loop {
            let Some(connection) = self.connections.get_mut(&key) else { return };
            let Some(pool) = table.pool(connection.listener) else { return self.end(key, How::Refused) };
            let waited = connection.stage == Stage::Waiting;
            let chosen = match connection.backend {
                // The same, again or as it was accepted for it.
                Some(backend) => Some(backend),
                None if connection.tried.len() >= pool.tries => return self.end(key, How::Refused),
                None => table.choose(connection.listener, &connection.tried),
            };
            let Some(backend) = chosen else {
                connection.stage = Stage::Waiting;
                self.waiting.push_back(key);
                if !waited {
                    table.count_waiting(connection.listener, true);
                }
                table.announce_waiting();
                // One may have become free before that was heard.
                self.more |= table.has_backend(connection.listener, &connection.tried);
                return;
            };
            let Some(place) = &table.backends[backend].place else { return self.end(key, How::Refused) };
            if waited {
                table.count_waiting(connection.listener, false);
                // Those who have come since then may be let in.
                shared.wake_waiting();
            }
            if connection.backend.is_none() || connection.until.is_none() {
                connection.until = Some(self.now.saturating_add(pool.connect_within));
            }
            connection.backend = Some(backend);
            connection.stage = Stage::Connecting;
            let socket = socket.take().map_or_else(|| Socket::to(place, pool.tcp), Ok);
            let begun = socket.and_then(|socket| socket.connect(place).map(|()| socket));
            let lacks = begun.as_ref().is_err_and(is_shortage);
            if mem::replace(&mut connection.lacks, lacks) != lacks {
                shared.count_lacking(lacks);
            }
            let error = match begun {
                Ok(socket) if socket.is_its_own_peer(place) => Errno::CONNREFUSED.into(),
                Ok(socket) => match register(&self.registry, socket.as_fd(), token(key.second()), BOTH) {
                    Ok(()) => {
                        connection.server = Some(socket);
                        connection.watched[Side::Backend] = Some(BOTH);
                        return self.timers.set(key, &mut connection.timer, connection.until);
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if is_shortage(&error) {
                shared.note_shortage(&error);
                // The backend's time has not begun.
                connection.until = None;
                let again = Some(self.now + nanoseconds(SHORT_AGAIN));
                return self.timers.set(key, &mut connection.timer, again);
            }
            if error.kind() == io::ErrorKind::WouldBlock {
                let again = connection.until.map(|until| until.min(self.now + nanoseconds(AGAIN)));
                return self.timers.set(key, &mut connection.timer, again);
            }
            self.failed_to_connect(key, &error);
        }
    }

    /// A backend could not be connected to.
    pub(super) fn failed_to_connect(&mut self, key: Key, error: &io::Error) {
        let shared = Arc::clone(&self.shared);
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let Some(number) = connection.backend.take() else { return };
        let backend = &shared.table.backends[number];
        tracing::debug!(backend = %backend.name, address = %backend.address, %error, "cannot connect");
        backend.traffic.failed.fetch_add(1, Ordering::Relaxed);
        backend.open.remove();
        // One that was chosen by another configuration was none of the tries.
        if shared.table.pool(connection.listener).is_some_and(|pool| pool.backends.contains(&number)) {
            connection.tried.push(number);
        }
        if let Some(socket) = connection.server.take() {
            let _ = deregister(&self.registry, socket.as_fd());
            connection.watched[Side::Backend] = None;
        }
        shared.wake_waiting();
    }

    /// A connection to a backend has come to something.
    pub(super) fn connecting(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.failed[Side::Client] {
            return self.end(key, How::Failed(Side::Client));
        }
        let Some(server) = &connection.server else { return };
        if connection.failed[Side::Backend] || connection.down.readable {
            // Refused, or already closed again.
            if let Err(error) = server.take_error() {
                connection.failed[Side::Backend] = false;
                connection.down = Flow { writable: connection.down.writable, ..Flow::default() };
                connection.up.writable = false;
                self.failed_to_connect(key, &error);
                return self.connect(key);
            }
        }
        if !connection.up.writable && !connection.down.readable {
            return;
        }
        if !self.watch_client(key) {
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.stage = Stage::Relaying;
        (connection.connected, connection.active) = (Some(self.now), self.now);
        (connection.until, connection.down.writable) = (None, true);
        connection.tried = Vec::new();
        if let Some(backend) = connection.backend {
            self.shared.table.backends[backend].traffic.connections.fetch_add(1, Ordering::Relaxed);
        }
        self.set_timer(key);
        self.touch(key);
        self.relay(key);
    }

    /// Looks for backends for those who wait for one.
    pub(super) fn retry_waiting(&mut self) {
        for key in mem::take(&mut self.waiting) {
            self.connect(key);
        }
    }
}
