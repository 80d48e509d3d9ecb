//! Records on their way from the relay's loops to the thread that writes them.
//!
//! A put never waits, but for another's turn at the queue; a full queue drops what comes. A wake-up would cost a loop more than the
//! line itself: the thread, once woken, waits a moment for more, and is told of none of them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::record::AccessRecord;

/// How many records may wait.
pub(super) const CAPACITY: usize = 8_192;
/// With so many, the thread waits for no more.
const MANY: usize = CAPACITY / 4;
/// How long the thread waits for more.
const MOMENT: Duration = Duration::from_millis(20);

/// The queue between many loops and one thread.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// There is something for the thread to do.
    work: Condvar,
    /// Something is written, or the thread has ended.
    progress: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<AccessRecord>,
    /// Whether the thread sleeps until it is told.
    asleep: bool,
    /// How many somebody waits for: as many as were taken in when the last one began to wait.
    wanted: u64,
    /// How many were taken in, and how many of these are done with.
    taken: u64,
    done: u64,
    dropped: u64,
    /// No more are taken in; the thread gives up then if it cannot write.
    closing: Option<Instant>,
    /// The thread has ended.
    ended: bool,
}

impl Queue {
    /// Takes a record in, or drops it for want of room.
    pub(super) fn put(&self, record: AccessRecord) -> bool {
        let mut state = self.lock();
        if state.waiting.len() >= CAPACITY || state.closing.is_some() || state.ended {
            state.dropped += 1;
            return false;
        }
        state.waiting.push_back(record);
        state.taken += 1;
        let wake = std::mem::take(&mut state.asleep) || state.waiting.len() == MANY;
        drop(state);
        if wake {
            self.work.notify_one();
        }
        true
    }

    /// How many records were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Waits until everything that was taken in is done with, no longer than until then; whether it is.
    pub(super) fn flush(&self, until: Instant) -> bool {
        let mut state = self.lock();
        let wanted = state.taken;
        state.wanted = wanted;
        self.work.notify_one();
        while state.done < wanted && !state.ended {
            state = match until.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => wait(&self.progress, state, left),
                _ => return false,
            };
        }
        state.done >= wanted
    }

    /// Takes nothing in any more. The thread ends when it has written everything, or then if it cannot.
    pub(super) fn close(&self, until: Instant) {
        let mut state = self.lock();
        state.closing = Some(state.closing.map_or(until, |before| before.min(until)));
        drop(state);
        self.work.notify_one();
    }

    /// For the thread: waits for records, and puts them into `batch`; false when there will be none any more.
    pub(super) fn next(&self, batch: &mut VecDeque<AccessRecord>) -> bool {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closing.is_some() {
                return false;
            }
            state.asleep = true;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.asleep = false;
        let until = Instant::now() + MOMENT;
        while state.waiting.len() < MANY && state.wanted <= state.done && state.closing.is_none() {
            match until.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => state = wait(&self.work, state, left),
                _ => break,
            }
        }
        std::mem::swap(&mut state.waiting, batch);
        true
    }

    /// For the thread: so many of the records that it has got are done with.
    pub(super) fn done(&self, count: usize) {
        self.lock().done += count as u64;
        self.progress.notify_all();
    }

    /// For the thread: whether what cannot be written now is not to be waited for.
    pub(super) fn is_over(&self) -> bool {
        self.lock().closing.is_some_and(|until| Instant::now() >= until)
    }

    /// For the thread: waits for so long, or until the queue is closed.
    pub(super) fn pause(&self, time: Duration) {
        let state = self.lock();
        if state.closing.is_none() {
            drop(wait(&self.work, state, time));
        } else {
            drop(state);
            std::thread::sleep(time.min(Duration::from_millis(20)));
        }
    }

    /// For the thread: it ends, and what it has not done is lost.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        let lost = state.taken - state.done;
        state.dropped += lost;
        state.waiting.clear();
        drop(state);
        self.progress.notify_all();
    }

    /// Nobody panics with the lock held; if somebody did, the numbers are still right.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a>(on: &Condvar, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
    on.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
}
