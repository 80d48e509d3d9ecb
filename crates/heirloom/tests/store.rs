//! The store's client in processes that are killed: whatever a call had promised before the kill, the next process finds.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use heirloom::channel::{Channel, SendError};
use heirloom::descriptors::{Wait, receive_with};
use heirloom::manifest::{read_sealed, seal};
use heirloom::notify::Message;
use heirloom::store::{END, FetchReply, FetchRequest, HEIRLOOM_STORE, Restored, restore};
use heirloom::{Cbor, Codec, Config, Entry, Incumbent, ItemId, Kind, Limits, Replace, Service, Start, Turn};
use rustix::event::{PollFd, PollFlags, poll};
use support::*;

/// Makes this test binary the program whose descriptors are kept.
const PROGRAM: &str = "HEIRLOOM_TEST_STORE";
const KILLS: u64 = 30;

/// A supervisor that keeps what it is sent, as `heirloom run` does.
struct Keeper {
    scratch: Scratch,
    kept: Arc<Mutex<Vec<(String, OwnedFd)>>>,
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Keeper {
    fn start() -> Keeper {
        let scratch = Scratch::new();
        let started =
            heirloom::start(&scratch.control(), Service::new("keeper"), Config::default(), Replace::Never);
        let Ok(Start::Fresh(incumbent)) = started else { panic!("{started:?}") };
        let socket = UnixDatagram::bind(scratch.path("notify")).expect("a socket");
        let (kept, over) = (Arc::default(), Arc::default());
        let thread = {
            let (kept, over) = (Arc::clone(&kept), Arc::clone(&over));
            thread::spawn(move || keep(incumbent, &socket, &kept, &over))
        };
        Keeper { scratch, kept, over, thread: Some(thread) }
    }

    fn run(&self, seed: u64) -> Process {
        let mut program = Command::new(std::env::current_exe().expect("this program"));
        program.args(["--exact", "program", "--nocapture"]).env(PROGRAM, seed.to_string());
        program.env("NOTIFY_SOCKET", self.scratch.path("notify")).env(HEIRLOOM_STORE, self.scratch.control());
        Process::start(&mut program)
    }

    fn names(&self) -> Vec<String> {
        self.kept.lock().expect("no panic").iter().map(|(name, _)| name.clone()).collect()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().expect("once").join();
    }
}

fn keep(
    mut incumbent: Incumbent<FetchRequest>,
    socket: &UnixDatagram,
    kept: &Mutex<Vec<(String, OwnedFd)>>,
    over: &AtomicBool,
) {
    let soon = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    while !over.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&incumbent, PollFlags::IN)];
        poll(&mut fds, Some(&soon)).expect("poll");
        let mut kept = kept.lock().expect("no panic");
        let mut buffer = [0; 4096];
        while let Ok(received) = receive_with(socket, &mut buffer, Wait::DontWait) {
            let text = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
            let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            let name = value("FDNAME").unwrap_or_default();
            if value("FDSTOREREMOVE").is_some() {
                kept.retain(|(kept, _)| kept != name);
            }
            kept.extend(received.descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
        }
        loop {
            match incumbent.turn(Instant::now()).expect("a turn") {
                Turn::Idle => break,
                Turn::Request(asked) => {
                    let (ours, theirs) = Channel::pair().expect("a channel");
                    let reply = FetchReply::Fetch { descriptors: kept.len() as u64 };
                    let mut line = serde_json::to_vec(&reply).expect("JSON");
                    line.push(b'\n');
                    asked.reply_raw(line, vec![theirs]);
                    for some in kept.chunks(200) {
                        let names: String = some.iter().map(|(name, _)| format!("{name}\n")).collect();
                        let descriptors: Vec<_> = some.iter().map(|(_, kept)| kept.as_fd()).collect();
                        // What does not fit is missing, which the other end finds out.
                        let _ = ours.send(names.as_bytes(), &descriptors);
                    }
                    assert!(!matches!(ours.send(END, &[]), Err(SendError::Full)));
                }
                _ => {}
            }
        }
    }
}

/// What a program has said of one item.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    /// The state that it has for certain.
    state: u64,
    /// A state that it may have.
    maybe: Option<u64>,
    /// It may not be there (yet, or any more).
    doubtful: bool,
}

/// The program: restores, says what it has found, and then puts, changes and removes until it is killed.
#[test]
fn program() {
    let Some(seed) = std::env::var(PROGRAM).ok().and_then(|seed| seed.parse::<u64>().ok()) else { return };
    let say = |line: String| {
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| stdout.flush())
            .expect("somebody reads");
    };
    let Restored { bundle, activated, store } = restore(None, &Limits::default()).expect("everything");
    assert!(activated.is_empty());
    let mut store = store.expect("there is a keeper");
    let found: Vec<String> = bundle
        .items()
        .map(|(entry, descriptor)| {
            // It is the one that was put under this id.
            assert_eq!(read_sealed(descriptor, 100).expect("sealed"), entry.id.to_string().as_bytes());
            format!("{}={}", entry.id, Cbor::decode::<u64>(&entry.state).expect("a number"))
        })
        .collect();
    say(format!("found {}", found.join(" ")));
    let mut next_id = bundle.next_id().0;
    let mut items: Vec<ItemId> = bundle.entries().map(|entry| entry.id).collect();
    drop(bundle.close_rest());
    store.notify(Message::new().ready());
    let mut random = seed;
    for state in seed * 1_000_000.. {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let any = (random >> 33) as usize;
        let encoded = Cbor::encode(&state).expect("a number");
        match any % 4 {
            0 | 1 if items.len() < 400 => {
                let id = ItemId(next_id);
                next_id += 1;
                say(format!("putting {id} {state}"));
                let memfd = seal("item", id.to_string().as_bytes()).expect("a memfd");
                let entry = Entry { id, name: "item".into(), kind: Kind::Memfd, state: encoded };
                store.put(entry, &memfd).expect("a put");
                while !store.holds(id) {
                    poll(&mut [PollFd::new(&store, PollFlags::OUT)], None).expect("poll");
                    store.flush();
                }
                items.push(id);
                say(format!("put {id} {state}"));
            }
            2 if !items.is_empty() => {
                let id = items.swap_remove(any / 4 % items.len());
                say(format!("removing {id} 0"));
                store.remove(id).expect("a removal");
                // What waits is sent before the item counts as removed: the test looks into the store, too.
                while store.is_waiting() {
                    poll(&mut [PollFd::new(&store, PollFlags::OUT)], None).expect("poll");
                    store.flush();
                }
                say(format!("removed {id} 0"));
            }
            _ if !items.is_empty() => {
                let id = items[any / 4 % items.len()];
                say(format!("setting {id} {state}"));
                store.set_item_state(id, &encoded).expect("a change");
                say(format!("set {id} {state}"));
            }
            _ => {}
        }
    }
}

#[test]
fn whatever_was_promised_before_a_kill_is_found_after_it() {
    if std::env::var_os(PROGRAM).is_some() {
        return;
    }
    let keeper = Keeper::start();
    let mut known: BTreeMap<u64, Known> = BTreeMap::new();
    let (mut changes, mut doubts) = (0, 0);
    for round in 0..KILLS {
        let mut program = keeper.run(round + 1);
        let line = program.line("found");
        let found: BTreeMap<u64, u64> = line
            .split_whitespace()
            .map(|item| item.split_once('=').expect("a state"))
            .map(|(id, state)| (id.parse().expect("a number"), state.parse().expect("a number")))
            .collect();
        for (id, state) in &found {
            let item = known.get(id).unwrap_or_else(|| panic!("{id} was never put, or was removed"));
            assert!(item.state == *state || item.maybe == Some(*state), "{id} has {state}: {item:?}");
        }
        for (id, item) in &known {
            assert!(found.contains_key(id) || item.doubtful, "{id} is lost: {item:?}");
        }
        known = found.into_iter().map(|(id, state)| (id, Known { state, ..Known::default() })).collect();

        // The kill comes at a moment of its own, in the middle of whatever is done then.
        let pid = rustix::process::Pid::from_raw(program.id().cast_signed()).expect("a pid");
        thread::spawn(move || {
            thread::sleep(Duration::from_micros(500 + round * 1700));
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it runs");
        });
        for line in program.lines() {
            let mut words = line.split_whitespace();
            let (Some(what), Some(id), Some(state)) = (words.next(), words.next(), words.next()) else {
                break;
            };
            let Ok(state) = state.parse() else { break };
            let id = id.parse().expect("a number");
            changes += 1;
            match what {
                "putting" => drop(known.insert(id, Known { state, doubtful: true, ..Known::default() })),
                "put" => drop(known.insert(id, Known { state, ..Known::default() })),
                "setting" => known.get_mut(&id).expect("there").maybe = Some(state),
                "set" => drop(known.insert(id, Known { state, ..Known::default() })),
                "removing" => known.get_mut(&id).expect("there").doubtful = true,
                "removed" => drop(known.remove(&id)),
                _ => break,
            }
        }
        doubts += known.values().filter(|item| item.doubtful || item.maybe.is_some()).count();
    }
    println!("{KILLS} kills in {changes} steps, {doubts} in the middle of one");
    assert!(changes > 100, "only {changes} steps were taken");
    // Nothing is kept that nobody knows of: of what the last one has left, at most one is in doubt.
    wait_for("the store to hold what is known and the ledger", || {
        keeper.names().len().abs_diff(known.len() + 1) <= 1
    });
}
