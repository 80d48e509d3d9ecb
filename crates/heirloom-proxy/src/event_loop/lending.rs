//! What a loop does for a handover: it shows what there is, keeps account of what changes until the freeze, and lets go of
//! everything that another process has by then.

use std::mem;
use std::os::fd::AsFd;

use heirloom::runtime::mio::deregister;
use heirloom::{Kind, courtesy};

use super::EventLoop;
use crate::connection::{How, Stage};
use crate::handover::Snapshot;
use crate::id::{Key, Side};
use crate::socket;

/// Of how many connections is let go before others have their turn.
const LET_GO: usize = 16;

impl EventLoop {
    /// Begins to keep account of what changes, and tells what there is, in ascending order. None may be dormant.
    pub(crate) fn begin_lending(&mut self) -> Vec<Key> {
        debug_assert!(self.dormant.is_none(), "all have been woken");
        self.reclaim();
        self.lending = true;
        self.watch_doors();
        let mut keys: Vec<Key> = self.connections.keys().copied().collect();
        keys.sort_unstable();
        keys
    }

    /// Shows some of those that there were, as far as they are still there. One that is not relayed yet is handed over at the
    /// freeze.
    pub(crate) fn lend(&mut self, keys: &[Key], snapshots: &mut Vec<Snapshot>) {
        for &key in keys {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.offered = connection.stage == Stage::Relaying;
            if connection.offered {
                snapshots.push(Snapshot::of(key, connection, None));
            }
            // What is in a pipe travels at the freeze, even if nothing changes until then.
            let has_pipe = connection.up.pipe.is_some() || connection.down.pipe.is_some();
            if !connection.offered || has_pipe {
                self.touch(key);
            }
        }
    }

    /// Keeps account no longer.
    pub(crate) fn reclaim(&mut self) {
        if mem::take(&mut self.lending) {
            for connection in self.connections.values_mut() {
                (connection.offered, connection.touched) = (false, false);
            }
            self.touched = Vec::new();
            self.ended = Vec::new();
            self.watch_doors();
        }
    }

    /// Those that have changed or are new, and those that have ended. Connections on the way from another loop arrive here first.
    pub(crate) fn changes(&mut self) -> (Vec<Key>, Vec<Key>) {
        self.adopt();
        (self.touched.clone(), self.ended.clone())
    }

    /// Another process has everything: lets go of it plainly, some at a time, as long as this thread gives way. To close a poller at
    /// once takes long, and nobody who waits for its processor goes first. What is registered there is freed some milliseconds later
    /// (after a grace period of RCU), in an interrupt: up to 3 ms of it in one go where 10,000 have come together, and otherwise a
    /// few (`qhimark` and `rcu_resched_ns` of Linux's rcutree).
    pub(crate) fn let_go(&mut self) {
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        for (done, key) in keys.into_iter().enumerate() {
            if !courtesy::gives_way() {
                return;
            }
            let Some(connection) = self.connections.remove(&key) else { continue };
            for side in [Side::Client, Side::Backend] {
                // One that is not relayed yet may not be registered.
                let _ = connection.socket(side).map(|socket| deregister(&self.registry, socket.as_fd()));
            }
            drop(connection);
            courtesy::step(done, LET_GO);
        }
    }

    /// Ends everything.
    pub(crate) fn stop(&mut self) {
        self.wake_all();
        self.adopt();
        for door in mem::take(&mut self.doors) {
            if door.home && door.kind == Kind::UnixListener {
                socket::remove_path(&door.socket);
            }
        }
        let keys: Vec<_> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.end(key, How::Stopped));
    }
}
