//! How connections that were taken over begin to move: by their first event, or in the quiet that follows; at once where there can
//! be no event.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use heirloom::runtime::mio::register;

use super::EventLoop;
use crate::arriving::{Dormant, Woken};
use crate::connection::Stage;
use crate::id::{Key, Side, token};
use crate::socket::{BOTH, READING};

/// How many connections that have not moved yet are woken at once.
const WOKEN: usize = 16;

impl EventLoop {
    /// Wakes some of those that were taken over and have not moved yet. Whether there may be more.
    pub(crate) fn wake_some(&mut self) -> bool {
        for _ in 0..WOKEN {
            match self.dormant.as_mut().and_then(Dormant::next) {
                Some(key) => self.wake(key),
                None => {
                    self.dormant = None;
                    return false;
                }
            }
        }
        self.dormant.is_some()
    }

    /// Whether somebody may have something to say, and is not heard.
    pub(super) fn has_unheard(&self) -> bool {
        self.dormant.as_ref().is_some_and(Dormant::has_unheard)
    }

    /// Takes over what is dormant.
    pub(crate) fn go_on_with(&mut self, mut dormant: Dormant) {
        let post = &self.shared.loops[self.number];
        post.load.store(dormant.len(), Ordering::Relaxed);
        post.settled.store(dormant.len(), Ordering::Relaxed);
        self.urgent = dormant.take_urgent();
        self.dormant = Some(dormant);
    }

    /// Wakes all of them.
    pub(crate) fn wake_all(&mut self) {
        while self.wake_some() {}
    }

    /// Makes a connection of what was taken over.
    pub(super) fn wake(&mut self, key: Key) {
        let Some(dormant) = &mut self.dormant else { return };
        let Some(woken) = dormant.take(key) else { return };
        let Woken { mut connection, registered, urgent } = match woken {
            Ok(woken) => woken,
            Err(error) => {
                // Its sockets were checked when they came.
                tracing::error!(%error, "cannot go on with a connection that was taken over");
                return;
            }
        };
        for side in [Side::Client, Side::Backend] {
            let is_watched = match connection.stage {
                Stage::Relaying => true,
                Stage::Connecting => side == Side::Backend,
                Stage::Waiting => false,
            };
            let Some(socket) = connection.socket(side).filter(|_| is_watched) else { continue };
            if registered {
                connection.watched[side] = Some(READING);
                continue;
            }
            if let Err(error) = register(&self.registry, socket.as_fd(), token(key.id(side)), BOTH) {
                tracing::error!(%error, "cannot wait for a connection that was taken over");
            }
            connection.watched[side] = Some(BOTH);
        }
        for flow in [&connection.up, &connection.down] {
            if flow.pipe.is_some() {
                self.pipes.arrived();
            }
        }
        connection.settled = true;
        let (stage, until) = (connection.stage, connection.until);
        if urgent || stage != Stage::Relaying {
            connection.try_everything();
        } else {
            (connection.up.writable, connection.down.writable) = (true, true);
        }
        if stage == Stage::Connecting {
            // What it has come to is told by the poller.
            (connection.up.writable, connection.down.readable) = (false, false);
        }
        let has_server = connection.server.is_some();
        self.connections.insert(key, Box::new(connection));
        match stage {
            Stage::Waiting => self.waiting.push_back(key),
            Stage::Connecting if has_server => {
                if let Some(connection) = self.connections.get_mut(&key) {
                    self.timers.set(key, &mut connection.timer, until);
                }
            }
            Stage::Connecting => self.connect(key),
            Stage::Relaying => {
                self.set_timer(key);
                if urgent {
                    self.queue(key);
                }
            }
        }
    }
}
