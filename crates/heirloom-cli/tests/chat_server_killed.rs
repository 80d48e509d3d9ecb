//! A chat server that is killed over and over while everybody talks, and some come and go: under `heirloom run` nobody's
//! connection ends, and nobody's line is lost, repeated, in disorder or torn, for anybody.

mod support;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use support::ears::*;
use support::guests::*;
use support::random::Random;
use support::supervised::{Supervised, kill};
use support::talk::Talk;
use support::*;

/// How often the server is killed, unless HEIRLOOM_KILLS says so.
const KILLS: u64 = 50;
/// How many talk all the time.
const TALKERS: usize = 50;
/// How many lines are said to one who does not read: more than the kernel keeps for it.
const UNHEARD: u64 = 120_000;
/// How many are there before a kill, and leave in it.
const LEAVERS: usize = 4;
/// How many come in a kill at a time.
const COMERS: usize = 2;
/// How many kills there are between two takeovers, after which `heirloom run` forgets failures and starts again soon.
const KILLS_IN_A_ROW: u64 = 2;

#[test]
fn everybody_hears_everything() {
    let scratch = Scratch::new();
    let mut server = Supervised::start(&scratch, &["--backlog", "256M"]);
    let address = server.address;
    let mut random = Random::seeded();

    // These two do not read until the end. One of them talks: a line across each kill.
    let deaf = Guest::join_narrow(address);
    let mut hesitant = Guest::join(address);
    let unheard: String = (0..UNHEARD).map(numbered).collect();
    hesitant.say(&unheard);
    wait_for("the server to read it", || status(&server.chat).counters["bytes_in"] == unheard.len() as u64);
    let talkers: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let names: Vec<String> = talkers.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(talkers, &names);

    let kills = kills();
    let (mut visitors, mut not_let_in, mut times) = (Vec::new(), 0, Vec::new());
    let (mut in_takeovers, mut took_over) = (0, 0);
    for round in 0..kills {
        talk.wait_for_progress();
        let mut bytes = numbered(UNHEARD + round).into_bytes().into_iter();
        bytes.by_ref().take(5).for_each(|byte| hesitant.say([byte]));
        let traffic = Traffic::start(address);
        let hesitating = std::thread::spawn(move || {
            for byte in bytes.by_ref().take(20) {
                hesitant.say([byte]);
                std::thread::yield_now();
            }
            (hesitant, bytes)
        });
        let killed = if round % KILLS_IN_A_ROW == 1 {
            // In a takeover, or soon after it: then the successor goes on alone, or a third one does.
            let incumbent = server.pid();
            let mut upgrade = Process::start(&mut server.upgrade());
            // The stimulus, not a wait.
            std::thread::sleep(Duration::from_micros(random.below(40_000)));
            kill(incumbent);
            in_takeovers += 1;
            server.wait_for_next(incumbent);
            let status = upgrade.wait();
            took_over += u64::from(status.code() == Some(0));
            talk.wait_for_progress();
            server.kill()
        } else {
            // Some of what everybody says arrives while nobody serves.
            std::thread::sleep(Duration::from_micros(random.below(5_000)));
            server.kill()
        };
        times.push(server.wait_for_next(killed));
        let bytes;
        (hesitant, bytes) = hesitating.join().expect("the server reads");
        bytes.for_each(|byte| hesitant.say([byte]));
        let (names, lost) = traffic.finish();
        visitors.extend(names);
        not_let_in += lost;
    }
    talk.wait_for_progress();
    hesitant.say(last(UNHEARD + kills));

    // How many lines each has said, and what each has heard.
    let mut said = HashMap::from([(hesitant.name.clone(), UNHEARD + kills + 1)]);
    let mut ears = HashMap::new();
    for talker in talk.finish() {
        said.insert(talker.guest.name.clone(), talker.said);
        ears.insert(talker.guest.name, talker.ear);
    }
    ears.insert(deaf.name.clone(), listen_to_the_end(deaf, said.keys()));
    ears.insert(hesitant.name.clone(), listen_to_the_end(hesitant, names.iter()));
    said.extend(visitors.iter().map(|name| (name.clone(), 1)));
    let left = &ears[&names[0]].left;
    let mut heard = 0;
    for (listener, ear) in &ears {
        for (name, &said) in said.iter().filter(|(name, _)| *name != listener) {
            assert_eq!(ear.count(name), said, "of {name} {listener} has heard another number of lines");
            heard += said;
        }
        // Everybody hears of all who come and go, in the same order.
        assert_eq!(ear.left.len(), visitors.len());
        assert_eq!(&ear.left, left);
    }
    let counters = status(&server.chat).counters;
    assert_eq!(counters["lines_in"], said.values().sum::<u64>(), "they are counted over all processes");
    times.sort();
    println!(
        "{} kills ({in_takeovers} in takeovers, {took_over} of which were reported to have succeeded): {} lines said, {heard} heard, none \
         lost or repeated; {} came and left, {not_let_in} were not let in; until somebody serves: median {:?}, longest {:?}",
        kills + in_takeovers,
        said.values().sum::<u64>(),
        visitors.len(),
        times[times.len() / 2],
        times[times.len() - 1],
    );
    let log = server.stop();
    let complaints: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("cut off") || line.contains("cutting") || line.contains("resetting"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}

fn kills() -> u64 {
    match std::env::var("HEIRLOOM_KILLS") {
        Ok(count) => count.parse().expect("HEIRLOOM_KILLS is a number"),
        Err(_) => KILLS,
    }
}

/// Reads what one hears who has not read until now: the last lines of these have to be in it.
fn listen_to_the_end<'n>(mut guest: Guest, to: impl Iterator<Item = &'n String>) -> Ear {
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

/// Those who come and go while the server is killed.
struct Traffic {
    done: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(Vec<String>, u64)>>,
}

impl Traffic {
    fn start(address: SocketAddr) -> Traffic {
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
    fn finish(self) -> (Vec<String>, u64) {
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
