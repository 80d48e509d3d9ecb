//! Who goes first on a busy machine: a thread that gets something ready has much to do, and nobody waits for it as long as somebody
//! else serves.
//!
//! Linux lets a thread run on for some milliseconds when others become ready, on the processor that they last had. A thread that
//! [gives way](give_way) instead works in [steps](step) of some microseconds, after each of which whoever waits for its
//! processor goes first, here or in another process. Its share of the processors stays what it is: it is never starved. What it may
//! wait at once is a slice of 10 ms for each other thread that wants its processor. The programs that it starts begin as it is; while
//! one does, and if there are at most four processors, a thread on each (called `reminder`) has the kernel look who waits, for 5 ms.
//!
//! Nothing gives way by itself: a program that serves in other threads than that of its control socket may ask for it there, and has
//! to [take its turn](take_turns) as any other from just before its freeze. It takes no privileges. Before Linux 6.12 only the
//! steps are there.

use std::cell::Cell;
use std::time::{Duration, Instant};

use heirloom_sys::{set_time_slice, time_slice};

mod reminder;

/// The time slice of a thread that works in steps: the shorter, the less it loses by letting others go first.
const IN_STEPS: Duration = Duration::from_micros(100);
/// The time slice of one that does something long that is no step: whatever becomes ready goes first. It is not longer than such
/// things are, since who has it waits until each of the others has had as much, and who yields gives up what is left of it (Linux
/// 6.18).
const AT_LENGTH: Duration = Duration::from_millis(10);
/// How often the kernel is reminded of others while a program starts: for about as long as one of ours takes to come to its first
/// step.
const REMINDERS: u32 = 40;

thread_local! {
    /// How long the calling thread has asked to wait for others, in all that is left; zero for one that takes its turns.
    static PATIENCE: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// The calling thread gives way from now on, as do the threads and programs that it starts.
///
/// ```
/// use heirloom::courtesy;
///
/// courtesy::give_way();
/// for task in 0..1000 {
///     // … some microseconds of work …
///     courtesy::step(task, 100);
/// }
/// courtesy::take_turns();
/// ```
pub fn give_way() {
    give_way_for(Duration::MAX);
}

/// As [`give_way`], until the calling thread has waited so long for others, in all; from then on it takes its turn. It is for what is
/// to be over soon even on a machine that has no processor to spare.
///
/// ```
/// use heirloom::courtesy;
/// use std::time::Duration;
///
/// courtesy::give_way_for(Duration::from_millis(20));
/// (0..1000).for_each(|task| courtesy::step(task, 100));
/// courtesy::take_turns();
/// ```
pub fn give_way_for(patience: Duration) {
    PATIENCE.set(patience);
    set(IN_STEPS);
}

/// The calling thread takes its turn as any other, after it, or who has started it, gave way.
pub fn take_turns() {
    PATIENCE.set(Duration::ZERO);
    // Whoever has started this thread may have given way; a slice that somebody else has chosen stays.
    if let Ok(Some(IN_STEPS | AT_LENGTH)) = time_slice() {
        set(Duration::ZERO);
    }
}

/// Whether the calling thread gives way.
pub fn gives_way() -> bool {
    !PATIENCE.get().is_zero()
}

/// The calling thread does nothing any more for which somebody waits, and does it at length: it ends its process, for example.
pub fn step_back() {
    set(AT_LENGTH);
}

/// One of many things has been done, the last of this number: after each so many of them others go first, if the calling thread gives
/// way.
pub fn step(done: usize, of: usize) {
    if of > 0 && done.is_multiple_of(of) {
        next_step();
    }
}

/// A step has been done: others go first, if the calling thread gives way.
pub fn next_step() {
    if !gives_way() {
        return;
    }
    let began = Instant::now();
    std::thread::yield_now();
    match PATIENCE.get().saturating_sub(began.elapsed()) {
        Duration::ZERO => take_turns(),
        left => PATIENCE.set(left),
    }
}

/// Starts a program, which is not ready when this returns: others go first all the while if the calling thread gives way.
pub(crate) fn starting<T>(start: impl FnOnce() -> T) -> T {
    if !gives_way() {
        return start();
    }
    let patience = PATIENCE.get();
    reminder::remind(REMINDERS);
    step_back();
    let started = start();
    give_way_for(patience);
    started
}

fn set(slice: Duration) {
    if let Err(error) = set_time_slice(slice) {
        tracing::debug!(%error, "cannot set a time slice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Duration {
        time_slice().unwrap().unwrap()
    }

    #[test]
    fn who_gives_way_gets_back_what_it_had_also_as_another_thread_and_twice_is_once() {
        std::thread::spawn(|| {
            let before = now();
            give_way();
            let away = now();
            give_way();
            assert_eq!(now(), away);
            starting(|| assert!(now() == AT_LENGTH || now() == before));
            assert_eq!(now(), away);
            std::thread::spawn(move || {
                assert_eq!(now(), away);
                take_turns();
                assert_eq!(now(), before);
                take_turns();
                starting(|| assert_eq!(now(), before));
            })
            .join()
            .unwrap();
            take_turns();
            assert_eq!(now(), before);
            step_back();
            take_turns();
            assert_eq!(now(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn who_has_waited_long_enough_takes_its_turn() {
        std::thread::spawn(|| {
            let before = now();
            give_way_for(Duration::from_nanos(1));
            next_step();
            assert_eq!((now(), gives_way()), (before, false));
            give_way_for(Duration::from_secs(3600));
            next_step();
            starting(|| ());
            let left = PATIENCE.get();
            assert!(left > Duration::ZERO && left < Duration::from_secs(3600), "{left:?}");
            take_turns();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_slice_that_somebody_else_has_chosen_is_left_alone_by_who_did_not_give_way() {
        std::thread::spawn(|| {
            set_time_slice(Duration::from_millis(20)).unwrap();
            let chosen = now();
            take_turns();
            assert_eq!(now(), chosen);
        })
        .join()
        .unwrap();
    }
}
