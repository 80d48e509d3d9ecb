//! Clients that go at a bad moment, and applications that say what is not true: neither holds up nor ends the service.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use heirloom::manifest::{Base, Delta};
use heirloom::{
    Bundle, Config, ConnectionId, HandoverError, Incumbent, ItemId, Outcome, Replace, Service, Start, Turn,
};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use support::{Scratch, fresh, successor, wait_for};

/// The one request of these tests' applications.
#[derive(Debug, Deserialize)]
enum Later {
    Wait,
}

fn serve_later(control: &Path) -> Incumbent<Later> {
    match heirloom::start(control, Service::new("test"), Config::default(), Replace::Never) {
        Ok(Start::Fresh(incumbent)) => incumbent,
        other => panic!("{other:?}"),
    }
}

/// Sends a request and defers its answer.
fn deferred(incumbent: &mut Incumbent<Later>, control: &Path) -> (UnixStream, ConnectionId) {
    let mut client = UnixStream::connect(control).expect("connect");
    client.write_all(b"\"Wait\"\n").expect("write");
    let mut connection = None;
    wait_for("the request", || {
        if let Turn::Request(mut asked) = incumbent.turn(Instant::now()).expect("a turn") {
            assert!(matches!(asked.request(), Some(Later::Wait)));
            asked.watch();
            connection = Some(asked.defer());
        }
        connection.is_some()
    });
    (client, connection.expect("waited for"))
}

fn is_readable(incumbent: &Incumbent<Later>) -> bool {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(incumbent, PollFlags::IN)], Some(&now)).expect("poll") > 0
}

#[test]
fn a_client_that_hangs_up_while_a_reply_is_owed_is_let_go() {
    let scratch = Scratch::new();
    let control = scratch.control();
    let mut incumbent = serve_later(&control);
    let (client, connection) = deferred(&mut incumbent, &control);
    drop(client);
    let mut closed = None;
    wait_for("the end of the connection", || {
        if let Turn::Closed(id) = incumbent.turn(Instant::now()).expect("a turn") {
            closed = Some(id);
        }
        closed.is_some()
    });
    assert_eq!(closed, Some(connection));
    assert!(matches!(incumbent.turn(Instant::now()).expect("a turn"), Turn::Idle));
    assert!(!is_readable(&incumbent), "an idle incumbent would be polled in a circle");
    assert!(!incumbent.answer_later(connection, b"too late\n".to_vec(), Vec::new()));
}

#[test]
fn a_client_that_has_only_ended_its_sending_gets_its_reply() {
    let scratch = Scratch::new();
    let control = scratch.control();
    let mut incumbent = serve_later(&control);
    let (mut client, connection) = deferred(&mut incumbent, &control);
    client.shutdown(Shutdown::Write).expect("shutdown");
    for _ in 0..10 {
        assert!(matches!(incumbent.turn(Instant::now()).expect("a turn"), Turn::Idle));
    }
    assert!(!is_readable(&incumbent), "an idle incumbent would be polled in a circle");
    assert!(incumbent.answer_later(connection, b"\"At last\"\n".to_vec(), Vec::new()));
    wait_for("the end of the connection", || {
        matches!(incumbent.turn(Instant::now()).expect("a turn"), Turn::Closed(_))
    });
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "\"At last\"\n");
}

/// Offers an empty bundle, and gives the frozen takeover to `release`.
fn frozen<T>(release: impl FnOnce(heirloom::Freeze<'_, heirloom::NoRequests>) -> T) -> (T, String) {
    let scratch = Scratch::new();
    let control = scratch.control();
    let service = Service::new("test");
    let mut incumbent = fresh(&control, &service);
    let other = std::thread::spawn(move || successor(&control, &service).receive()?.ready().map(|_| ()));
    let bundle = Bundle::new();
    let mut release = Some(release);
    let mut result = None;
    wait_for("the freeze", || {
        match incumbent.turn(Instant::now()).expect("a turn") {
            Turn::Offer(offer) => offer.begin_bundle(&bundle).expect("an offer"),
            Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
            Turn::Freeze(freeze) => result = release.take().map(|release| release(freeze)),
            _ => {}
        }
        result.is_some()
    });
    let error = other.join().expect("no panic").expect_err("it was not handed over");
    (result.expect("waited for"), error.to_string())
}

#[test]
fn a_delta_that_ends_more_than_there_is_hands_nothing_over() {
    let delta = Delta { ended: (1..=9).map(ItemId).collect(), next_id: 10, ..Delta::default() };
    let (outcome, _) = frozen(|freeze| freeze.release(delta, |_| None));
    assert!(matches!(outcome, Ok(Outcome::Resumed(_)) | Err(_)), "{outcome:?}");
}

#[test]
fn the_successor_is_told_why_a_delta_could_not_be_made() {
    let now = Base { items: vec![entry(5), entry(4)], next_id: 6, ..Base::default() };
    let (outcome, said) = frozen(|freeze| freeze.release_all(now, |_| None));
    let Err(HandoverError::Manifest(error)) = outcome else { panic!("{outcome:?}") };
    assert!(said.contains(&error.to_string()), "the successor heard {said:?} instead of {error}");
}

fn entry(id: u64) -> heirloom::Entry {
    heirloom::Entry { id: ItemId(id), name: "item".into(), kind: heirloom::Kind::File, state: Vec::new() }
}
