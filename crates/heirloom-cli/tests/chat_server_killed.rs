//! A chat server that is killed over and over, or told to stop, while everybody talks, and some come and go: under `heirloom run`
//! nobody's connection ends, and nobody's line is lost, repeated, in disorder or torn, for anybody.

mod support;

use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rustix::process::Signal;
use support::ears::*;
use support::guests::*;
use support::random::Random;
use support::supervised::Supervised;
use support::talk::Talk;
use support::traffic::{Traffic, listen_to_the_end};
use support::*;

/// How often the server is killed, unless HEIRLOOM_KILLS says so.
const KILLS: u64 = 50;
/// How many talk all the time.
const TALKERS: usize = 50;
/// How many lines are said to one who does not read: more than the kernel keeps for it.
const UNHEARD: u64 = 120_000;

/// More than anybody will have unsent.
const BACKLOG: [&str; 2] = ["--backlog", "256M"];

#[test]
fn everybody_hears_everything() {
    let scratch = Scratch::new();
    let server = Supervised::start(&scratch, &BACKLOG);
    let mut takeovers = Takeovers::default();
    hears_everything(server, kills(), |server, round, random| kill(server, round, random, &mut takeovers));
    println!(
        "{} kills in takeovers, of which {} took place all the same, and {} of successors that had just taken over",
        takeovers.killed_incumbents, takeovers.took_place, takeovers.killed_successors
    );
}

/// As `systemctl restart` does: a signal, and the next process. It leaves everything to that.
#[test]
fn everybody_hears_everything_when_it_is_told_to_stop_and_started_again() {
    let scratch = Scratch::new();
    let server = Supervised::start_with(&scratch, &["--restart", "always"], &BACKLOG);
    hears_everything(server, kills() / 2, |server, round, random| {
        if round % 5 == 4 {
            server.upgrade_in_place();
        }
        // The stimulus, not a wait.
        std::thread::sleep(Duration::from_micros(random.below(5_000)));
        let told = server.pid();
        server.signal(told, if random.one_in(2) { Signal::TERM } else { Signal::INT });
        told
    });
}

/// `heirloom run` is PID 1 of a container, and is upgraded in between.
#[test]
fn everybody_hears_everything_in_a_pid_namespace_whose_first_process_is_run() {
    let scratch = Scratch::new();
    let Some(server) = Supervised::start_as_init(&scratch, &BACKLOG) else { return };
    let mut takeovers = Takeovers::default();
    hears_everything(server, kills() / 3, |server, round, random| {
        if round % 5 == 4 {
            server.upgrade_run();
        }
        kill(server, round, random, &mut takeovers)
    });
}

/// Ends the process that serves so often, in a way that says which it was.
fn hears_everything(
    mut server: Supervised,
    rounds: u64,
    mut end: impl FnMut(&mut Supervised, u64, &mut Random) -> u32,
) {
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

    let (mut visitors, mut not_let_in, mut times) = (Vec::new(), 0, Vec::new());
    for round in 0..rounds {
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
        let ended = end(&mut server, round, &mut random);
        times.push(server.wait_for_next(ended));
        let bytes;
        (hesitant, bytes) = hesitating.join().expect("the server reads");
        bytes.for_each(|byte| hesitant.say([byte]));
        let (names, lost) = traffic.finish();
        visitors.extend(names);
        not_let_in += lost;
    }
    talk.wait_for_progress();
    hesitant.say(last(UNHEARD + rounds));

    // How many lines each has said, and what each has heard.
    let mut said = HashMap::from([(hesitant.name.clone(), UNHEARD + rounds + 1)]);
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
        "{rounds} processes ended; {} lines were said, {heard} heard, none lost or repeated; {} came and left, {not_let_in} were not \
         let in; until somebody serves: median {:?}, longest {:?}",
        said.values().sum::<u64>(),
        visitors.len(),
        times[times.len() / 2],
        times[times.len() - 1],
    );
    let log = server.stop();
    let complaints: Vec<&str> =
        log.lines().filter(|line| line.contains("cut off") || line.contains("resetting")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}

/// What became of takeovers in which somebody was killed.
#[derive(Default)]
struct Takeovers {
    killed_incumbents: u64,
    /// In spite of that.
    took_place: u64,
    killed_successors: u64,
}

/// Kills the process that serves, each time in another way.
fn kill(server: &mut Supervised, round: u64, random: &mut Random, takeovers: &mut Takeovers) -> u32 {
    match round % 4 {
        0 => kill_in_takeover(server, random, takeovers),
        1 => {
            server.upgrade_in_place();
            server.kill()
        }
        _ => {
            // Some of what everybody says arrives while nobody serves. The stimulus, not a wait.
            std::thread::sleep(Duration::from_micros(random.below(5_000)));
            server.kill()
        }
    }
}

/// Begins a takeover, and kills the incumbent in the middle of it, or the successor soon after it. Returns whom.
fn kill_in_takeover(server: &mut Supervised, random: &mut Random, takeovers: &mut Takeovers) -> u32 {
    let incumbent = server.pid();
    let begun = || server.log().matches("takeover begins").count();
    let before = begun();
    let mut upgrade = Process::start(&mut server.upgrade());
    wait_for("the takeover to begin", || begun() > before || !upgrade.is_running());
    let killed = if random.one_in(2) {
        // The stimulus, not a wait.
        std::thread::sleep(Duration::from_micros(random.below(3_000)));
        server.kill_one(incumbent);
        takeovers.killed_incumbents += 1;
        incumbent
    } else {
        // It is refused if the supervisor has not taken everything yet.
        wait_for("the takeover", || {
            !upgrade.is_running() || try_status(&server.chat).is_some_and(|status| status.pid != incumbent)
        });
        let killed = server.kill();
        takeovers.killed_successors += u64::from(killed != incumbent);
        killed
    };
    let succeeded = upgrade.wait().code() == Some(0);
    takeovers.took_place += u64::from(killed == incumbent && succeeded);
    killed
}

fn kills() -> u64 {
    match std::env::var("HEIRLOOM_KILLS") {
        Ok(count) => count.parse().expect("HEIRLOOM_KILLS is a number"),
        Err(_) => KILLS,
    }
}

#[test]
fn a_socket_of_the_supervisors_is_used() {
    let scratch = Scratch::new();
    let mut server = Supervised::start_with(&scratch, &["--listen", "127.0.0.1:0"], &[]);
    let mut guests = [Guest::join(server.address), Guest::join(server.address)];
    guests[0].hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", guests[1].name)]);
    for round in 0..3 {
        guests[0].say(format!("{round} "));
        let killed = server.kill();
        server.wait_for_next(killed);
        guests[0].say("here\n");
        guests[1].hears(&[&format!("<{}> {round} here", guests[0].name)]);
    }
    // It is still where it was.
    Guest::join(server.address);
    server.stop();
}

#[test]
fn a_quit_ends_everything_and_leaves_nothing_in_the_store() {
    let scratch = Scratch::new();
    let mut server = Supervised::start_with(&scratch, &["--restart", "always"], &[]);
    let mut guest = Guest::join(server.address);
    let ended = server.pid();
    Process::start(heirloom().args(["quit", "--control"]).arg(&server.chat)).wait_for_code(0);
    assert_eq!(guest.try_line().expect("an orderly end"), None);
    server.wait_for_next(ended);
    let names: Vec<String> = status(&server.chat).items.into_iter().map(|item| item.name).collect();
    assert_eq!(names, ["listener", "journal", "heirloom.ledger"]);
    assert!(!server.log().contains("going on where"), "{}", server.log());
    server.stop();
}

/// Where there is no next process, connections end with the store.
#[test]
fn a_stop_of_the_supervisor_ends_everything() {
    let scratch = Scratch::new();
    let server = Supervised::start(&scratch, &[]);
    let mut guest = Guest::join(server.address);
    let log = server.stop();
    assert_eq!(guest.try_line().expect("an orderly end"), None);
    assert!(log.contains("everything is left in the store"), "{log}");
}

/// Everything is handed over to one that has no store, and by that one to one that has: which begins a store anew.
#[test]
fn a_program_without_a_store_comes_in_between() {
    let scratch = Scratch::new();
    let mut server = Supervised::start_with(&scratch, &["--restart", "always"], &[]);
    let mut guests = [Guest::join(server.address), Guest::join(server.address)];
    guests[0].hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", guests[1].name)]);
    guests[0].say("one, ");
    let killed = server.kill();
    server.wait_for_next(killed);
    guests[0].say("two, ");
    let mut between = Process::start(&mut listening("127.0.0.1:0", &server.chat, &[]));
    // The supervisor starts the next one when the first has ended, and that takes over again.
    between.wait_for_code(0);
    guests[0].say("three, ");
    let killed = server.kill();
    server.wait_for_next(killed);
    guests[0].say("four\n");
    guests[1].hears(&[&format!("<{}> one, two, three, four", guests[0].name)]);
    assert!(between.stderr().contains("there is none here"), "{}", between.stderr());
    server.stop();
}

/// What a supervisor is told, of any kind.
#[test]
fn the_supervisor_is_told() {
    let scratch = Scratch::new();
    let (control, path) = (scratch.path("chat.sock"), scratch.path("notify"));
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(LONG)).expect("setsockopt");
    let mut told = String::new();
    let mut hear = |what: &str| {
        let mut buffer = [0; 4096];
        while !told.contains(what) {
            let length =
                socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{error}; no {what:?} in {told}"));
            told.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        std::mem::take(&mut told)
    };
    let mut command = listening("127.0.0.1:0", &control, &[]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000");
    let mut server = Process::start(&mut command);
    let begun = hear(&format!("READY=1\nMAINPID={}\n", server.id()));
    // The ledger, the journal, the listener.
    assert_eq!(begun.matches("FDSTORE=1").count(), 3, "{begun}");
    hear("STATUS=clients: 0");
    let guest = Guest::join(address_of(&server));
    let joined = hear("STATUS=clients: 1");
    assert_eq!(joined.matches("FDSTORE=1").count(), 1, "{joined}");
    let mut upgrade = heirloom();
    upgrade.args(["upgrade", "--program", "/bin/false", "--control"]).arg(&control);
    Process::start(&mut upgrade).wait_for_code(5);
    hear(&format!("READY=1\nMAINPID={}\nSTATUS=clients: 1; upgrade rolled back: it ended", server.id()));
    let mut successor = Process::start(&mut command);
    hear(&format!("READY=1\nMAINPID={}\n", successor.id()));
    server.wait_for_code(0);
    hear("WATCHDOG=1");
    drop(guest);
    let left = hear("STATUS=clients: 0");
    assert_eq!(left.matches("FDSTOREREMOVE=1").count(), 1, "{left}");
    successor.signal(Signal::TERM);
    hear("STOPPING=1");
    successor.wait_for_code(0);
}
