//! Whole takeovers over the socket transport, between real processes where two programs matter.

mod support;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use heirloom::channel::{Channel, Incoming};
use heirloom::control::{Client, FailureCode, Hello, Reply, Request, VersionRange};
use heirloom::manifest::Base;
use heirloom::protocol::{Cause, ToSuccessor, VERSIONS};
use heirloom::runtime::blocking::{Gate, Worker, wait};
use heirloom::{
    Bundle, Config, Entry, Incumbent, ItemId, Kind, NoRequests, Outcome, Replace, Service, Start, StartError,
    TakeoverError, Turn,
};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::{Deserialize, Serialize};
use serde_json::json;
use support::{LONG, Process, Scratch, example, fresh, pattern, serve, status, stretch, successor, wait_for};

/// Tells a process that runs one test of this file again what to be, and where.
const ROLE: &str = "HEIRLOOM_TEST_ROLE";
const CONTROL: &str = "HEIRLOOM_TEST_CONTROL";

/// Starts this file's [`process`] in a process of its own.
fn start_role(role: &str, control: &Path) -> Process {
    let test = std::env::current_exe().expect("the path of this test");
    Process::start(
        Command::new(test).args(["--exact", "process", "--nocapture"]).env(ROLE, role).env(CONTROL, control),
    )
}

/// Not a test by itself: what the other tests start as a process of its own.
#[test]
fn process() {
    let Some(control) = std::env::var_os(CONTROL) else { return };
    let control = Path::new(&control);
    match std::env::var(ROLE).as_deref() {
        Ok("older") => older_program(control),
        Ok("newer") => newer_program(control),
        Ok("threads") => threads::serve(control).expect("a server of threads"),
        Ok("admitted") => {
            let _successor = successor(control, &service());
            thread::sleep(LONG);
        }
        role => panic!("unknown role {role:?}"),
    }
}

fn service() -> Service {
    Service::new("test").program("tester", "1.2.3")
}

/// Serves in a thread of this process, and starts a takeover of it.
fn offered(bundle: Bundle) -> (Scratch, thread::JoinHandle<heirloom::TakenBy>, heirloom::Offered) {
    let scratch = Scratch::new();
    let incumbent = fresh(&scratch.control(), &service());
    let server = thread::spawn(|| serve(incumbent, bundle));
    let offered = successor(&scratch.control(), &service()).receive().expect("an offer");
    (scratch, server, offered)
}

#[test]
fn thousands_of_items_travel_in_several_batches_with_their_state() {
    const ITEMS: u64 = 2000;
    heirloom::descriptors::raise_limit().unwrap();
    let mut bundle = Bundle::new();
    let mut others = BTreeMap::new();
    for number in 0..ITEMS {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let id = bundle.add(format!("pair {number}"), ours, &(number, "state")).unwrap();
        others.insert(id, (number, theirs));
    }

    let (scratch, server, offered) = offered(bundle);
    assert_eq!(offered.bundle().len() as u64, ITEMS + 1, "and the control listener");
    let taken = offered.ready().unwrap().accept::<NoRequests>().unwrap();
    let by = server.join().unwrap();
    assert_eq!((by.items, by.program.as_str(), by.version.as_str()), (ITEMS + 1, "tester", "1.2.3"));
    assert_eq!(by.pid, Some(std::process::id()));

    let mut bundle = taken.bundle;
    for (id, (number, mut theirs)) in others {
        let item = bundle.take_id::<UnixStream>(id).unwrap();
        assert_eq!(item.name, format!("pair {number}"));
        assert_eq!(item.state::<(u64, String)>().unwrap(), Some((number, "state".into())));
        theirs.write_all(&number.to_ne_bytes()).unwrap();
        let mut bytes = [0; 8];
        (&item.descriptor).read_exact(&mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), number, "item {id} has got another item's descriptor");
    }
    assert!(bundle.close_rest().is_empty());
    let last = taken.incumbent.last_takeover().unwrap();
    assert_eq!((last.outcome.as_str(), last.items), ("taken", ITEMS + 1));
    assert_eq!(taken.incumbent.generation(), 1);
    drop(scratch);
}

#[test]
fn what_is_not_taken_is_closed_and_named() {
    let mut bundle = Bundle::new();
    let (wanted, mut its_other) = UnixStream::pair().unwrap();
    let (unwanted, mut other) = UnixStream::pair().unwrap();
    bundle.add_plain("wanted", wanted).unwrap();
    let id = bundle.add_plain("unwanted", unwanted).unwrap();

    let (_scratch, server, offered) = offered(bundle);
    let taken = offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
    let mut bundle = taken.bundle;
    let mut kept = bundle.take::<UnixStream>("wanted").unwrap().descriptor;
    let rest = bundle.close_rest();
    let expected = Entry { id, name: "unwanted".into(), kind: Kind::UnixStream, state: Vec::new() };
    assert_eq!(rest, [expected]);

    assert_eq!(other.read(&mut [0]).unwrap(), 0, "its peer hears of the end");
    kept.write_all(b"here").unwrap();
    let mut bytes = [0; 4];
    its_other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"here");
}

#[test]
fn a_schema_that_the_successor_does_not_read_is_refused_with_both_versions() {
    let scratch = Scratch::new();
    let incumbent = fresh(&scratch.control(), &service().schema(3, 3..=3));
    let server = thread::spawn(|| serve(incumbent, Bundle::new()));

    let older = Service::new("test").program("old tester", "0.9").schema(2, 1..=2);
    match heirloom::start::<NoRequests>(&scratch.control(), older, Config::default(), Replace::Try) {
        Err(StartError::Refused(failure)) => {
            assert_eq!(failure.code, FailureCode::Schema);
            for part in ["schema 3", "tester 1.2.3", "1..=2", "old tester 0.9"] {
                assert!(failure.message.contains(part), "{part:?} is not in: {failure}");
            }
        }
        other => panic!("{other:?}"),
    }
    let last = status(&scratch.control()).last_takeover.expect("it remembers the refusal");
    assert_eq!(last.outcome, "refused");

    let newer = service().schema(4, 3..=4);
    let taken = successor(&scratch.control(), &newer).receive().unwrap().ready().unwrap();
    taken.accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

#[test]
fn another_service_is_refused() {
    let scratch = Scratch::new();
    let incumbent = fresh(&scratch.control(), &service());
    let server = thread::spawn(|| serve(incumbent, Bundle::new()));
    let other = Service::new("another");
    match heirloom::start::<NoRequests>(&scratch.control(), other, Config::default(), Replace::Try) {
        Err(StartError::Refused(failure)) => assert_eq!(failure.code, FailureCode::WrongService),
        other => panic!("{other:?}"),
    }
    let offered = successor(&scratch.control(), &service()).receive().unwrap();
    offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

#[test]
fn each_descriptor_is_lent_once_as_it_arrives_and_may_be_refused() {
    const ITEMS: u64 = 600;
    let scratch = Scratch::new();
    let mut bundle = Bundle::new();
    let mut others = Vec::new();
    for number in 0..ITEMS {
        let (ours, theirs) = UnixStream::pair().unwrap();
        bundle.add(format!("pair {number}"), ours, &number).unwrap();
        others.push(theirs);
    }
    let incumbent = fresh(&scratch.control(), &service());
    let server = thread::spawn(|| serve(incumbent, bundle));

    let mut lent = 0;
    let refused = successor(&scratch.control(), &service()).receive_each(|item| {
        lent += 1;
        if item.entry()?.name == "pair 300" { Err(io::Error::other("no room for it")) } else { Ok(()) }
    });
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("pair 300") && error.contains("no room for it"), "{error}");
    assert_eq!(lent, 301);

    // The incumbent serves on, and the next one gets everything.
    let mut lent = Vec::new();
    let next = successor(&scratch.control(), &service()).receive_each(|item| {
        let entry = item.entry()?;
        assert_eq!((Kind::of(item.descriptor())?, item.id()), (Kind::UnixStream, entry.id));
        lent.push(entry.to_entry());
        Ok(())
    });
    let offered = next.unwrap();
    let entries = offered.bundle().entries().filter(|entry| entry.id != ItemId::CONTROL);
    assert_eq!(entries.cloned().collect::<Vec<_>>(), lent);
    assert_eq!(lent.len() as u64, ITEMS);
    offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

#[test]
fn an_item_of_another_kind_than_its_entry_says_is_named_and_the_incumbent_serves_on() {
    let scratch = Scratch::new();
    let mut incumbent = fresh(&scratch.control(), &service());
    let (reader, _writer) = io::pipe().unwrap();
    let entry = Entry { id: ItemId(7), name: "upstream".into(), kind: Kind::TcpStream, state: Vec::new() };
    let base = Base { items: vec![entry], next_id: 8, ..Base::default() };

    let control = scratch.control();
    let asking = thread::spawn(move || successor(&control, &service()).receive());
    let mut asked = false;
    while !asked || incumbent.takeover_running() {
        wait(&incumbent, &mut Vec::new(), Some(Instant::now() + LONG)).unwrap();
        match incumbent.turn(Instant::now()).unwrap() {
            Turn::Idle => {}
            Turn::Offer(offer) => {
                asked = true;
                offer.begin(base.clone()).unwrap();
            }
            Turn::Batch(batch) => batch.send(|_| Some(reader.as_fd())),
            _ => panic!("nothing else is due"),
        }
    }
    match asking.join().unwrap() {
        Err(TakeoverError::Ended(reason)) => {
            let Cause::Local(why) = &reason.cause else { panic!("{reason}") };
            for part in ["upstream", "tcp-stream", "pipe-reader"] {
                assert!(why.contains(part), "{part:?} is not in: {why}");
            }
        }
        other => panic!("{other:?}"),
    }
    let last = incumbent.last_takeover().unwrap();
    assert_eq!(last.outcome, "resumed");
    assert!(last.reason.as_ref().is_some_and(|why| why.contains("upstream")), "{last:?}");
}

#[test]
fn a_successor_that_gives_up_at_any_stage_leaves_the_incumbent_serving() {
    let mut bundle = Bundle::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    bundle.add_plain("connection", ours).unwrap();
    let (scratch, server, offered) = offered(bundle);
    let control = scratch.control();

    offered.withdraw("not this time");
    wait_for("the end of the first", || !status(&control).takeover_running);
    drop(successor(&control, &service()));
    wait_for("the end of the second", || !status(&control).takeover_running);
    let complete = successor(&control, &service()).receive().unwrap().ready().unwrap();
    complete.withdraw("the new configuration is wrong");
    wait_for("the end of the third", || !status(&control).takeover_running);
    let last = status(&control).last_takeover.unwrap();
    assert_eq!(last.outcome, "resumed");
    assert!(last.reason.unwrap().contains("the new configuration is wrong"));
    assert!(last.pause_us.is_some(), "this one had frozen");

    let complete = successor(&control, &service()).receive().unwrap().ready().unwrap();
    let mut taken = complete.accept::<NoRequests>().unwrap();
    server.join().unwrap();
    theirs.write_all(b"still there").unwrap();
    let mut bytes = [0; 11];
    let mut connection = taken.bundle.take::<UnixStream>("connection").unwrap().descriptor;
    connection.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still there");
}

/// Only one takeover at a time; the second successor is told whom it waits for.
#[test]
fn a_second_successor_is_told_that_a_takeover_goes_on() {
    let (scratch, server, offered) = offered(Bundle::new());
    let second =
        heirloom::start::<NoRequests>(&scratch.control(), service(), Config::default(), Replace::Try);
    match second {
        Err(StartError::Refused(failure)) => assert_eq!(failure.code, FailureCode::Busy),
        other => panic!("{other:?}"),
    }
    offered.ready().unwrap().accept::<NoRequests>().unwrap();
    server.join().unwrap();
}

/// Whoever asks while the successor before it dies is admitted, and not taken for the dead one, though both are found in one
/// turn.
#[test]
fn the_exit_of_a_successor_is_not_charged_to_the_next() {
    let scratch = Scratch::new();
    let mut incumbent = fresh(&scratch.control(), &service());
    let first = start_role("admitted", &scratch.control());
    wait_for("a takeover", || {
        turns(&mut incumbent);
        incumbent.takeover_running()
    });

    let mut second = Client::connect(scratch.control()).unwrap();
    let hello = Hello {
        protocol: VERSIONS,
        service: "test".into(),
        program: "tester".into(),
        version: "1.2.3".into(),
        pid: std::process::id(),
        schema: VersionRange::new(1, 1),
        room: 1000,
        generation: None,
        force: false,
    };
    second.send(&Request::<NoRequests>::Takeover(hello)).unwrap();
    drop(first);
    turns(&mut incumbent);

    let (line, mut descriptors) = second.receive().unwrap();
    assert!(matches!(Reply::parse(&line), Ok(Reply::Takeover(_))), "{}", String::from_utf8_lossy(&line));
    let channel = Channel::adopt(descriptors.pop().expect("a channel")).unwrap();
    let Ok(Incoming::Packet { bytes, descriptors }) = channel.receive() else { panic!("no packet") };
    assert_eq!(ToSuccessor::from_packet(&bytes, descriptors.len()), Ok(ToSuccessor::Offer));
    assert!(incumbent.takeover_running());
}

/// Lets an incumbent without items do what there is to do.
fn turns(incumbent: &mut Incumbent) {
    let bundle = Bundle::new();
    loop {
        match incumbent.turn(Instant::now()).expect("a turn") {
            Turn::Idle => return,
            Turn::Offer(offer) => offer.begin_bundle(&bundle).expect("an offer"),
            Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
            _ => panic!("nothing else was asked for"),
        }
    }
}

/// The state of the older of two programs, of the application and of its one item.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct OlderState {
    topic: String,
    handovers: u16,
    #[serde(default)]
    retired: bool,
}

/// The newer one's: a field more, one less, and one wider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct NewerState {
    topic: String,
    handovers: u64,
    #[serde(default)]
    colour: Option<String>,
}

fn older_program(control: &Path) {
    let service = Service::new("test").program("tester", "1").schema(1, 1..=2);
    let begin = || OlderState { topic: "boats".into(), handovers: 0, retired: true };
    program(control, service, begin, |state| {
        assert!(!state.retired, "the newer program does not know of it");
        state.handovers += 1;
    });
}

fn newer_program(control: &Path) {
    let service = Service::new("test").program("tester", "2").schema(2, 1..=2);
    let begin = || NewerState { topic: "boats".into(), handovers: 0, colour: None };
    program(control, service, begin, |state| {
        assert_eq!(state.colour, None, "the older program does not know of it");
        state.colour = Some("blue".into());
        state.handovers += 1;
    });
}

/// Starts fresh or takes over, changes the state, and serves until it is taken over.
fn program<S: Serialize + serde::de::DeserializeOwned>(
    control: &Path,
    service: Service,
    begin: impl Fn() -> S,
    change: impl Fn(&mut S),
) {
    let (bundle, incumbent) =
        match heirloom::start::<NoRequests>(control, service, Config::default(), Replace::Try).unwrap() {
            Start::Fresh(incumbent) => {
                let mut bundle = Bundle::new();
                bundle.set_state(&begin()).unwrap();
                bundle.add("pipe", io::pipe().unwrap().0, &begin()).unwrap();
                (bundle, incumbent)
            }
            Start::Successor(successor) => {
                let taken = successor.receive().unwrap().ready().unwrap().accept().unwrap();
                let mut bundle = taken.bundle;
                let mut state: S = bundle.state().unwrap().unwrap();
                change(&mut state);
                bundle.set_state(&state).unwrap();
                let item = bundle.take::<io::PipeReader>("pipe").unwrap();
                let mut state: S = item.state().unwrap().unwrap();
                change(&mut state);
                bundle.add("pipe", item.descriptor, &state).unwrap();
                (bundle, taken.incumbent)
            }
            _ => panic!("neither fresh nor a successor"),
        };
    serve(incumbent, bundle);
}

#[test]
fn an_upgrade_and_a_downgrade_read_each_others_state() {
    let scratch = Scratch::new();
    let control = scratch.control();
    let mut previous: Option<Process> = None;
    for (generation, role) in ["older", "newer", "older", "newer"].into_iter().enumerate() {
        if generation == 2 {
            // A downgrade finds `colour`, which it ignores, and no `retired`, for which it has a default.
            assert_eq!(status(&control).version, "2");
        }
        let process = start_role(role, &control);
        if let Some(mut previous) = previous.replace(process) {
            previous.ends_well();
        }
        wait_for("the next generation", || status(&control).generation == generation as u64);
    }

    let reader = Service::new("test").program("tester", "2").schema(2, 1..=2);
    let complete = successor(&control, &reader).receive().unwrap().ready().unwrap();
    let mut taken = complete.accept::<NoRequests>().unwrap();
    previous.unwrap().ends_well();
    let expected = NewerState { topic: "boats".into(), handovers: 3, colour: Some("blue".into()) };
    assert_eq!(taken.bundle.state().unwrap(), Some(expected.clone()));
    let item = taken.bundle.take::<io::PipeReader>("pipe").unwrap();
    assert_eq!(item.state().unwrap(), Some(expected));
    assert_eq!(taken.incumbent.generation(), 4);
}

/// The example that extends the control requests keeps its promise: the state survives, the requests are answered.
#[test]
fn the_example_of_own_requests() {
    #[derive(Serialize)]
    enum Mine {
        Topic,
        SetTopic { topic: String },
    }

    let Some(program) = example("control_requests") else { return };
    let scratch = Scratch::new();
    let control = scratch.control();
    let ask = |request| Client::connect(&control).unwrap().request(&Request::Application(request)).unwrap();
    let start = || {
        let mut process = Process::start(Command::new(&program).arg(&control));
        process.line("keeping the topic");
        process
    };

    let mut first = start();
    assert_eq!(ask(Mine::Topic), Reply::Application(json!({"topic": ""})));
    let set = Mine::SetTopic { topic: "boats".into() };
    assert_eq!(ask(set), Reply::Application(json!({"topic": ""})));
    let _second = start();
    first.ends_well();
    assert_eq!(ask(Mine::Topic), Reply::Application(json!({"topic": "boats"})));
    Process::start(Command::new(&program).arg(&control).arg("birds")).line("before it was: boats");
    assert_eq!(ask(Mine::Topic), Reply::Application(json!({"topic": "birds"})));
}

/// Eight threads that block, each with a connection of its own, are stopped by a gate and go on in the next process.
mod threads {
    use super::*;

    const CONNECTIONS: u64 = 8;
    const TAKEOVERS: u64 = 6;

    struct Connection {
        socket: UnixStream,
        /// What was read and not yet sent back.
        unsent: Mutex<Vec<u8>>,
    }

    /// Echoes until the connection or the gate ends. Reading and writing have a pass each, so that a freeze can come
    /// between them.
    fn echo(worker: &Worker, connection: &Connection) -> io::Result<()> {
        loop {
            let is_empty = connection.unsent.lock().unwrap().is_empty();
            let pass = match is_empty {
                true => worker.wait_readable(&connection.socket)?,
                false => worker.wait_writable(&connection.socket)?,
            };
            if pass.is_none() {
                return Ok(());
            }
            let mut unsent = connection.unsent.lock().unwrap();
            if is_empty {
                let mut buffer = [0; 1000];
                let (_, n) = recv(&connection.socket, &mut buffer, RecvFlags::DONTWAIT)?;
                if n == 0 {
                    return connection.socket.shutdown(Shutdown::Both);
                }
                unsent.extend_from_slice(&buffer[..n]);
            } else {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let sent = match send(&connection.socket, &unsent, flags) {
                    Err(rustix::io::Errno::AGAIN) => 0,
                    sent => sent?,
                };
                unsent.drain(..sent);
            }
        }
    }

    /// The server: the first process accepts its connections beside the control socket, the others take over.
    pub(super) fn serve(control: &Path) -> Result<(), Box<dyn std::error::Error>> {
        let (mut bundle, incumbent) =
            match heirloom::start(control, service(), Config::default(), Replace::Try)? {
                Start::Fresh(incumbent) => {
                    let listener = UnixListener::bind(control.with_file_name("echo.sock"))?;
                    let mut bundle = Bundle::new();
                    for _ in 0..CONNECTIONS {
                        bundle.add_plain("connection", listener.accept()?.0)?;
                    }
                    (bundle, incumbent)
                }
                Start::Successor(successor) => {
                    let taken = successor.receive()?.ready()?.accept()?;
                    (taken.bundle, taken.incumbent)
                }
                _ => return Err("neither fresh nor a successor".into()),
            };
        let mut connections = BTreeMap::new();
        for entry in bundle.entries() {
            let descriptor = bundle.descriptor(entry.id).ok_or("an entry without a descriptor")?;
            let socket = UnixStream::from(descriptor.try_clone_to_owned()?);
            let connection = Connection { socket, unsent: Mutex::new(entry.state.clone()) };
            connections.insert(entry.id, Arc::new(connection));
        }

        let gate = Gate::new()?;
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for connection in connections.values() {
                let worker = gate.worker();
                threads.push(scope.spawn(move || echo(&worker, connection)));
            }
            let served = hand_over(incumbent, &gate, &mut bundle, &connections);
            gate.end();
            for thread in threads {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            let _ = bundle.close_rest();
            served
        })
    }

    fn hand_over(
        mut incumbent: Incumbent,
        gate: &Gate,
        bundle: &mut Bundle,
        connections: &BTreeMap<ItemId, Arc<Connection>>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            wait(&incumbent, &mut Vec::new(), None)?;
            loop {
                match incumbent.turn(Instant::now())? {
                    Turn::Idle => break,
                    Turn::Offer(offer) => offer.begin_bundle(bundle)?,
                    Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
                    Turn::Freeze(freeze) => {
                        if !gate.freeze(Instant::now() + LONG)? {
                            freeze.resume("a thread does not come to the gate");
                            continue;
                        }
                        for (&id, connection) in connections {
                            bundle.update_encoded(id, connection.unsent.lock().unwrap().clone())?;
                        }
                        match freeze.release_bundle(bundle)? {
                            Outcome::Taken(_) => return Ok(()),
                            Outcome::Superseded(why) => return Err(why.into()),
                            Outcome::Resumed(_) => gate.thaw()?,
                        }
                    }
                    Turn::Request(_) | Turn::Closed(_) | Turn::Delegated(_) => {}
                    Turn::Quit(_) => return Ok(()),
                }
            }
        }
    }

    #[test]
    fn eight_blocking_threads_lose_nothing_in_takeovers_by_other_processes() {
        let scratch = Scratch::new();
        let control = scratch.control();
        let mut server = start_role("threads", &control);
        let path = control.with_file_name("echo.sock");

        let (stop, echoed) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let mut clients = Vec::new();
            for seed in 0..CONNECTIONS {
                let mut socket = None;
                wait_for("the server's listener", || {
                    socket = UnixStream::connect(&path).ok();
                    socket.is_some()
                });
                let reader = socket.expect("waited for");
                let mut writer = reader.try_clone().unwrap();
                let stop = &stop;
                let writing = scope.spawn(move || {
                    let mut position = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let bytes = stretch(seed, position, 1 + (position % 1777) as usize);
                        writer.write_all(&bytes).unwrap();
                        position += bytes.len() as u64;
                    }
                    writer.shutdown(Shutdown::Write).unwrap();
                    position
                });
                let echoed = &echoed;
                let reading = scope.spawn(move || read_pattern(reader, seed, echoed));
                clients.push((writing, reading));
            }
            for generation in 1..=TAKEOVERS {
                let before = echoed.load(Ordering::Relaxed);
                wait_for("traffic", || echoed.load(Ordering::Relaxed) > before + 100_000);
                let next = start_role("threads", &control);
                wait_for("the takeover", || status(&control).generation == generation);
                std::mem::replace(&mut server, next).ends_well();
                assert_eq!(status(&control).last_takeover.unwrap().items, CONNECTIONS + 1);
            }
            let before = echoed.load(Ordering::Relaxed);
            wait_for("traffic in the last process", || echoed.load(Ordering::Relaxed) > before + 100_000);
            stop.store(true, Ordering::Relaxed);
            for (writing, reading) in clients {
                assert_eq!(writing.join().unwrap(), reading.join().unwrap(), "not everything came back");
            }
        });
    }

    /// Reads to the end, compares with what was sent, and says how much it was.
    fn read_pattern(mut reader: UnixStream, seed: u64, echoed: &AtomicU64) -> u64 {
        let mut position = 0;
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let n = reader.read(&mut buffer).unwrap();
            if n == 0 {
                return position;
            }
            for &byte in &buffer[..n] {
                assert_eq!(byte, pattern(seed, position), "connection {seed} differs at byte {position}");
                position += 1;
            }
            echoed.fetch_add(n as u64, Ordering::Relaxed);
        }
    }
}
