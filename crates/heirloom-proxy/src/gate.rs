//! The gate at which all loops stop for a freeze.
//!
//! A loop touches its connections only while it holds the lock of its own state, and takes that only through the gate. Who closes
//! the gate and then takes all locks has stopped every loop after at most one turn; loops that wait for events are not woken.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex};

#[derive(Debug)]
pub(crate) struct Gate {
    /// What is read at each turn.
    state: AtomicU8,
    lock: Mutex<()>,
    changed: Condvar,
}

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
/// Nobody passes any more.
const GONE: u8 = 2;

impl Gate {
    pub(crate) fn closed() -> Gate {
        Gate { state: AtomicU8::new(CLOSED), lock: Mutex::new(()), changed: Condvar::new() }
    }

    pub(crate) fn close(&self) {
        self.set(CLOSED);
    }

    pub(crate) fn open(&self) {
        self.set(OPEN);
    }

    /// Those who wait, and those who come, are to end.
    pub(crate) fn abandon(&self) {
        self.set(GONE);
    }

    fn set(&self, state: u8) {
        let _guard = self.lock.lock();
        self.state.store(state, Ordering::SeqCst);
        self.changed.notify_all();
    }

    pub(crate) fn is_open(&self) -> bool {
        self.state.load(Ordering::SeqCst) == OPEN
    }

    /// Waits while it is closed. Whether one may pass.
    pub(crate) fn pass(&self) -> bool {
        if self.is_open() {
            return true;
        }
        let mut guard = self.lock.lock().expect("nobody panics with it");
        while self.state.load(Ordering::SeqCst) == CLOSED {
            guard = self.changed.wait(guard).expect("nobody panics with it");
        }
        self.is_open()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn nobody_works_behind_a_closed_gate_and_all_go_on_when_it_opens() {
        let (gate, state, turns) = (Gate::closed(), Mutex::new(()), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while gate.pass() {
                        let _state = state.lock().unwrap();
                        if gate.is_open() {
                            turns.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
            for _ in 0..100 {
                gate.open();
                let before = turns.load(Ordering::SeqCst);
                while turns.load(Ordering::SeqCst) == before {
                    std::thread::yield_now();
                }
                gate.close();
                let held = state.lock().unwrap();
                let at = turns.load(Ordering::SeqCst);
                drop(held);
                std::thread::yield_now();
                assert_eq!(turns.load(Ordering::SeqCst), at);
            }
            gate.abandon();
        });
    }
}
