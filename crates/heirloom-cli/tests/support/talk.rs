//! Guests who all talk at once, all the time, and listen to each other: busy, and never so far ahead that what the others
//! have said is not heard.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::ears::{Ear, last, numbered};
use super::guests::Guest;
use super::wait_for;

/// Every so many of them sends each byte by itself.
const STUTTERS: usize = 10;
/// How many lines a talker says ahead of the others, who have to be heard.
const AHEAD: u64 = 4;

/// Everybody who talks.
pub(crate) struct Talk {
    stop: Arc<AtomicBool>,
    /// How many lines the first one has said.
    progress: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Talker>>,
}

impl Talk {
    pub(crate) fn start(guests: Vec<Guest>, names: &[String]) -> Talk {
        let (stop, progress): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let talker = |(number, guest): (usize, Guest)| {
            let mut talker = Talker {
                ear: Ear::from_the_start(
                    // Of those who came later it hears that they came.
                    &names[..number],
                ),
                stutters: number % STUTTERS == 0,
                said: 0,
                heard: Vec::new(),
                others: names.iter().filter(|name| **name != guest.name).cloned().collect(),
                guest,
            };
            let (stop, progress) =
                (stop.clone(), if number == 1 { progress.clone() } else { Arc::default() });
            std::thread::spawn(move || {
                talker.talk(&stop, &progress);
                talker
            })
        };
        let threads = guests.into_iter().enumerate().map(talker).collect();
        Talk { stop, progress, threads }
    }

    /// Waits until everybody has said some more.
    pub(crate) fn wait_for_progress(&self) {
        let before = self.progress.load(Ordering::Relaxed);
        wait_for("the talk to go on", || {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "somebody has stopped talking");
            self.progress.load(Ordering::Relaxed) >= before + 2 * AHEAD
        });
    }

    /// Lets everybody come to an end.
    pub(crate) fn finish(self) -> Vec<Talker> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().expect("everything is heard")).collect()
    }
}

/// Everybody has heard every line of all others, and nobody was disconnected.
#[track_caller]
pub(crate) fn assert_everything_was_heard(talkers: &[Talker]) {
    for listener in talkers {
        for speaker in talkers.iter().filter(|speaker| speaker.guest.name != listener.guest.name) {
            let heard = listener.ear.count(&speaker.guest.name);
            assert_eq!(heard, speaker.said, "lines of {} at {}", speaker.guest.name, listener.guest.name);
        }
        assert!(listener.ear.left.is_empty(), "somebody was disconnected");
    }
}

pub(crate) struct Talker {
    pub(crate) guest: Guest,
    pub(crate) ear: Ear,
    stutters: bool,
    pub(crate) said: u64,
    /// By the number of a line, how many of the others have said it.
    heard: Vec<usize>,
    others: HashSet<String>,
}

impl Talker {
    /// Talks until it is to stop, and listens until all others have stopped.
    fn talk(&mut self, stop: &AtomicBool, progress: &AtomicU64) {
        let (mut ended, mut others_ended) = (false, 0);
        while !ended || others_ended < self.others.len() {
            while !ended && (stop.load(Ordering::Relaxed) || self.is_its_turn()) {
                ended = stop.load(Ordering::Relaxed);
                let line = if ended { last(self.said) } else { numbered(self.said) };
                if self.stutters {
                    line.bytes().for_each(|byte| self.guest.say([byte]));
                } else {
                    self.guest.say(line);
                }
                self.said += 1;
                progress.store(self.said, Ordering::Relaxed);
            }
            if others_ended == self.others.len() {
                continue;
            }
            let line = self.guest.line();
            if let Some(heard) = self.ear.hear(&line) {
                // Visitors and the like count for nothing.
                let number = heard.number as usize;
                self.heard.resize(self.heard.len().max(number + 1), 0);
                let is_talker = self.others.contains(&heard.who);
                self.heard[number] += usize::from(is_talker);
                others_ended += usize::from(is_talker && heard.is_last);
            }
        }
    }

    /// Whether all others have been heard, up to a few lines.
    fn is_its_turn(&self) -> bool {
        match self.said.checked_sub(AHEAD) {
            None => true,
            Some(number) => self.heard.get(number as usize) == Some(&self.others.len()),
        }
    }
}
