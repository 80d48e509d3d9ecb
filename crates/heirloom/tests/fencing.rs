//! A successor that has the service lock and says nothing more: what the incumbent does about it is configured. That it is killed by default
//! is shown with real processes (`heirloom-cli`, `tests/failures.rs`); here both are in one.

mod support;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use heirloom::channel::{Channel, Incoming, SendError};
use heirloom::control::{Client, Hello, Reply, Request, VersionRange};
use heirloom::lock::{LockFile, ServiceLock, lock_path};
use heirloom::protocol::{Fencing, ToIncumbent, ToSuccessor, VERSIONS};
use heirloom::runtime::blocking;
use heirloom::{Bundle, Config, Incumbent, NoRequests, Outcome, Replace, Service, Start, Turn};
use rustix::event::{PollFd, PollFlags, poll};
use support::*;

/// How long a successor may keep the lock.
const FENCE: Duration = Duration::from_millis(100);

/// An incumbent that serves until its second takeover has ended, or until it has to exit; how each takeover ended.
fn serving(scratch: &Scratch, fencing: Fencing) -> thread::JoinHandle<Vec<Outcome>> {
    let mut config = Config { fencing, ..Config::default() };
    (config.times.taken, config.times.fence) = (FENCE, FENCE);
    let started = heirloom::start(&scratch.control(), Service::new("test"), config, Replace::Never);
    let Ok(Start::Fresh(mut incumbent)) = started else { panic!("{started:?}") };
    thread::spawn(move || {
        let mut outcomes = Vec::new();
        while outcomes.len() < 2 && !matches!(outcomes.last(), Some(Outcome::Superseded(_))) {
            blocking::wait(&incumbent, &mut Vec::new(), None).expect("wait");
            turns(&mut incumbent, &mut outcomes);
        }
        outcomes
    })
}

fn turns(incumbent: &mut Incumbent, outcomes: &mut Vec<Outcome>) {
    let bundle = Bundle::new();
    loop {
        match incumbent.turn(Instant::now()).expect("a turn") {
            Turn::Idle => return,
            Turn::Offer(offer) => offer.begin_bundle(&bundle).expect("an offer"),
            Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
            Turn::Freeze(freeze) => {
                outcomes.push(freeze.release_bundle(&bundle).expect("a release"));
                return;
            }
            Turn::Request(_) | Turn::Closed(_) | Turn::Quit(_) | Turn::Delegated(_) => {}
        }
    }
}

/// A successor that has got everything, and the lock.
fn up_to_the_lock(control: &Path) -> (Channel, ServiceLock) {
    let hello = Hello {
        protocol: VERSIONS,
        service: "test".into(),
        program: "tester".into(),
        version: "1".into(),
        pid: std::process::id(),
        schema: VersionRange::new(1, 1),
        room: 1000,
        generation: None,
        force: false,
    };
    let mut client = Client::connect(control).expect("it listens");
    client.send(&Request::<NoRequests>::Takeover(hello)).expect("send");
    let (line, mut descriptors) = client.receive().expect("an answer");
    assert!(matches!(Reply::parse(&line), Ok(Reply::Takeover(_))), "{}", String::from_utf8_lossy(&line));
    let channel = Channel::adopt(descriptors.pop().expect("a channel")).expect("a channel");
    loop {
        let answer = match next(&channel).expect("it goes on") {
            ToSuccessor::Batch { .. } => ToIncumbent::Credit,
            ToSuccessor::Offered => ToIncumbent::Ready,
            ToSuccessor::Freeze => ToIncumbent::Accept,
            ToSuccessor::Offer => continue,
            ToSuccessor::Released => break,
            ToSuccessor::Abort { reason } => panic!("{reason}"),
        };
        channel.send(&answer.to_packet(), &[]).expect("send");
    }
    let file = LockFile::open(lock_path(control)).expect("the lock file");
    let lock = file.lock_until(Instant::now() + LONG).map_err(|(_, error)| error).expect("it was released");
    (channel, lock)
}

/// The next message; none at the end.
fn next(channel: &Channel) -> Option<ToSuccessor> {
    loop {
        match channel.receive().expect("a packet") {
            Incoming::Packet { bytes, descriptors } => {
                return Some(ToSuccessor::from_packet(&bytes, descriptors.len()).expect("a message"));
            }
            Incoming::Closed => return None,
            Incoming::Empty => {
                let limit = LONG.try_into().expect("short");
                assert_ne!(poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&limit)).expect("poll"), 0);
            }
        }
    }
}

/// Waits until the incumbent, which has sent its Abort, has stopped receiving: what is sent before counts.
fn cannot_commit(channel: &Channel) {
    let harmless = ToIncumbent::Abort { reason: "as you like".into() }.to_packet();
    let until = Instant::now() + LONG;
    while !matches!(channel.send(&harmless, &[]), Err(SendError::Closed)) {
        assert!(Instant::now() < until, "it goes on receiving");
    }
    let sent = channel.send(&ToIncumbent::Taken.to_packet(), &[]);
    assert!(matches!(sent, Err(SendError::Closed)), "{sent:?}");
}

#[test]
fn whoever_waits_serves_when_the_lock_is_free() {
    let scratch = Scratch::new();
    let incumbent = serving(&scratch, Fencing::Wait);
    let (channel, lock) = up_to_the_lock(&scratch.control());
    assert!(matches!(next(&channel), Some(ToSuccessor::Abort { .. })));
    cannot_commit(&channel);
    // Far longer than it would be let live otherwise: that nothing happens can only be waited for.
    thread::sleep(5 * FENCE);
    assert!(!incumbent.is_finished());
    drop(lock);
    let good = loop {
        match heirloom::start::<NoRequests>(
            &scratch.control(),
            Service::new("test"),
            Config::default(),
            Replace::Must,
        ) {
            Ok(Start::Successor(successor)) => break successor,
            // Until the other takeover has ended.
            Err(heirloom::StartError::Refused(failure)) if failure.message.contains("is going on") => {}
            other => panic!("{other:?}"),
        }
    };
    good.receive().unwrap().ready().unwrap().accept::<NoRequests>().unwrap();
    let outcomes = incumbent.join().expect("no panic");
    assert!(matches!(outcomes[..], [Outcome::Resumed(_), Outcome::Taken(_)]), "{outcomes:?}");
}

#[test]
fn whoever_gives_up_exits_and_leaves_the_lock_to_the_other() {
    let scratch = Scratch::new();
    let incumbent = serving(&scratch, Fencing::GiveUp);
    let (channel, _lock) = up_to_the_lock(&scratch.control());
    let outcomes = incumbent.join().expect("no panic");
    let [Outcome::Superseded(reason)] = &outcomes[..] else { panic!("{outcomes:?}") };
    assert!(reason.to_string().starts_with("at step taken: "), "{reason}");
    assert!(matches!(next(&channel), Some(ToSuccessor::Abort { .. })));
    cannot_commit(&channel);
}
