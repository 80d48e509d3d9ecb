//! A user who has too many descriptors in flight, sent and not yet received (`ETOOMANYREFS`, `unix(7)`): whoever asks is told, a
//! takeover waits, and the incumbent serves all the while. Root has no such limit.

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use heirloom::channel::{Channel, SendError};
use heirloom::control::{Client, FailureCode, Reply, Request};
use heirloom::runtime::blocking;
use heirloom::{
    Bundle, Config, Incumbent, NoRequests, Outcome, Replace, Service, Start, StartError, TakeoverError, Turn,
};
use rustix::process::{Resource, Rlimit, geteuid, setrlimit};
use support::*;

/// Set in the process that has the limit.
const LIMITED: &str = "HEIRLOOM_TEST_LIMITED";
/// Its limit on open files.
const LIMIT: u64 = 200;
/// What the incumbent has.
const ITEMS: usize = 20;

/// In a process of its own, whose limit is low, and of a user of its own, because all of a user's descriptors count.
#[test]
fn whoever_has_too_many_descriptors_in_flight_waits_and_is_told() {
    if std::env::var_os(LIMITED).is_some() {
        let limit = Some(LIMIT);
        setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).expect("setrlimit");
        who_asks_is_told();
        a_takeover_goes_on_when_there_is_room();
        a_takeover_for_which_there_is_no_room_in_time_is_rolled_back();
        return;
    }
    if !geteuid().is_root() {
        return skip("only root can become a user who has nothing in flight");
    }
    let scratch = Scratch::new();
    let directory = scratch.path("public");
    std::fs::create_dir(&directory).expect("mkdir");
    let program = directory.join("test");
    std::fs::copy(std::env::current_exe().expect("this program"), &program).expect("copy");
    for path in [directory.parent().expect("the scratch directory"), &directory, &program] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("chmod");
    }
    let user = 200_000 + std::process::id();
    let output = Command::new(&program)
        .args(["--exact", "whoever_has_too_many_descriptors_in_flight_waits_and_is_told", "--nocapture"])
        .env(LIMITED, "1")
        .uid(user)
        .gid(user)
        .current_dir("/")
        .output()
        .expect("it can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{complaints}");
}

/// Descriptors that are in flight until it is dropped.
struct Hog {
    _ends: (Channel, std::os::fd::OwnedFd),
}

impl Hog {
    /// Sends descriptors until no more can be.
    fn new() -> Hog {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        let null = File::open("/dev/null").expect("open");
        let mut sent = 0;
        loop {
            // Not a divisor of the limit: when one or two others have arrived there are too many still.
            match ours.send(b"x", &[null.as_fd(); 49]) {
                Ok(()) => sent += 49,
                Err(error @ SendError::InFlight { limit }) => {
                    assert_eq!(limit, LIMIT);
                    assert!(error.to_string().contains("200"), "{error}");
                    break;
                }
                Err(error) => panic!("after {sent}: {error}"),
            }
        }
        assert!((LIMIT..LIMIT + 100).contains(&sent), "{sent} were sent");
        Hog { _ends: (ours, theirs) }
    }
}

fn service() -> Service {
    Service::new("test")
}

fn bundle() -> Bundle {
    let mut bundle = Bundle::new();
    for number in 0..ITEMS {
        bundle.add_plain(format!("item {number}"), File::open("/dev/null").expect("open")).expect("added");
    }
    bundle
}

fn serving(scratch: &Scratch, config: Config) -> Incumbent {
    match heirloom::start(&scratch.control(), service(), config, Replace::Never) {
        Ok(Start::Fresh(incumbent)) => incumbent,
        other => panic!("{other:?}"),
    }
}

fn takes_over(control: &Path) -> Result<heirloom::Taken<NoRequests>, TakeoverError> {
    successor(control, &service()).receive()?.ready()?.accept::<NoRequests>()
}

/// A reply that carries a descriptor cannot be sent; one that does not can.
fn who_asks_is_told() {
    let scratch = Scratch::new();
    let incumbent = serving(&scratch, Config::default());
    let server = thread::spawn(|| serve(incumbent, bundle()));
    let hog = Hog::new();
    let mut client = Client::connect(scratch.control()).expect("it listens");
    assert_eq!(client.request(&Request::<NoRequests>::Ping).expect("an answer"), Reply::Pong);
    match client.request(&Request::<NoRequests>::Inspect).expect("an answer") {
        Reply::Error(failure) => assert!(failure.message.contains("in flight"), "{failure}"),
        other => panic!("{other:?}"),
    }
    match heirloom::start::<NoRequests>(&scratch.control(), service(), Config::default(), Replace::Try) {
        Err(StartError::Refused(failure)) => {
            assert_eq!(failure.code, FailureCode::Failed);
            assert!(failure.message.contains("in flight"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    wait_for("the takeover to end", || !status(&scratch.control()).takeover_running);
    drop(hog);
    let taken = takes_over(&scratch.control()).expect("there is room again");
    assert_eq!(taken.bundle.close_rest().len(), ITEMS);
    server.join().expect("it is replaced");
}

/// Turns until it has waited so often, or has been taken over from. When there is something to offer, there is a hog first.
fn turns(incumbent: &mut Incumbent, bundle: &Bundle, hog: &mut Option<Hog>, waits: usize) -> bool {
    for _ in 0..waits {
        blocking::wait(incumbent, &mut Vec::new(), Some(Instant::now() + Duration::from_millis(20)))
            .expect("wait");
        loop {
            match incumbent.turn(Instant::now()).expect("a turn") {
                Turn::Idle => break,
                Turn::Offer(offer) => {
                    *hog = Some(Hog::new());
                    offer.begin_bundle(bundle).expect("an offer");
                }
                Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
                Turn::Freeze(freeze) => match freeze.release_bundle(bundle).expect("a delta") {
                    Outcome::Taken(_) => return true,
                    other => panic!("{other:?}"),
                },
                Turn::Request(_) | Turn::Closed(_) | Turn::Quit(_) | Turn::Delegated(_) => {}
            }
        }
    }
    false
}

fn a_takeover_goes_on_when_there_is_room() {
    let scratch = Scratch::new();
    let mut incumbent = serving(&scratch, Config::default());
    let (bundle, mut hog) = (bundle(), None);
    let control = scratch.control();
    let successor = thread::spawn(move || takes_over(&control).map(|taken| taken.bundle.close_rest().len()));
    // It tries again and again, and answers meanwhile.
    while hog.is_none() {
        assert!(!turns(&mut incumbent, &bundle, &mut hog, 1));
    }
    assert!(!turns(&mut incumbent, &bundle, &mut hog, 10));
    assert!(!successor.is_finished());
    drop(hog.take());
    while !turns(&mut incumbent, &bundle, &mut None, 1) {}
    assert_eq!(successor.join().expect("no panic").expect("it has taken over"), ITEMS);
}

fn a_takeover_for_which_there_is_no_room_in_time_is_rolled_back() {
    let scratch = Scratch::new();
    let mut config = Config::default();
    config.times.offer = Duration::from_millis(200);
    let mut incumbent = serving(&scratch, config);
    let (bundle, mut hog) = (bundle(), None);
    let control = scratch.control();
    let successor = thread::spawn(move || takes_over(&control).map(|_| ()));
    wait_for("the end of the takeover", || {
        assert!(!turns(&mut incumbent, &bundle, &mut hog, 1));
        successor.is_finished()
    });
    let error = successor.join().expect("no panic").expect_err("it was rolled back").to_string();
    assert!(error.contains("at step offer"), "{error}");
    // The hog is still there, and the incumbent serves.
    let control = scratch.control();
    let asked = thread::spawn(move || status(&control));
    while !asked.is_finished() {
        assert!(!turns(&mut incumbent, &bundle, &mut hog, 1));
    }
    let last = asked.join().expect("an answer").last_takeover.expect("one");
    assert_eq!(last.outcome, "resumed");
    assert!(last.reason.expect("a reason").starts_with("at step offer: "));
    assert!(hog.is_some());
}
