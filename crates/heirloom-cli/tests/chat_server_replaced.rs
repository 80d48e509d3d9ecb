//! A chat server that is replaced over and over while everybody talks, and some come and go: nobody's line is lost,
//! repeated, in disorder or torn, for anybody.

mod support;

use std::collections::HashMap;
use std::net::TcpStream;
use std::path::Path;

use heirloom::control::LastTakeover;
use rustix::process::Signal;
use support::ears::*;
use support::generations::Generations;
use support::guests::*;
use support::talk::Talk;
use support::traffic::{AT_LEAST, Traffic, listen_to_the_end};
use support::*;

/// How often the server is replaced, by takeover and in place in turn.
const REPLACEMENTS: u64 = 50;
/// How many talk all the time.
const TALKERS: usize = 50;
/// How many lines are said to one who does not read: more than the kernel keeps for it (tcp_wmem is 4 MiB at most by
/// default).
const UNHEARD: u64 = 120_000;

#[test]
fn everybody_hears_everything() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let options = ["--backlog", "256M"];
    let (first, address) = serve(&control, &options);
    let mut generations = Generations::new(first, &control);

    // These two do not read until the end. One of them talks: a line across each replacement.
    let deaf = Guest::join_narrow(address);
    let mut hesitant = Guest::join(address);
    let unheard: String = (0..UNHEARD).map(numbered).collect();
    hesitant.say(&unheard);
    wait_for("the server to read it", || status(&control).counters["bytes_in"] == unheard.len() as u64);
    let talkers: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let names: Vec<String> = talkers.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(talkers, &names);

    let mut visitors = Vec::new();
    let mut least_carried = u64::MAX;
    for round in 0..REPLACEMENTS {
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
        let last = replace(&mut generations, round, &control, &options);
        least_carried = least_carried.min(last.bytes);
        let bytes;
        (hesitant, bytes) = hesitating.join().expect("the server reads");
        bytes.for_each(|byte| hesitant.say([byte]));
        let (names, lost) = traffic.finish();
        assert_eq!(lost, 0, "not let in");
        visitors.extend(names);
    }
    talk.wait_for_progress();
    hesitant.say(last(UNHEARD + REPLACEMENTS));

    // How many lines each has said, and what each has heard.
    let mut said = HashMap::from([(hesitant.name.clone(), UNHEARD + REPLACEMENTS + 1)]);
    let mut ears = HashMap::new();
    for talker in talk.finish() {
        said.insert(talker.guest.name.clone(), talker.said);
        ears.insert(talker.guest.name, talker.ear);
    }
    ears.insert(deaf.name.clone(), listen_to_the_end(deaf, said.keys()));
    ears.insert(hesitant.name.clone(), listen_to_the_end(hesitant, names.iter()));
    assert!(visitors.len() as u64 >= REPLACEMENTS * AT_LEAST as u64);
    said.extend(visitors.iter().map(|name| (name.clone(), 1)));
    let (came, left) = (&ears[&names[0]].came, &ears[&names[0]].left);
    for (listener, ear) in &ears {
        for (name, &said) in said.iter().filter(|(name, _)| *name != listener) {
            assert_eq!(ear.count(name), said, "of {name} {listener} has heard another number of lines");
        }
        // Everybody hears of all who come and go, in the same order.
        assert_eq!(ear.left.len(), visitors.len());
        assert_eq!(&ear.left, left);
        // Those who came before anybody talked are not heard by each other.
        assert_eq!(ear.came[ear.came.len() - visitors.len()..], came[came.len() - visitors.len()..]);
    }
    let counters = status(&control).counters;
    assert_eq!(counters["lines_in"], said.values().sum::<u64>(), "they are counted over all generations");
    assert!(
        least_carried > 1_000_000,
        "only {least_carried} bytes were carried over once, so this shows little"
    );
    generations.current().signal(Signal::TERM);
    generations.current().wait_for_code(0);
    let complaints = generations.logs();
    assert!(!complaints.contains("WARN") && !complaints.contains("ERROR"), "{complaints}");
}

/// It has nothing more to say and is still to hear something: that does not begin anew with each process.
#[test]
fn who_is_leaving_goes_on_leaving() {
    const ROUNDS: u64 = 4;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let options = ["--backlog", "256M"];
    let (first, address) = serve(&control, &options);
    let mut generations = Generations::new(first, &control);
    let (mut talker, mut leaver) = (Guest::join(address), Guest::join_narrow(address));
    talker.hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", leaver.name)]);
    let unheard: String = (0..UNHEARD).map(numbered).collect();
    talker.say(&unheard);
    wait_for("the server to read it", || status(&control).counters["bytes_in"] == unheard.len() as u64);
    leaver.shutdown();
    talker.hears(&[&format!("<announce> <{}> is disconnected.", leaver.name)]);
    for round in 0..ROUNDS {
        replace(&mut generations, round, &control, &options);
        talker.say(b"what it does not hear any more\n");
        // It is one of those who are handed over, and nobody is told anything again.
        assert!(status(&control).items.iter().any(|item| item.name == leaver.name));
    }
    wait_for("the server to read it", || status(&control).counters["lines_in"] == UNHEARD + ROUNDS);
    let mut other = Guest::join(address);
    talker.hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", other.name)]);
    talker.say(b"bye\n");
    // It may hear some of what was said just before it came.
    let bye = format!("<{}> bye", talker.name);
    while other.line() != bye {}
    let mut ear = Ear::default();
    while let Some(line) = leaver.try_line().expect("a clean end") {
        ear.hear(&line);
    }
    assert_eq!(ear.count(&talker.name), UNHEARD);
}

/// The successor has what was offered and is stopped, the server lets somebody in, the successor goes on: who came
/// meanwhile is handed over in the freeze, and was not registered ahead.
#[test]
fn who_comes_between_offer_and_freeze_is_served() {
    /// How often that has to happen. The successor is not always stopped at the right moment.
    const TIMES: usize = 3;
    /// How many are there, so that an offer takes a while.
    const CROWD: usize = 150;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &[]);
    let mut listener = Guest::join(address);
    let _crowd: Vec<Guest> = (0..CROWD).map(|_| Guest::join(address)).collect();
    let mut guests = Vec::new();
    let mut times = 0;
    while times < TIMES {
        let mut successor = Process::start(&mut listening("127.0.0.1:0", &control, &[]));
        wait_for("the takeover to begin", || {
            try_status(&control).is_some_and(|status| status.takeover_running || status.pid == successor.id())
        });
        successor.signal(Signal::STOP);
        let socket = TcpStream::connect(address).expect("the kernel queues it");
        wait_for("a greeting, or the end of the server", || is_greeted(&socket) || !server.is_running());
        let in_time = is_greeted(&socket);
        successor.signal(Signal::CONT);
        wait_for("the end of the takeover", || !server.is_running() || !successor.is_running());
        if !server.is_running() {
            server.wait_for_code(0);
            server = successor;
            times += usize::from(in_time);
        }
        guests.push(Guest::greeted(socket));
        for guest in &mut guests {
            guest.say(b"here\n");
            let said = format!("<{}> here", guest.name);
            while listener.line() != said {}
        }
    }
}

/// Whether the server has said something to a client.
fn is_greeted(socket: &TcpStream) -> bool {
    rustix::io::ioctl_fionread(socket).expect("a socket can tell") > 0
}

/// Replaces the server by another process, or by another program in the same one.
fn replace(generations: &mut Generations, round: u64, control: &Path, options: &[&str]) -> LastTakeover {
    if round % 2 == 1 {
        return generations.upgrade_in_place();
    }
    generations.replace(Process::start(&mut listening("127.0.0.1:0", control, options)))
}
