//! How clients are let in: as many as there is room for, by whichever loop has nothing else to do.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::connecting::socket_for;
use super::{EventLoop, is_shortage};
use crate::clock::nanoseconds;
use crate::connection::Connection;
use crate::door::{AT_ONCE, Queue, Watch};
use crate::socket;

/// When a listener that fails is tried again.
const FAILED_REST: Duration = Duration::from_secs(1);

impl EventLoop {
    /// Has the poller tell of those who come, as far as this loop is to hear of them.
    pub(crate) fn watch_doors(&mut self) {
        for door in &mut self.doors {
            let watch = match (self.lending, door.home) {
                (false, _) => Watch::Shared,
                (true, true) => Watch::Alone,
                (true, false) => Watch::Not,
            };
            if let Err(error) = door.watch(&self.registry, watch) {
                let listener = &self.shared.table.listeners[door.listener].name;
                tracing::error!(%listener, %error, "an event loop cannot wait for clients");
            }
        }
    }

    /// Accepts who waits at a listener, as far as there is room.
    pub(super) fn open_door(&mut self, at: usize) {
        let shared = Arc::clone(&self.shared);
        let table = &shared.table;
        let mut queue = None;
        for _ in 0..AT_ONCE {
            let door = &mut self.doors[at];
            if !door.wants_turn(self.now) {
                return;
            }
            let short_until = shared.short_until.load(Ordering::Relaxed);
            if short_until > self.now {
                door.resting = Some(short_until);
                return;
            }
            let listener = &table.listeners[door.listener];
            if !shared.has_room(door.listener) {
                table.announce_waiting();
                if !shared.has_room(door.listener) {
                    return;
                }
            }
            let waiting = *queue.get_or_insert_with(|| door.queue());
            if waiting == Queue::Counted(0) {
                door.ready = false;
                return;
            }
            let Some(backend) = table.admit(door.listener) else {
                // Another loop was faster: is there room still? While this was tried, there seemed to be less.
                shared.wake_waiting();
                continue;
            };
            // Another loop may take the last descriptor meanwhile: whoever is accepted has all that it needs.
            let server = socket_for(table, door.listener, backend);
            let (server, accepted) = match server {
                Err(error) if is_shortage(&error) => (None, Err(error)),
                // What else is wrong is seen again when it is tried to connect.
                server => (server.ok(), socket::accept(&door.socket, door.kind)),
            };
            if accepted.is_err() {
                shared.withdraw(door.listener, backend);
            }
            match accepted {
                Ok((client, from)) => {
                    queue = waiting.without_one();
                    listener.traffic.connections.fetch_add(1, Ordering::Relaxed);
                    shared.loops[self.number].load.fetch_add(1, Ordering::Relaxed);
                    let mut connection = Connection::new(door.listener, client, from, self.now);
                    connection.backend = Some(backend);
                    self.begin(shared.keys.take(), connection, server);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    door.ready = false;
                    return;
                }
                Err(error) if is_shortage(&error) => {
                    shared.note_shortage(&error);
                }
                // That one has gone before it was accepted.
                Err(error) if is_of_one(&error) => queue = None,
                Err(error) => {
                    tracing::error!(listener = %listener.name, %error, "cannot accept");
                    door.resting = Some(self.now + nanoseconds(FAILED_REST));
                    return;
                }
            }
        }
        // More may wait; the others have their turn first.
        self.more = true;
    }
}

/// Whether an error of accept(2) is that of the connection, and not of the listener.
fn is_of_one(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    let network = [Errno::NETDOWN, Errno::NETUNREACH, Errno::HOSTDOWN, Errno::HOSTUNREACH, Errno::NONET];
    let others =
        [Errno::CONNABORTED, Errno::PROTO, Errno::NOPROTOOPT, Errno::OPNOTSUPP, Errno::PERM, Errno::INTR];
    errno.is_some_and(|errno| network.contains(&errno) || others.contains(&errno))
}
