//! Programs of different ages meet: the conversation goes on in a version that both speak, or ends before anything is offered.

mod support;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;

use heirloom::channel::{Channel, Incoming};
use heirloom::control::{Client, FailureCode, Hello, Reply, Request, VersionRange, Welcome};
use heirloom::descriptors::{Wait, send_with};
use heirloom::protocol::{ToIncumbent, VERSIONS};
use heirloom::{Bundle, Config, NoRequests, Replace, Service, Start, StartError};
use rustix::event::{PollFd, PollFlags, poll};
use support::*;

fn service() -> Service {
    Service::new("test").program("tester", "1.2.3")
}

/// What a program of another age says.
fn hello(protocol: VersionRange, schema: VersionRange) -> Hello {
    Hello {
        protocol,
        service: "test".into(),
        program: "other tester".into(),
        version: "7.8".into(),
        pid: std::process::id(),
        schema,
        room: 1000,
        generation: None,
        force: false,
    }
}

/// What it is answered.
fn answer(control: &std::path::Path, hello: Hello) -> Reply {
    let mut client = Client::connect(control).expect("somebody serves");
    client.request(&Request::<NoRequests>::Takeover(hello)).expect("an answer")
}

#[test]
fn a_newer_successor_that_still_speaks_our_version_gets_it() {
    let scratch = Scratch::new();
    let incumbent = fresh(&scratch.control(), &service());
    let server = thread::spawn(|| serve(incumbent, Bundle::new()));
    let newer = hello(VersionRange::new(VERSIONS.min, VERSIONS.max + 2), VersionRange::new(1, 5));
    match answer(&scratch.control(), newer) {
        Reply::Takeover(welcome) => assert_eq!((welcome.protocol, welcome.schema), (VERSIONS.max, 1)),
        other => panic!("{other:?}"),
    }
    wait_for("the incumbent to find it gone", || !status(&scratch.control()).takeover_running);
    assert_eq!(status(&scratch.control()).last_takeover.expect("one").outcome, "resumed");
    let offered = successor(&scratch.control(), &service()).receive().unwrap();
    offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

#[test]
fn a_successor_without_a_version_in_common_is_refused_with_both_ranges_and_programs() {
    let scratch = Scratch::new();
    let incumbent = fresh(&scratch.control(), &service());
    let server = thread::spawn(|| serve(incumbent, Bundle::new()));
    let (one, next) = (VersionRange::new(1, 1), VersionRange::new(VERSIONS.max + 1, VERSIONS.max + 2));
    for (hello, code, ranges) in [
        (hello(next, one), FailureCode::Protocol, [VERSIONS.to_string(), next.to_string()]),
        (hello(VERSIONS, next), FailureCode::Schema, ["schema 1".into(), next.to_string()]),
        // When nothing fits, the conversation comes first.
        (hello(next, next), FailureCode::Protocol, [VERSIONS.to_string(), next.to_string()]),
    ] {
        let Reply::Error(failure) = answer(&scratch.control(), hello) else { panic!("it was admitted") };
        assert_eq!(failure.code, code);
        for part in [&ranges[0], &ranges[1], "tester 1.2.3", "other tester 7.8"] {
            assert!(failure.message.contains(part), "{part:?} is not in: {failure}");
        }
        let status = status(&scratch.control());
        assert!(!status.takeover_running);
        let last = status.last_takeover.expect("it remembers the refusal");
        assert_eq!((last.outcome, last.reason), ("refused".into(), Some(failure.message)));
    }
    let offered = successor(&scratch.control(), &service()).receive().unwrap();
    offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

/// An incumbent that goes on in versions of its own choice, and then hears what the successor makes of that.
fn headstrong(protocol: u32, schema: u32) -> (Scratch, PathBuf, thread::JoinHandle<ToIncumbent>) {
    let scratch = Scratch::new();
    let control = scratch.path("test.sock");
    let listener = UnixListener::bind(&control).expect("bind");
    let incumbent = thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("accept");
        let (ours, theirs) = Channel::pair().expect("socketpair");
        let welcome = Welcome {
            protocol,
            generation: 3,
            pid: std::process::id(),
            program: "other tester".into(),
            version: "7.8".into(),
            schema,
            items: 1,
            outsider: false,
        };
        send_with(&client, &Reply::Takeover(welcome).to_line(), &[theirs.as_fd()], Wait::Block)
            .expect("send");
        drop(theirs);
        client.flush().expect("flush");
        loop {
            match ours.receive().expect("a packet") {
                Incoming::Packet { bytes, descriptors } => {
                    return ToIncumbent::from_packet(&bytes, descriptors.len()).expect("a message");
                }
                Incoming::Closed => panic!("it was closed without a word"),
                Incoming::Empty => {
                    let limit = LONG.try_into().expect("short");
                    assert_ne!(
                        poll(&mut [PollFd::new(&ours, PollFlags::IN)], Some(&limit)).expect("poll"),
                        0
                    );
                }
            }
        }
    });
    (scratch, control, incumbent)
}

#[test]
fn an_incumbent_that_goes_on_in_a_version_that_was_not_offered_is_told_why_and_left() {
    let next = VERSIONS.max + 1;
    for (protocol, schema, parts) in [
        (next, 1, [format!("takeover protocol {next}"), format!("speaks {VERSIONS}")]),
        (0, 1, ["takeover protocol 0".into(), format!("speaks {VERSIONS}")]),
        (VERSIONS.max, 9, ["schema 9".into(), "reads 1..=1".into()]),
    ] {
        let (_scratch, control, incumbent) = headstrong(protocol, schema);
        let started = heirloom::start::<NoRequests>(&control, service(), Config::default(), Replace::Must);
        let error = match started {
            Err(error @ StartError::Version { .. }) => error.to_string(),
            Ok(Start::Successor(_)) => panic!("it goes on in protocol {protocol}, schema {schema}"),
            other => panic!("{other:?}"),
        };
        for part in [parts[0].as_str(), &parts[1], "incumbent (other tester 7.8)", "successor (tester 1.2.3)"]
        {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
        assert_eq!(incumbent.join().expect("it hears"), ToIncumbent::Abort { reason: error });
    }
}
