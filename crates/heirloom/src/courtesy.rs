//! Who goes first on a busy machine: a thread that gets something ready has much to do, and nobody waits for it as long as somebody
//! else serves.
//!
//! Linux lets a thread run on for some milliseconds when others become ready, on the processor that they last had. A thread that
//! [gives way](give_way) instead works in [steps](step) of some microseconds, after each of which whoever waits for its
//! processor goes first, here or in another process. Its share of the processors stays what it is: it is never starved. The
//! programs that it starts begin as it is.
//!
//! Nothing gives way by itself: a program that serves in other threads than that of its control socket may ask for it there, and has
//! to [take its turn](take_turns) as any other from just before its freeze. It takes no privileges. Before Linux 6.12 only the
//! steps are there.

use std::cell::Cell;
use std::time::Duration;

use heirloom_sys::{set_time_slice, time_slice};

/// The time slice of a thread that works in steps: the shorter, the less it loses by letting others go first.
const IN_STEPS: Duration = Duration::from_micros(100);
/// The time slice of one that does something long that is no step: whatever becomes ready goes first.
const AT_LENGTH: Duration = Duration::from_millis(100);

thread_local! {
    /// The calling thread has asked to.
    static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
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
    GIVES_WAY.set(true);
    set(IN_STEPS);
}

/// The calling thread takes its turn as any other, after it, or who has started it, gave way.
pub fn take_turns() {
    GIVES_WAY.set(false);
    // Whoever has started this thread may have given way; a slice that somebody else has chosen stays.
    if let Ok(Some(IN_STEPS | AT_LENGTH)) = time_slice() {
        set(Duration::ZERO);
    }
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
    if GIVES_WAY.get() {
        std::thread::yield_now();
    }
}

/// Does something long, and lets others go first meanwhile if the calling thread gives way.
pub(crate) fn at_length<T>(work: impl FnOnce() -> T) -> T {
    if !GIVES_WAY.get() {
        return work();
    }
    step_back();
    let done = work();
    give_way();
    done
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
            at_length(|| assert!(now() == AT_LENGTH || now() == before));
            assert_eq!(now(), away);
            std::thread::spawn(move || {
                assert_eq!(now(), away);
                take_turns();
                assert_eq!(now(), before);
                take_turns();
                at_length(|| assert_eq!(now(), before));
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
    fn a_slice_that_somebody_else_has_chosen_is_left_alone_by_who_did_not_give_way() {
        std::thread::spawn(|| {
            set_time_slice(Duration::from_millis(10)).unwrap();
            let chosen = now();
            take_turns();
            assert_eq!(now(), chosen);
        })
        .join()
        .unwrap();
    }
}
