//! Who does not talk all the time: guests that come, say a line and leave, and those that read only at the end.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::ears::{Ear, numbered};
use super::guests::Guest;

/// How many are there before it begins, and leave then.
const LEAVERS: usize = 4;
/// How many come at a time.
const COMERS: usize = 2;
/// So many have come and gone when it is over, at least.
pub(crate) const AT_LEAST: usize = LEAVERS + COMERS;

/// Reads what one hears who has not read until now: the last lines of these have to be in it.
pub(crate) fn listen_to_the_end<'n>(mut guest: Guest, to: impl Iterator<Item = &'n String>) -> Ear {
    let (mut ear, mut to): (_, HashSet<&String>) = (Ear::default(), to.collect());
    while !to.is_empty() {
        if let Some(heard) = ear.hear(&guest.line())
            && heard.is_last
        {
            to.remove(&heard.who);
        }
    }
    ear
}

/// Those who come and go while something is done to the server.
pub(crate) struct Traffic {
    done: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(Vec<String>, u64)>>,
}

impl Traffic {
    pub(crate) fn start(address: SocketAddr) -> Traffic {
        let done: Arc<AtomicBool> = Arc::default();
        let leavers: Vec<Guest> = (0..LEAVERS).map(|_| Guest::join(address)).collect();
        let leaving = std::thread::spawn(move || (leavers.into_iter().map(leave).collect(), 0));
        let coming = (0..COMERS).map(|_| {
            let done = done.clone();
            std::thread::spawn(move || {
                let (mut names, mut lost) = (Vec::new(), 0);
                while names.is_empty() || !done.load(Ordering::Relaxed) {
                    match Guest::try_join(address) {
                        Some(guest) => names.push(leave(guest)),
                        None => lost += 1,
                    }
                }
                (names, lost)
            })
        });
        let threads = coming.chain([leaving]).collect();
        Traffic { done, threads }
    }

    /// Lets nobody come any more; the names of all who came, and how many were not let in.
    pub(crate) fn finish(self) -> (Vec<String>, u64) {
        self.done.store(true, Ordering::Relaxed);
        let (names, lost): (Vec<_>, Vec<_>) =
            self.threads.into_iter().map(|thread| thread.join().expect("everything is heard")).unzip();
        (names.into_iter().flatten().collect(), lost.into_iter().sum())
    }
}

/// Says one line, and leaves, having heard everything until then.
fn leave(mut guest: Guest) -> String {
    guest.say(numbered(0));
    guest.shutdown();
    let mut ear = Ear::default();
    while let Some(line) = guest.try_line().expect("a clean end") {
        ear.hear(&line);
    }
    guest.name
}
