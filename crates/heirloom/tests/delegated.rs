//! Requests that an application answers itself: only those that it asked for, and never without an answer.

mod support;

use std::path::Path;
use std::time::Instant;

use heirloom::control::{Client, Failure, FailureCode, Reply, Request, Supervised};
use heirloom::upgrade::Upgrade;
use heirloom::{Config, Delegate, Delegated, Incumbent, NoRequests, Replace, Service, Start, Turn};
use support::{LONG, Scratch, wait_for};

fn serve(control: &Path, delegate: Delegate) -> Incumbent {
    let config = Config { delegate, ..Config::default() };
    match heirloom::start(control, Service::new("test"), config, Replace::Never).expect("it starts") {
        Start::Fresh(incumbent) => incumbent,
        _ => panic!("nobody is there"),
    }
}

/// Asks in a thread, and answers with `answer` what the application gets.
fn asked(
    incumbent: &mut Incumbent,
    request: Request<NoRequests>,
    mut answer: impl FnMut(Delegated<'_, NoRequests>),
) -> Reply {
    let path = incumbent.path().to_owned();
    let asking = std::thread::spawn(move || {
        let mut client = Client::connect(path).expect("it listens");
        client.set_timeout(LONG);
        client.request(&request).expect("a reply")
    });
    wait_for("the reply", || {
        match incumbent.turn(Instant::now()).expect("a turn") {
            Turn::Delegated(delegated) => answer(delegated),
            Turn::Offer(offer) => offer.refuse("nothing is offered here"),
            _ => {}
        }
        asking.is_finished()
    });
    asking.join().expect("no panic")
}

#[track_caller]
fn refused(reply: Reply) -> Failure {
    match reply {
        Reply::Error(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_status_is_what_the_application_makes_of_it() {
    let scratch = Scratch::new();
    let mut incumbent = serve(&scratch.control(), Delegate { status: true, upgrade: false });
    let reply = asked(&mut incumbent, Request::Status, |delegated| match delegated {
        Delegated::Status(asked) => {
            let supervised = Some(Supervised { state: "ready".into(), ..Supervised::default() });
            let status = heirloom::control::Status { supervised, ..asked.status() };
            asked.answer(status);
        }
        Delegated::Upgrade(_) => panic!("that was not asked for"),
    });
    match reply {
        Reply::Status(status) => {
            assert_eq!(
                (status.name.as_str(), status.supervised.expect("it").state.as_str()),
                ("test", "ready")
            );
        }
        other => panic!("{other:?}"),
    }
    let failure = refused(asked(&mut incumbent, Request::Status, |_unanswered| {}));
    assert_eq!(failure.code, FailureCode::Failed);
    // What is not delegated is the library's.
    let upgrade = Upgrade { dry_run: true, ..Upgrade::default() };
    let failure = refused(asked(&mut incumbent, Request::Upgrade(upgrade), |_| panic!("not delegated")));
    assert!(failure.message.contains("nothing is offered here"), "{failure}");
}

#[test]
fn an_upgrade_is_answered_later_refused_or_left_to_the_library() {
    let scratch = Scratch::new();
    let mut incumbent = serve(&scratch.control(), Delegate { upgrade: true, status: false });
    let request = |itself| Request::Upgrade(Upgrade { itself, generation: Some(0), ..Upgrade::default() });
    let take = |delegated: Delegated<'_, NoRequests>| match delegated {
        Delegated::Upgrade(asked) if asked.request().itself => asked.of_this_process(),
        Delegated::Upgrade(asked) => {
            assert!(asked.may_name_a_program() && asked.status().name == "test");
            asked.refuse(Failure::new(FailureCode::RolledBack, "not well"));
        }
        Delegated::Status(_) => panic!("that was not asked for"),
    };
    let failure = refused(asked(&mut incumbent, request(false), take));
    assert_eq!((failure.code, failure.message.as_str()), (FailureCode::RolledBack, "not well"));
    let failure = refused(asked(&mut incumbent, request(true), take));
    assert!(failure.message.contains("nothing is offered here"), "{failure}");
    let failure = refused(asked(&mut incumbent, request(false), |_unanswered| {}));
    assert!(failure.message.contains("no answer"), "{failure}");

    let mut waiting = None;
    let path = incumbent.path().to_owned();
    let asking = std::thread::spawn(move || heirloom::upgrade::ask(&path, Upgrade::default(), LONG));
    wait_for("the request", || {
        if let Turn::Delegated(Delegated::Upgrade(asked)) = incumbent.turn(Instant::now()).expect("a turn") {
            waiting = Some(asked.defer());
        }
        waiting.is_some()
    });
    let status = incumbent.status();
    let line = Reply::Upgraded(status.clone()).to_line();
    assert!(incumbent.answer_later(waiting.expect("a client"), line, Vec::new()));
    wait_for("the outcome", || {
        let _ = incumbent.turn(Instant::now()).expect("a turn");
        asking.is_finished()
    });
    match asking.join().expect("no panic").expect("success") {
        heirloom::upgrade::Upgraded::Supervised { before, now } => {
            assert_eq!((before.name.as_str(), now.pid), ("test", status.pid));
        }
        other => panic!("{other:?}"),
    }
}
