//! What a loop does for a handover: it shows what there is, and keeps account of what changes until the freeze.

use std::mem;

use heirloom::Kind;

use super::EventLoop;
use crate::connection::{How, Stage};
use crate::handover::Snapshot;
use crate::id::Key;
use crate::socket;

impl EventLoop {
    /// Begins to keep account, and shows what there is. A connection that is not relayed yet is handed over at the freeze.
    pub(crate) fn lend(&mut self, snapshots: &mut Vec<Snapshot>) {
        self.wake_all();
        self.lending = true;
        self.touched.clear();
        self.ended.clear();
        for (&key, connection) in &mut self.connections {
            connection.offered = connection.stage == Stage::Relaying;
            // What is in a pipe travels at the freeze, even if nothing changes until then.
            let has_pipe = connection.up.pipe.is_some() || connection.down.pipe.is_some();
            connection.touched = !connection.offered || has_pipe;
            if connection.touched {
                self.touched.push(key);
            }
            if connection.offered {
                snapshots.push(Snapshot::of(key, connection, None));
            }
        }
    }

    pub(crate) fn reclaim(&mut self) {
        self.lending = false;
        self.touched = Vec::new();
        self.ended = Vec::new();
    }

    /// Those that have changed or are new, and those that have ended. Connections on the way from another loop arrive here first.
    pub(crate) fn changes(&mut self) -> (Vec<Key>, Vec<Key>) {
        for (key, mut connection) in self.shared.loops[self.number].take() {
            connection.touched = true;
            self.connections.insert(key, connection);
            self.waiting.push_back(key);
            self.touched.push(key);
        }
        (self.touched.clone(), self.ended.clone())
    }

    /// Ends everything.
    pub(crate) fn stop(&mut self) {
        self.wake_all();
        for door in mem::take(&mut self.doors) {
            if door.kind == Kind::UnixListener {
                socket::remove_path(&door.socket);
            }
        }
        let keys: Vec<_> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.end(key, How::Stopped));
    }
}
