//! More than one process wants to serve: a second successor, and several that start at once.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::Instant;

use heirloom::control::Client;
use heirloom::peer::Peer;
use heirloom::{Config, NoRequests, Replace, Service, Start};
use support::generations::{accept, listen, nobody_else_came};
use support::random::Random;
use support::*;

/// How many times processes race for one path.
const ROUNDS: usize = 20;
/// How many times processes that go about it differently do.
const MIXED_ROUNDS: usize = 200;

/// A successor that has everything, with the incumbent frozen, and waits.
fn freeze(control: &Path, address: &str) -> Process {
    let mut command = heirloom();
    command
        .arg("demo-successor")
        .arg("--control")
        .arg(control)
        .args(["--service", &format!("chat {address}")]);
    let successor = Process::start(&mut command);
    wait_for("the freeze", || successor.stdout() == b"frozen\n");
    successor
}

#[test]
fn a_second_successor_is_refused_at_once_and_questions_are_answered_meanwhile() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_listener, address, mut first) = connected_chat(&control);
    // In the third and fourth generation the listener was made by an ancestor that is dead.
    for generation in 0..4 {
        let mut holder = freeze(&control, &address);
        let status = try_status(&control).expect("status is answered in a freeze");
        assert!(status.takeover_running);
        assert_eq!((status.generation, status.pid), (generation, first.id()));
        let mut ping = Process::start(heirloom().arg("ping").arg("--control").arg(&control));
        let mut second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
        second.wait_for_code(4);
        let said = second.stderr();
        assert!(said.contains(&format!("a takeover by pid {}", holder.id())), "{said}");
        ping.wait_for_code(0);
        assert_eq!(ping.stdout(), b"Pong\n");
        holder.kill();
        wait_for("the incumbent to go on", || try_status(&control).is_some_and(|s| !s.takeover_running));

        let client = Client::connect(&control).expect("connect");
        assert_eq!(
            Peer::of(&client).expect("credentials").pid,
            Some(first.id()),
            "the listener names its owner"
        );
        let mut next = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
        first.wait_for_code(0);
        std::mem::swap(&mut first, &mut next);
    }
    assert_eq!(status(&control).generation, 4);
}

/// Fails unless a successor that starts now is refused because of the takeover that this process holds.
#[track_caller]
fn refused_because_of(holder: u32, control: &Path, address: &str) {
    for replace in ["try", "must"] {
        let mut second = Process::start(&mut chat(address, control, &["--replace", replace]));
        second.wait_for_code(4);
        let said = second.stderr();
        assert!(said.contains(&format!("a takeover by pid {holder}")), "{said}");
    }
}

#[test]
fn a_takeover_that_is_held_before_the_freeze_refuses_others_and_stops_nothing() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address, mut first) = connected_chat(&control);
    let (mut server, _) = listener.accept().expect("accept");
    let service = Service::new(format!("chat {address}"));
    let started = heirloom::start::<NoRequests>(&control, service, Config::default(), Replace::Must);
    let Start::Successor(successor) = started.expect("admitted") else { panic!("somebody serves") };
    refused_because_of(std::process::id(), &control, &address);

    let offered = successor.receive().expect("an offer");
    refused_because_of(std::process::id(), &control, &address);
    let answer = try_status(&control).expect("status is answered");
    assert!(answer.takeover_running);
    assert_eq!((answer.generation, answer.pid), (0, first.id()));
    server.write_all(b"still here\n").expect("write");
    wait_for("the incumbent to go on serving", || first.stdout() == b"still here\n");

    drop(offered);
    wait_for("the takeover to end", || !status(&control).takeover_running);
    assert!(first.is_running());
    let second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
    first.wait_for_code(0);
    let answer = status(&control);
    assert_eq!((answer.generation, answer.pid), (1, second.id()));
}

#[test]
fn of_several_that_may_not_replace_exactly_one_serves() {
    for (round, count) in [2, 5].into_iter().cycle().take(2 * ROUNDS).enumerate() {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("bound").to_string();
        let mut all: Vec<Process> = (0..count)
            .map(|_| Process::start(&mut chat(&address, &control, &["--replace", "never"])))
            .collect();
        wait_for("all but one to end", || {
            all.iter_mut().filter_map(|one| one.is_running().then_some(())).count() == 1
        });
        let serving = status(&control).pid;
        for mut one in all {
            if one.is_running() {
                assert_eq!(one.id(), serving, "round {round}");
            } else {
                one.wait_for_code(4);
                assert!(one.stderr().contains("already serves"), "{}", one.stderr());
            }
        }
    }
}

#[test]
fn of_several_that_may_replace_one_serves_in_the_end() {
    for round in 0..ROUNDS {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("bound").to_string();
        let mut all: Vec<Process> =
            (0..5).map(|_| Process::start(&mut chat(&address, &control, &[]))).collect();
        wait_for("all but one to end", || {
            all.iter_mut().filter_map(|one| one.is_running().then_some(())).count() == 1
        });
        let status = status(&control);
        let mut replaced = 0;
        for mut one in all {
            if one.is_running() {
                assert_eq!(one.id(), status.pid, "round {round}");
                continue;
            }
            match one.wait().code() {
                Some(0) => replaced += 1,
                Some(4) => assert!(one.stderr().contains("a takeover by pid"), "{}", one.stderr()),
                code => panic!("round {round}: {code:?}: {}", one.stderr()),
            }
        }
        assert_eq!(status.generation, replaced, "each that was replaced made a generation");
    }
}

/// Some may replace, some must, some may not; and at every other path lie the socket and the lock file of one that was killed.
/// There is a server that counts who comes anew: however it ends, one has served afresh, once.
#[test]
fn however_several_go_about_it_one_serves_afresh_and_one_in_the_end() {
    let mut random = Random::seeded();
    let mut ended = BTreeMap::<_, usize>::new();
    for (round, count) in [2, 5].into_iter().cycle().take(MIXED_ROUNDS).enumerate() {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        if round % 4 < 2 {
            leave_a_socket_behind(&control);
        }
        let (listener, address) = listen();
        // One at least that starts where nobody is.
        let ways = (0..count).map(|number| {
            let ways = if number == 0 { &["never", "try"][..] } else { &["never", "try", "must"] };
            ways[random.below(ways.len() as u64) as usize]
        });
        let mut all: Vec<_> = ways
            .map(|way| (way, Process::start(&mut chat(&address, &control, &["--replace", way]))))
            .collect();
        wait_for("all but one to end", || {
            all.iter_mut().map(|(_, one)| one.is_running()).filter(|running| *running).count() == 1
        });
        let status = status(&control);
        let mut replaced = 0;
        for (way, mut one) in all {
            if one.is_running() {
                assert_eq!(one.id(), status.pid, "round {round}");
                continue;
            }
            let code = one.wait().code().expect("it ended by itself");
            let said = one.stderr();
            let as_it_should = match (code, way) {
                (0, _) => said.contains("replaced by"),
                (3, "must") => said.contains("nobody"),
                (4, "never") => said.contains("already serves"),
                (4, _) => said.contains("a takeover by pid"),
                _ => false,
            };
            assert!(as_it_should, "round {round}, --replace {way}, code {code}: {said}");
            replaced += u64::from(code == 0);
            *ended.entry((way, code)).or_default() += 1;
        }
        assert_eq!(status.generation, replaced, "each that was replaced made a generation");
        drop(accept(&listener));
        nobody_else_came(listener);
    }
    println!("{ended:?}");
    let all = [("try", 0), ("must", 3), ("never", 4)];
    assert!(all.iter().all(|end| ended.contains_key(end)), "too little has happened: {ended:?}");
}

/// As a crash does: a socket at which nobody listens, and the lock file, which nobody holds.
fn leave_a_socket_behind(control: &Path) {
    let (_listener, _, mut dead) = connected_chat(control);
    dead.kill();
    dead.wait();
    assert!(control.exists() && heirloom::lock::lock_path(control).exists());
    assert!(Client::connect(control).is_err());
}

#[test]
fn a_stopped_incumbent_is_not_replaced_by_force() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_listener, address, mut first) = connected_chat(&control);
    first.signal(rustix::process::Signal::STOP);
    let begun = Instant::now();
    let mut second = Process::start(&mut chat(&address, &control, &[]));
    second.wait_for_code(1);
    assert!(second.stderr().contains("may be stopped"), "{}", second.stderr());
    assert!(begun.elapsed() < LONG);
    first.signal(rustix::process::Signal::CONT);
    assert_eq!(status(&control).pid, first.id());
}
