//! A busy chat server that is replaced very often, by successors of which some are killed on the way: nobody's line is lost
//! or repeated, and nothing grows: no descriptor, no memory, no process is left behind.
//!
//! `HEIRLOOM_SOAK` says how often (`CONTRIBUTING.md`); `HEIRLOOM_SEED` repeats a run.

mod rogue;
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use rogue::{Plot, Role};
use rustix::process::Signal;
use support::generations::Generations;
use support::guests::*;
use support::proc::{
    Footprint, Memory, holds_lock, is_stopped, memory, naming, settled_footprint, wait_for_footprint,
};
use support::random::Random;
use support::talk::{Talk, assert_everything_was_heard};
use support::*;

/// How many talk all the time.
const TALKERS: usize = 50;
/// How often the server is replaced, unless the environment says otherwise.
const HANDOVERS: u64 = 60;
/// For each so many replacements a successor is killed. One that gets through before it is killed is made up for in the next rounds.
const KILLED: u64 = 3;
/// One replacement in so many is in place.
const IN_PLACE: u64 = 5;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

#[test]
fn nothing_is_lost_and_nothing_grows() {
    let handovers = handovers();
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (first, address) = serve(&control, &[]);
    let mut generations = Generations::new(first, &control);
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    talk.wait_for_progress();
    // The first one has grown with its clients, the second has got all of them at once, as every later one.
    generations.replace(successor(&control));
    talk.wait_for_progress();
    let descriptors = descriptors(&mut generations);

    let begun = Instant::now();
    let mut killer = Killer::new(&control);
    let (mut samples, mut in_place, mut pauses) = (Vec::new(), 0, Vec::new());
    for round in 0..handovers {
        let is_due = killer.kills() * KILLED <= round;
        let killed = is_due.then(|| killer.kill_one(&mut random, &mut generations));
        let last = match killed {
            Some(Some(survivor)) => generations.replace(survivor),
            _ if random.one_in(IN_PLACE) => {
                in_place += 1;
                generations.upgrade_in_place()
            }
            _ => {
                let asked = Instant::now();
                let last = generations.replace(successor(&control));
                killer.took(asked.elapsed());
                last
            }
        };
        pauses.push(last.pause_us.expect("there was a freeze"));
        talk.wait_for_progress();
        samples.push(memory(generations.current().id()));
        if round % 100 == 99 {
            println!("{} handovers in {:?}", round + 1, begun.elapsed());
        }
    }
    let took = begun.elapsed();
    // While everybody talks: a takeover keeps no descriptor to itself.
    wait_for("as many descriptors as at the beginning", || {
        Footprint::of(generations.current().id()).descriptors() == descriptors
    });

    let talkers = talk.finish();
    let said: u64 = talkers.iter().map(|talker| talker.said).sum();
    assert_everything_was_heard(&talkers);
    assert_eq!(status(&control).counters["lines_in"], said, "they are counted over all generations");
    assert_eq!(status(&control).generation, handovers + 1);
    assert_eq!(naming(&control), [generations.current().id()], "a process lingers");

    pauses.sort_unstable();
    println!(
        "{handovers} handovers ({in_place} in place) in {took:.1?}; {said} lines said, each heard by {} others; pause: \
         median {} µs, longest {} µs",
        TALKERS - 1,
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1],
    );
    killer.print();
    assert!(killer.kills() * 5 >= handovers, "only {} successors were killed", killer.kills());
    let tenth = samples.len().div_ceil(10);
    let before = Memory::median(&samples[..tenth]);
    let after = Memory::median(&samples[samples.len() - tenth..]);
    println!("memory of the serving process: {before} in the first tenth, {after} in the last");
    println!("descriptors of the serving process: {descriptors}");
    after.assert_not_more_than(&before);
    generations.current().signal(Signal::TERM);
    generations.current().wait_for_code(0);
}

/// One incumbent that outlives all of its successors keeps nothing of them, wherever they die.
#[test]
fn an_incumbent_whose_successors_all_die_does_not_grow() {
    const POINTS: [&str; 9] =
        ["hello", "offer", "batch", "offered", "ready", "freeze", "accept", "released", "locked"];
    let deaths = handovers() / 3;
    let mut random = Random::seeded();
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &[]);
    let mut guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let mut dies = |point| {
        let plot = Plot { role: Role::Successor, point, act: "pause" };
        let mut rogue = rogue::start(plot, &control, "server 127.0.0.1:0");
        rogue::wait_until_there(&rogue);
        rogue.kill();
        wait_for("the incumbent to go on", || {
            let last = status(&control).last_takeover;
            last.is_some_and(|last| last.peer_pid == Some(rogue.id()) && last.outcome == "resumed")
        });
    };
    // What it makes room for once, it keeps.
    POINTS.into_iter().for_each(&mut dies);
    let (descriptors, before) = (settled_footprint(server.id()), memory(server.id()));
    for _ in 0..deaths {
        dies(POINTS[random.below(POINTS.len() as u64) as usize]);
    }
    wait_for_footprint("what it held at the beginning", server.id(), &descriptors);
    let after = memory(server.id());
    println!("memory: {before}; after {deaths} successors more {after}");
    after.assert_not_more_than(&before);
    assert_eq!(naming(&control), [server.id()], "a process lingers");
    let said = format!("<{}> still here", guests[0].name);
    guests[0].say("still here\n");
    while guests[1].line() != said {}
    server.signal(Signal::TERM);
    server.wait_for_code(0);
}

fn handovers() -> u64 {
    match std::env::var("HEIRLOOM_SOAK") {
        Ok(count) => count.parse().expect("HEIRLOOM_SOAK is a number"),
        Err(_) => HANDOVERS,
    }
}

fn successor(control: &Path) -> Process {
    Process::start(&mut listening("127.0.0.1:0", control, &[]))
}

/// How many descriptors the server has while nobody asks it anything.
fn descriptors(generations: &mut Generations) -> usize {
    settled_footprint(generations.current().id()).descriptors()
}

/// Kills successors at random moments before they serve.
struct Killer<'p> {
    control: &'p Path,
    /// How long a takeover takes that is not disturbed, from the start of the program to the end of the incumbent.
    usual: Duration,
    /// How many died at which step, as the incumbent saw it.
    deaths: BTreeMap<String, u64>,
    too_late: u64,
}

impl Killer<'_> {
    fn new(control: &Path) -> Killer<'_> {
        Killer { control, usual: Duration::from_millis(20), deaths: BTreeMap::new(), too_late: 0 }
    }

    /// A takeover that was not disturbed took so long.
    fn took(&mut self, time: Duration) {
        self.usual = (self.usual * 7 + time) / 8;
    }

    fn kills(&self) -> u64 {
        self.deaths.values().sum()
    }

    fn print(&self) {
        println!(
            "{} successors were killed, {} escaped; the incumbent saw them end:",
            self.kills(),
            self.too_late
        );
        for (step, count) in &self.deaths {
            println!("{count:>6} {step}");
        }
    }

    /// Starts a successor, kills it at a random moment, and waits until the incumbent goes on. One that serves by then, or is
    /// about to, is returned: nobody could take over from that if it died.
    ///
    /// It is stopped first, to look how far it has come: up to the lock it cannot have sent Taken.
    fn kill_one(&mut self, random: &mut Random, generations: &mut Generations) -> Option<Process> {
        let mut doomed = successor(self.control);
        let incumbent = generations.current();
        // The start of a program takes far longer than the takeover: half of them are waited for.
        let longest = if random.one_in(2) {
            let begun = format!("takeover begins successor=pid {} ", doomed.id());
            while !incumbent.stderr().contains(&begun) && doomed.is_running() {
                std::hint::spin_loop();
            }
            Duration::from_millis(3)
        } else {
            self.usual
        };
        // The stimulus, not a wait.
        std::thread::sleep(Duration::from_micros(random.below(longest.as_micros() as u64)));
        doomed.signal(Signal::STOP);
        wait_for("it to be stopped", || is_stopped(doomed.id()));
        if holds_lock(doomed.id(), &heirloom::lock::lock_path(self.control)) || !incumbent.is_running() {
            self.too_late += 1;
            doomed.signal(Signal::CONT);
            return Some(doomed);
        }
        doomed.kill();
        doomed.wait();
        let mut step = String::new();
        wait_for("the incumbent to go on", || {
            let Some(status) = try_status(self.control) else { return false };
            let last = status.last_takeover.filter(|last| last.peer_pid == Some(doomed.id()));
            step = match last {
                Some(last) => {
                    assert_eq!(last.outcome, "resumed", "{last:?}");
                    let reason = last.reason.expect("a reason");
                    reason.split(':').next().unwrap_or_default().to_owned()
                }
                None => "before it asked".to_owned(),
            };
            !status.takeover_running
        });
        *self.deaths.entry(step).or_default() += 1;
        None
    }
}
