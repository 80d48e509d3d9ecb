//! Which loop a connection is with. Whoever accepts it begins with it: one that is short stays there, and nobody is woken for it. One
//! that is still there after a while is given to the loop that has the fewest of those.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heirloom::runtime::mio::{deregister, register};
use mio::Registry;

use super::EventLoop;
use crate::clock::{Time, nanoseconds};
use crate::connection::{Connection, Stage};
use crate::each::Each;
use crate::id::{Key, Side, token};
use crate::socket::BOTH;

/// How long a connection stays where it was accepted, at least.
const SETTLES_AFTER: Duration = Duration::from_millis(100);

impl EventLoop {
    /// A connection was accepted.
    pub(super) fn note_young(&mut self, key: Key) {
        if self.shared.loops.len() == 1 {
            return;
        }
        self.young.push_back((self.now + nanoseconds(SETTLES_AFTER), key));
    }

    /// Finds a loop for those that have been there for a while.
    pub(super) fn settle(&mut self) {
        while self.settles_next().is_some_and(|at| at <= self.now)
            && let Some((_, key)) = self.young.pop_front()
        {
            let shared = Arc::clone(&self.shared);
            let to = shared.loop_for(self.number);
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.settled = true;
            // A successor was told of those that are here; one that is not relayed yet is not asked to begin again.
            let may_move = !self.lending && connection.stage == Stage::Relaying && to != self.number;
            if !may_move || !self.give(key, to) {
                shared.loops[self.number].settled.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// When somebody is to be settled next.
    pub(super) fn settles_next(&mut self) -> Option<Time> {
        while let Some((at, key)) = self.young.front() {
            if self.connections.contains_key(key) {
                return Some(*at);
            }
            self.young.pop_front();
        }
        None
    }

    /// Gives a connection to another loop. Whether it is there now: else it could not be registered, and has stayed.
    fn give(&mut self, key: Key, to: usize) -> bool {
        let shared = Arc::clone(&self.shared);
        let (own, post) = (&shared.loops[self.number], &shared.loops[to]);
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if !move_registrations(connection, key, &self.registry, &post.registry) {
            return false;
        }
        let Some(mut connection) = self.connections.remove(&key) else { return false };
        self.timers.set(key, &mut connection.timer, None);
        for flow in [&connection.up, &connection.down] {
            if flow.pipe.is_some() {
                self.pipes.left();
            }
        }
        (connection.queued, connection.watched) = (false, Each::both(Some(BOTH)));
        own.load.fetch_sub(1, Ordering::Relaxed);
        post.load.fetch_add(1, Ordering::Relaxed);
        post.settled.fetch_add(1, Ordering::Relaxed);
        post.inbox.lock().expect("nobody panics with it").push((key, connection));
        let _ = post.waker.wake();
        true
    }

    /// Goes on with connections that others have given.
    pub(super) fn adopt(&mut self) {
        for (key, mut connection) in self.shared.loops[self.number].take() {
            for flow in [&connection.up, &connection.down] {
                if flow.pipe.is_some() {
                    self.pipes.arrived();
                }
            }
            // What was told before it was here, nobody has heard.
            connection.try_everything();
            self.connections.insert(key, connection);
            self.touch(key);
            self.set_timer(key);
            self.queue(key);
        }
    }
}

/// Registers both sockets elsewhere. If that cannot be, all is as it was.
fn move_registrations(connection: &Connection, key: Key, from: &Registry, to: &Registry) -> bool {
    let sockets = || {
        [Side::Client, Side::Backend].into_iter().filter_map(|side| Some((side, connection.socket(side)?)))
    };
    for (side, socket) in sockets() {
        if let Err(error) = register(to, socket.as_fd(), token(key.id(side)), BOTH) {
            tracing::warn!(%error, "a connection stays with its event loop");
            sockets()
                .take_while(|(before, _)| *before != side)
                .for_each(|(_, socket)| drop(deregister(to, socket.as_fd())));
            return false;
        }
    }
    sockets().for_each(|(_, socket)| drop(deregister(from, socket.as_fd())));
    true
}
