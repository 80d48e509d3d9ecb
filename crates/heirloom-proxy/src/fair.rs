//! A mutex that nobody has twice in a row while somebody else waits for it.
//!
//! A loop that has much to do takes the lock of its state again as soon as it has let go of it, before anybody whom that has woken
//! is there: with a plain mutex who hands over, or asks for a report, waits for seconds.

use std::sync::{LockResult, Mutex, MutexGuard};

#[derive(Debug)]
pub(crate) struct FairMutex<T> {
    /// Held by who is next.
    next: Mutex<()>,
    state: Mutex<T>,
}

impl<T> FairMutex<T> {
    pub(crate) fn new(state: T) -> FairMutex<T> {
        FairMutex { next: Mutex::new(()), state: Mutex::new(state) }
    }

    /// The error is that somebody has panicked with it, as in [`Mutex::lock`].
    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        // There is nothing behind this one that could be in disorder.
        let _next = self.next.lock();
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn who_waits_has_it_before_others_have_it_twice() {
        let (lock, turns, over) = (FairMutex::new(()), AtomicU64::new(0), AtomicBool::new(false));
        let give_up = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) && Instant::now() < give_up {
                    let _held = lock.lock();
                    turns.fetch_add(1, Ordering::SeqCst);
                    let until = Instant::now() + Duration::from_millis(1);
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                }
            });
            for _ in 0..50 {
                // Who waits is the one that is next.
                let next = lock.next.lock().unwrap();
                let before = turns.load(Ordering::SeqCst);
                let held = lock.state.lock().unwrap();
                drop(next);
                assert!(turns.load(Ordering::SeqCst) <= before + 1);
                drop(held);
                // The other one is in between each time.
                let now = turns.load(Ordering::SeqCst);
                while turns.load(Ordering::SeqCst) == now && Instant::now() < give_up {
                    std::thread::yield_now();
                }
            }
            over.store(true, Ordering::SeqCst);
        });
    }
}
