//! Takeovers that fail, at every step and in every way: the incumbent serves on and nothing is lost; and where it is the
//! incumbent that fails, the successor serves if, and only if, it has everything.

mod rogue;
mod stream;
mod support;

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use heirloom::NoRequests;
use heirloom::control::{Failure, FailureCode, LastTakeover, Reply, Status};
use heirloom::lock::{LockFile, lock_path};
use rogue::{Plot, Role};
use rustix::process::Signal;
use stream::Stream;
use support::*;

/// Where a successor fails, in order; and the steps at which the incumbent may say that it did. (It is ahead of a
/// successor that has not read yet.)
const SUCCESSOR_POINTS: [(&str, &[&str]); 9] = [
    ("hello", &["offer", "ready"]),
    ("offer", &["offer", "ready"]),
    ("batch", &["offer", "ready"]),
    ("offered", &["ready"]),
    ("ready", &["freeze", "accept"]),
    ("freeze", &["accept"]),
    ("accept", &["taken"]),
    ("released", &["taken"]),
    ("locked", &["taken"]),
];

/// How a successor fails, and what the incumbent may call it.
const SUCCESSOR_ACTS: [(&str, &[&str]); 8] = [
    ("kill", &["the other process exited", "the other side closed the channel"]),
    ("withdraw", &["the other side withdrew: the rogue has had enough"]),
    ("close", &["the other side closed the channel"]),
    ("garbage", &["the other side broke the protocol: a packet of 8 bytes is not a message"]),
    (
        "wrong",
        &[
            "the other side broke the protocol: Taken in state",
            "the other side broke the protocol: Ready in state",
        ],
    ),
    ("descriptor", &["1 descriptors came with it, 0 belong to it"]),
    ("long", &["the other process sent a packet of more than 32768 bytes"]),
    ("stop", &["the other side did not answer within"]),
];

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

#[test]
fn whatever_a_successor_does_the_incumbent_serves_on() {
    let rows: Vec<_> = SUCCESSOR_POINTS
        .iter()
        .map(|&(point, steps)| thread::spawn(move || successor_row(point, steps)))
        .collect();
    print_all(rows.into_iter().map(thread::JoinHandle::join).map(|row| row.map(|lines| lines.join("\n"))));
}

/// Prints every row before a missing one is a failure.
fn print_all(rows: impl Iterator<Item = thread::Result<String>>) {
    let rows: Vec<_> = rows.collect();
    for row in rows.iter().flatten() {
        println!("{row}");
    }
    let failed = rows.iter().filter(|row| row.is_err()).count();
    assert_eq!(failed, 0, "{failed} rows failed: see their panics");
}

/// One incumbent, whose successors all fail at the same point, and then one that does not.
fn successor_row(point: &str, steps: &[&str]) -> Vec<String> {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let mut table = Vec::new();
    let mut typed = String::new();
    for (act, causes) in SUCCESSOR_ACTS {
        let plot = Plot {
            role: Role::Successor,
            point,
            act: if matches!(act, "kill" | "stop") { "pause" } else { act },
        };
        let mut rogue = rogue::start(plot, &control, stream.address());
        rogue::wait_until_there(&rogue);
        match act {
            "kill" => rogue.kill(),
            "stop" => rogue.signal(Signal::STOP),
            _ => {}
        }
        let what = format!("{point}, {act}");
        let last = resumed(&what, &control, &rogue);
        let reason = last.reason.clone().expect("a reason");
        assert!(
            steps.iter().any(|step| reason.starts_with(&format!("at step {step}: "))),
            "{what}: {reason}"
        );
        assert!(causes.iter().any(|cause| reason.contains(cause)), "{what}: {reason}");
        let (step, cause) = reason.strip_prefix("at step ").and_then(|it| it.split_once(": ")).expect("both");
        let logged = format!("step={step} reason={cause}");
        wait_for("the incumbent's log of it", || incumbent.stderr().contains(&logged));
        // Right behind Ready, the failure may be found before the freeze or after it.
        if point != "ready" {
            let frozen = !matches!(point, "hello" | "offer" | "batch" | "offered");
            assert_eq!(last.pause_us.is_some(), frozen, "{what}");
        }
        assert!(incumbent.is_running(), "{what}: {}", incumbent.stderr());

        // A successor that was stopped and is continued learns of it, and does not serve.
        if act == "stop" && point != "locked" {
            rogue.signal(Signal::CONT);
        }
        match (act, point) {
            ("kill", _) => {}
            // It held the lock, so that it was ended.
            ("stop" | "close" | "garbage" | "wrong" | "descriptor" | "long", "locked") => {
                assert_eq!(rogue.wait().code(), None, "{what}: {}", rogue::says(&rogue));
            }
            ("withdraw", _) => rogue.wait_for_code(rogue::GAVE_UP),
            _ => {
                rogue.write(b"go on\n");
                rogue.wait_for_code(rogue::GAVE_UP);
            }
        }
        assert!(!rogue::says(&rogue).contains("SERVES"), "{what}: {}", rogue::says(&rogue));

        let word = format!("typed after {what}\n");
        incumbent.write(word.as_bytes());
        typed.push_str(&word);
        wait_for("what was typed", || stream.heard() == typed);
        table.push(format!("{point:>9} {act:<10} {:>8} µs  {reason}", last.pause_us.unwrap_or(0)));
    }
    finish(&mut stream, &control, incumbent);
    table
}

/// Waits until the incumbent has resumed after a takeover by this process.
fn resumed(what: &str, control: &std::path::Path, successor: &Process) -> LastTakeover {
    let mut last = None;
    wait_for(&format!("the end of a takeover ({what})"), || {
        last = try_status(control)
            .filter(|status| !status.takeover_running)
            .and_then(|status| status.last_takeover)
            .filter(|last| last.peer_pid == Some(successor.id()));
        last.is_some()
    });
    let last = last.expect("waited for");
    assert_eq!(last.outcome, "resumed", "{what}: {last:?}");
    last
}

/// A good successor takes over, and both outputs together are exact.
fn finish(stream: &mut Stream, control: &std::path::Path, mut incumbent: Process) {
    let mut successor = Process::start(&mut chat(stream.address(), control, &["--replace", "must"]));
    wait_for_generation(control, 1);
    incumbent.wait_for_code(0);
    let seen = successor.stdout_len();
    wait_for("more of the stream", || successor.stdout_len() > seen);
    stream.ends_exact(0, &[&incumbent, &successor]);
    assert!(successor.is_running());
}

/// How many times the program is stopped.
const ROUNDS: u64 = 16;

/// The program itself is stopped at moments that are spread over its takeover, and continued later: it ends by itself,
/// or it has taken over.
#[test]
fn the_program_stopped_at_any_moment_either_serves_or_ends() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut outputs = vec![Process::start(&mut chat(stream.address(), &control, &[]))];
    wait_until_connected(&control);
    let (mut rolled_back, mut generation) = (0, 0);
    for round in 0..ROUNDS {
        let mut successor = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
        let incumbent = outputs.last_mut().expect("one");
        let begun = format!("takeover begins successor=pid {} ", successor.id());
        while !incumbent.stderr().contains(&begun) && successor.is_running() {
            std::hint::spin_loop();
        }
        // The stimulus, not a wait: from the Hello to after Taken, which is a few milliseconds.
        thread::sleep(Duration::from_micros(150 * round));
        successor.signal(Signal::STOP);
        // Long enough for the limits of a freeze to pass, on an idle machine; what comes of it is looked at afterwards.
        let until = Instant::now() + Duration::from_millis(2500);
        while incumbent.is_running() && Instant::now() < until {
            let ended = |status: Status| {
                status.last_takeover.is_some_and(|last| last.peer_pid == Some(successor.id()))
            };
            if try_status(&control).is_some_and(ended) {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        // One that is ended by the incumbent because it held the lock needs no signal any more.
        if successor.is_running() {
            successor.signal(Signal::CONT);
        }
        wait_for("the successor to serve or to end", || {
            !successor.is_running() || try_status(&control).is_some_and(|status| status.pid == successor.id())
        });
        if successor.is_running() {
            generation += 1;
            outputs.last_mut().expect("one").wait_for_code(0);
            outputs.push(successor);
        } else {
            rolled_back += 1;
            let incumbent = outputs.last_mut().expect("one");
            ended_by_itself(&mut successor, incumbent);
        }
        assert_eq!(status(&control).generation, generation);
    }
    println!("of {ROUNDS} successors {rolled_back} were rolled back and {generation} served");
    stream.ends_exact(0, &outputs.iter().collect::<Vec<_>>());
}

/// Fails unless the successor has ended with an error, or was ended for the lock it held, and has served nobody.
#[track_caller]
fn ended_by_itself(successor: &mut Process, incumbent: &mut Process) {
    let ended = successor.wait();
    let said = successor.stderr();
    match ended.code() {
        Some(code) => assert!(code == 5 && said.contains("the takeover ended at step"), "{ended}: {said}"),
        None => wait_for("the log of why", || incumbent.stderr().contains("takeover ended: resumed")),
    }
    assert_eq!(successor.stdout_len(), 0, "it wrote without having taken over");
    assert!(incumbent.is_running(), "{}", incumbent.stderr());
}

/// How often the test asks for the lock before it looks whether the incumbent has gone.
const ASKED: u32 = 16;

/// The program is stopped between Accept and Taken: it is kept from the lock, which the test takes before it can.
#[test]
fn the_program_stopped_while_it_waits_for_the_lock_ends_when_it_is_continued() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut outputs = vec![Process::start(&mut chat(stream.address(), &control, &[]))];
    wait_until_connected(&control);
    let (mut stopped, mut tries) = (0, 0);
    let since = Instant::now();
    // On a loaded machine it takes many tries, and one that comes off is enough.
    while stopped < 3 && (stopped == 0 || since.elapsed() < LONG) {
        tries += 1;
        assert!(since.elapsed() < 5 * LONG, "the test never gets the lock, in {tries} tries");
        let mut file = LockFile::open(lock_path(&control)).expect("the lock file");
        let mut successor = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
        let incumbent = outputs.last_mut().expect("one");
        // The two ask for it at the same time, and the one that asks more often mostly gets it.
        let mut asked = 0_u32;
        let lock = loop {
            match file.try_lock() {
                Ok(lock) => break Some(lock),
                Err((back, _)) => file = back,
            }
            asked += 1;
            if asked.is_multiple_of(ASKED) && !incumbent.is_running() {
                break None;
            }
        };
        let Some(lock) = lock else {
            outputs.push(successor);
            continue;
        };
        stopped += 1;
        successor.signal(Signal::STOP);
        // On its way to be stopped it would still take the lock, and be ended for it.
        wait_for("it to be stopped", || proc::is_stopped(successor.id()));
        drop(lock);
        let last = resumed("waiting for the lock", &control, &successor);
        let reason = last.reason.expect("a reason");
        assert_eq!(reason, "at step taken: the other side did not answer within 2s");
        successor.signal(Signal::CONT);
        successor.wait_for_code(5);
        ended_by_itself(&mut successor, incumbent);
    }
    println!("stopped {stopped} of {tries} successors at the lock");
    stream.ends_exact(0, &outputs.iter().collect::<Vec<_>>());
}

/// A program made of the library's stages, stopped between them.
#[test]
fn a_program_stopped_between_two_stages_is_told_that_the_takeover_is_over() {
    let stages = [
        ("admitted", "at step ready: the other side did not answer within 30s"),
        ("prepared", "at step ready: the other side did not answer within 30s"),
        ("complete", "at step accept: the other side did not answer within 2s"),
    ];
    let rows = stages.map(|(point, reason)| {
        thread::spawn(move || {
            let scratch = Scratch::new();
            let control = scratch.path("chat.sock");
            let mut stream = Stream::start();
            let incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
            wait_until_connected(&control);
            let plot = Plot { role: Role::LibrarySuccessor, point, act: "pause" };
            let mut successor = rogue::start(plot, &control, stream.address());
            rogue::wait_until_there(&successor);
            successor.signal(Signal::STOP);
            assert_eq!(resumed(point, &control, &successor).reason.as_deref(), Some(reason));
            successor.signal(Signal::CONT);
            successor.write(b"go on\n");
            successor.wait_for_code(rogue::GAVE_UP);
            let said = rogue::says(&successor);
            assert!(said.contains("withdrew: at step") && said.contains("did not answer within"), "{said}");
            finish(&mut stream, &control, incumbent);
            format!("{point:>9} {}", said.lines().last().unwrap_or_default())
        })
    });
    print_all(rows.into_iter().map(thread::JoinHandle::join));
}

/// With thousands of descriptors the incumbent is still sending when its successor fails.
#[test]
fn a_successor_that_fails_between_two_batches_leaves_the_incumbent_serving() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let plot = Plot { role: Role::CrowdedIncumbent, point: "", act: "" };
    let mut incumbent = rogue::start(plot, &control, "nowhere");
    wait_for("it to serve", || rogue::says(&incumbent).contains("serving"));
    for (act, cause) in SUCCESSOR_ACTS {
        let pauses = matches!(act, "kill" | "stop");
        let plot = Plot { role: Role::Successor, point: "batch", act: if pauses { "pause" } else { act } };
        let mut rogue = rogue::start(plot, &control, "nowhere");
        rogue::wait_until_there(&rogue);
        match act {
            "kill" => rogue.kill(),
            "stop" => rogue.signal(Signal::STOP),
            _ => {}
        }
        let last = resumed(act, &control, &rogue);
        let reason = last.reason.expect("a reason");
        assert!(reason.starts_with("at step offer: "), "{act}: {reason}");
        assert!(cause.iter().any(|cause| reason.contains(cause)), "{act}: {reason}");
        assert!(
            last.items > 1000 && last.items < rogue::CROWD as u64,
            "{act}: {} items were sent",
            last.items
        );
        assert!(incumbent.is_running());
    }
    heirloom::descriptors::raise_limit().expect("setrlimit");
    let service = heirloom::Service::new("chat nowhere");
    let started = heirloom::start::<NoRequests>(
        &control,
        service,
        heirloom::Config::default(),
        heirloom::Replace::Must,
    );
    let Ok(heirloom::Start::Successor(successor)) = started else { panic!("{started:?}") };
    let offered = successor.receive().expect("an offer");
    let taken = offered.ready().expect("a freeze").accept::<NoRequests>().expect("the end");
    assert_eq!(taken.bundle.close_rest().len(), rogue::CROWD);
    wait_for("the incumbent to end", || rogue::says(&incumbent).contains("TAKEN"));
}

#[test]
fn a_successor_with_too_little_room_is_refused_with_the_numbers() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let mut successor = Command::new("sh");
    successor.arg("-c").arg("ulimit -n 12; exec \"$@\"").arg("sh").arg(env!("CARGO_BIN_EXE_heirloom"));
    successor.args(["chat", stream.address(), "--replace", "must", "--control"]).arg(&control);
    let mut successor = Process::start(&mut successor);
    successor.wait_for_code(4);
    let said = successor.stderr();
    assert!(said.contains("18 are needed") && said.contains("ulimit -n"), "{said}");
    let last = status(&control).last_takeover.expect("one");
    assert_eq!((last.outcome.as_str(), last.peer_pid), ("refused", Some(successor.id())));
    wait_for("the incumbent's line", || incumbent.stderr().contains("18 are needed"));
    finish(&mut stream, &control, incumbent);
}

#[test]
fn a_successor_that_lied_about_its_room_withdraws() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let plot = Plot { role: Role::Successor, point: "no room", act: "pause" };
    let mut liar = rogue::start(plot, &control, stream.address());
    liar.wait_for_code(rogue::GAVE_UP);
    let reason = resumed("no room", &control, &liar).reason.expect("a reason");
    assert!(reason.contains("withdrew: cannot receive: only 1 descriptors of a packet"), "{reason}");
    finish(&mut stream, &control, incumbent);
}

/// At every limit on open files with which it can serve at all, an incumbent that is asked for a takeover is replaced, or
/// says that it cannot be and serves on.
#[test]
fn an_incumbent_without_descriptors_to_spare_serves_on() {
    let (mut replaced, mut served_on) = (0, 0);
    for limit in 10..24 {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let mut stream = Stream::start();
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(format!("ulimit -n {limit}; exec \"$@\"")).arg("sh");
        limited.arg(env!("CARGO_BIN_EXE_heirloom"));
        let mut incumbent =
            Process::start(limited.args(["chat", stream.address(), "--control"]).arg(&control));
        wait_for("it to serve or to end", || incumbent.stdout_len() > 0 || !incumbent.is_running());
        if !incumbent.is_running() {
            assert_eq!(incumbent.wait().code(), Some(1), "limit {limit}: {}", incumbent.stderr());
            continue;
        }
        let mut successor = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
        wait_for("an outcome", || !successor.is_running() || !incumbent.is_running());
        if successor.is_running() {
            replaced += 1;
            incumbent.wait_for_code(0);
            stream.ends_exact(0, &[&incumbent, &successor]);
        } else {
            served_on += 1;
            let code = successor.wait().code();
            assert!(matches!(code, Some(1 | 4 | 5)), "limit {limit}: {code:?}: {}", successor.stderr());
            assert!(incumbent.is_running(), "limit {limit}: {}", incumbent.stderr());
            stream.ends_exact(0, &[&incumbent]);
        }
    }
    println!("{replaced} were replaced, {served_on} served on");
    assert!(replaced > 0 && served_on > 0, "the limits do not cover both");
}

/// An incumbent that refuses everybody answers and closes without having read anything. However fast it is, its answer
/// is heard, and it is asked no second time.
#[test]
fn the_answer_of_an_incumbent_that_has_closed_already_is_heard() {
    const SUCCESSORS: usize = 30;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let listener = UnixListener::bind(&control).expect("bind");
    let incumbent = thread::spawn(move || {
        let refusal = Reply::Error(Failure::new(FailureCode::Permission, "not you")).to_line();
        for _ in 0..SUCCESSORS {
            let (mut client, _) = listener.accept().expect("accept");
            client.write_all(&refusal).expect("write");
        }
    });
    for _ in 0..SUCCESSORS {
        let mut successor = Process::start(&mut chat("127.0.0.1:9", &control, &["--replace", "must"]));
        successor.wait_for_code(4);
        assert!(successor.stderr().contains("the incumbent refused: not you"), "{}", successor.stderr());
    }
    incumbent.join().expect("each has asked once");
}

/// Where an incumbent fails and how, what the successor ends with (0 is: it serves), and what it says.
const INCUMBENT_PLOTS: [(&str, &str, i32, &str); 54] = [
    ("hello", "kill", 3, "nobody answers"),
    ("hello", "stop", 1, "no answer from"),
    ("hello", "garbage", 1, "answers a takeover with nonsense"),
    ("hello", "no JSON", 1, "answers a takeover with nonsense"),
    ("hello", "refuse", 4, "the incumbent refused: the rogue is busy"),
    ("hello", "no channel", 1, "without a channel"),
    ("hello", "pipe", 1, "not a channel"),
    ("welcome", "kill", 5, "at step offer: the other"),
    ("welcome", "stop", 5, "at step offer: the other side did not answer within 10s"),
    ("welcome", "close", 5, "at step offer: the other side closed"),
    ("welcome", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("welcome", "garbage", 5, "is not a message"),
    ("welcome", "wrong", 5, "Released in state Asking"),
    ("welcome", "descriptor", 5, "1 descriptors came with it"),
    ("welcome", "long", 5, "more than 32768 bytes"),
    ("offer", "kill", 5, "at step offer: the other"),
    ("offer", "stop", 5, "at step offer: the other side did not answer within 10s"),
    ("offer", "close", 5, "at step offer: the other side closed"),
    ("offer", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("offer", "garbage", 5, "is not a message"),
    ("offer", "wrong", 5, "Released in state Receiving"),
    ("batch", "kill", 5, "at step offer: the other"),
    ("batch", "stop", 5, "at step offer: the other side did not answer within 10s"),
    ("batch", "close", 5, "at step offer: the other side closed"),
    ("batch", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("batch", "garbage", 5, "is not a message"),
    ("batch", "wrong", 5, "Released in state Receiving"),
    ("offered", "kill", 5, "the other"),
    ("offered", "stop", 5, "at step freeze: the other side did not answer within 30s"),
    ("offered", "close", 5, "the other side closed"),
    ("offered", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("offered", "garbage", 5, "is not a message"),
    ("ready", "kill", 5, "at step freeze: the other"),
    ("ready", "stop", 5, "at step freeze: the other side did not answer within 30s"),
    ("ready", "close", 5, "at step freeze: the other side closed"),
    ("ready", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("ready", "garbage", 5, "is not a message"),
    ("ready", "wrong", 5, "Released in state Ready"),
    ("freeze", "kill", 0, "took over"),
    ("freeze", "stop", 5, "at step released: the other side did not answer within 10s"),
    ("freeze", "close", 5, "at step released: the other side did not answer within 10s"),
    ("freeze", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("freeze", "garbage", 5, "is not a message"),
    ("freeze", "wrong", 5, "Offered in state"),
    ("accept", "kill", 0, "took over"),
    ("accept", "stop", 5, "at step released: the other side did not answer within 10s"),
    ("accept", "close", 5, "at step released: the other side did not answer within 10s"),
    ("accept", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("accept", "garbage", 5, "is not a message"),
    ("released", "kill", 0, "took over"),
    ("released", "stop", 5, "at step taken: another process holds the service lock"),
    ("released", "close", 5, "at step taken: another process holds the service lock"),
    ("released", "withdraw", 5, "withdrew: the rogue has thought better of it"),
    ("released", "wrong", 5, "Offered in state Locking"),
];

#[test]
fn whatever_an_incumbent_does_the_successor_serves_everything_or_nothing() {
    // All at once: most of them wait for a limit.
    let rows: Vec<_> = INCUMBENT_PLOTS
        .iter()
        .map(|&(point, act, code, says)| thread::spawn(move || incumbent_row(point, act, code, says)))
        .collect();
    print_all(rows.into_iter().map(thread::JoinHandle::join));
}

fn incumbent_row(point: &str, act: &str, code: i32, says: &str) -> String {
    let what = format!("{point}, {act}");
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let plot = Plot {
        role: Role::Incumbent,
        point,
        act: if matches!(act, "kill" | "stop") { "pause" } else { act },
    };
    let mut rogue = rogue::start(plot, &control, stream.address());
    wait_for("the rogue to serve", || rogue::says(&rogue).contains("serving"));
    let mut successor = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
    rogue::wait_until_there(&rogue);
    match act {
        "kill" => {
            rogue.kill();
            rogue.wait();
        }
        "stop" => rogue.signal(Signal::STOP),
        _ => {}
    }
    if code == 0 {
        let status = status(&control);
        assert_eq!((status.generation, status.pid), (1, successor.id()), "{what}");
        wait_for("the log of it", || successor.stderr().contains(says));
        let seen = successor.stdout_len();
        wait_for("more of the stream", || successor.stdout_len() > seen);
        stream.ends_exact(0, &[&successor]);
        return format!("{point:>9} {act:<10} serves");
    }
    let status = successor.wait();
    let said = successor.stderr();
    assert_eq!(status.code(), Some(code), "{what}: {said}");
    assert!(said.contains(says), "{what}: {said}");
    assert_eq!(successor.stdout_len(), 0, "{what}: it wrote without having taken over");
    let said = said.lines().last().unwrap_or_default();
    format!("{point:>9} {act:<10} code {code}: {}", said.split_once("ERROR").unwrap_or(("", said)).1.trim())
}
