//! Which connections are to be looked at when, though nothing has happened.

use std::collections::BTreeSet;

use crate::clock::Time;
use crate::id::Key;

/// At most one moment for each connection, which the connection itself knows.
#[derive(Debug, Default)]
pub(crate) struct Timers(BTreeSet<(Time, Key)>);

impl Timers {
    /// Sets the moment of a connection, in place of the one before.
    pub(crate) fn set(&mut self, key: Key, before: &mut Option<Time>, at: Option<Time>) {
        if *before == at {
            return;
        }
        if let Some(before) = before.take() {
            self.0.remove(&(before, key));
        }
        if let Some(at) = at {
            self.0.insert((at, key));
        }
        *before = at;
    }

    pub(crate) fn next(&self) -> Option<Time> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes one that is due.
    pub(crate) fn take_due(&mut self, now: Time) -> Option<Key> {
        let first = self.0.first().copied().filter(|(at, _)| *at <= now)?;
        self.0.remove(&first);
        Some(first.1)
    }
}
