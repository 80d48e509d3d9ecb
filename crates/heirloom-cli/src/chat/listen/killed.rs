//! A server that is killed at any step, over and over, within one process: to its clients it is as if it had not been.
//!
//! A kill is a panic at a step, after which everything is forgotten but what a store would have held. What the clients then have
//! said and heard is compared with what the events make of an empty room, one after the other, by nobody who is ever killed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use heirloom::ItemId;
use mio::Poll;
use proptest::prelude::*;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

use super::event::Event;
use super::ids::Ids;
use super::journal::RoomJournal;
use super::recovery::{Stored, recover};
use super::room::{Counters, Room};
use super::switchboard::Switchboard;

/// More than this may not be unsent.
const BACKLOG: usize = 60_000;

thread_local! {
    static TAPE: RefCell<Tape> = const { RefCell::new(Tape::new()) };
}

/// What happens on this thread.
struct Tape {
    events: Vec<Event<'static>>,
    /// How many steps there are until the next kill.
    left: Option<usize>,
    /// The next kill is when somebody is to be cut off.
    at_cut_off: bool,
}

impl Tape {
    const fn new() -> Tape {
        Tape { events: Vec::new(), left: None, at_cut_off: false }
    }
}

/// What a kill unwinds with.
struct Killed;

/// An event is in the journal.
pub(super) fn appended(event: &Event<'_>) {
    let event = match event.clone() {
        Event::Said { id, bytes } => Event::Said { id, bytes: bytes.into_owned().into() },
        Event::Joined { id, address, counted } => Event::Joined { id, address, counted },
        Event::Left { id } => Event::Left { id },
        Event::CutOff { id } => Event::CutOff { id },
        Event::Gone { id, heard } => Event::Gone { id, heard },
        Event::Closed => Event::Closed,
    };
    TAPE.with_borrow_mut(|tape| {
        if matches!(event, Event::CutOff { .. }) && std::mem::take(&mut tape.at_cut_off) {
            tape.left = Some(0);
        }
        tape.events.push(event);
    });
    step();
}

/// A step after which the server may be killed.
pub(super) fn step() {
    let killed = TAPE.with_borrow_mut(|tape| match &mut tape.left {
        Some(0) => tape.left.take().is_some(),
        Some(left) => {
            *left -= 1;
            false
        }
        None => false,
    });
    if killed {
        std::panic::resume_unwind(Box::new(Killed));
    }
}

/// What the test does. Numbers of clients are taken modulo how many there are.
#[derive(Clone, Debug)]
enum Act {
    Connect,
    Say(usize, Vec<u8>),
    Read(usize),
    Shutdown(usize),
    Reset(usize),
    /// The server works, and is killed after so many steps.
    Work(Option<usize>),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let said = prop_oneof![
        5 => "[a-z\n]{1,12}".prop_map(String::into_bytes),
        1 => (1000..30_000usize).prop_map(|length| [vec![b'x'; length], b"\n".to_vec()].concat()),
    ];
    let act = prop_oneof![
        2 => Just(Act::Connect),
        8 => (any::<usize>(), said).prop_map(|(who, what)| Act::Say(who, what)),
        3 => any::<usize>().prop_map(Act::Read),
        1 => any::<usize>().prop_map(Act::Shutdown),
        1 => any::<usize>().prop_map(Act::Reset),
        8 => prop::option::weighted(0.6, 0..12usize).prop_map(Act::Work),
    ];
    prop::collection::vec(act, 1..60)
}

/// A client as the test plays it.
struct Guest {
    id: ItemId,
    socket: TcpStream,
    said: Vec<u8>,
    heard: Vec<u8>,
    /// It has reset its connection, or closed it without having heard everything.
    reset: bool,
    /// How the connection ended.
    end: Option<Result<(), ErrorKind>>,
}

impl Guest {
    fn say(&mut self, bytes: &[u8]) {
        // Nobody waits here: what the kernel does not take is not said.
        if let Ok(count) = self.socket.write(bytes) {
            self.said.extend_from_slice(&bytes[..count]);
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while self.end.is_none() && !self.reset {
            match self.socket.read(&mut buffer) {
                Ok(0) => self.end = Some(Ok(())),
                Ok(count) => self.heard.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => self.end = Some(Err(error.kind())),
            }
        }
    }
}

/// A server, its store, and its clients.
struct World {
    listener: TcpListener,
    guests: Vec<Guest>,
    ids: Ids,
    poll: Poll,
    server: Option<Switchboard>,
    /// What the store holds.
    stored: BTreeMap<ItemId, TcpStream>,
    journal: OwnedFd,
    kills: usize,
}

impl World {
    fn new() -> World {
        TAPE.set(Tape::new());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let poll = Poll::new().unwrap();
        let ids = Ids::from(ItemId(3));
        let room = Room::new(ids.next(), Counters::default());
        let mut server = Switchboard::new(poll.registry().try_clone().unwrap(), BACKLOG, room);
        server.write_down(RoomJournal::create().unwrap()).unwrap();
        let journal = server.journal().unwrap().as_fd().try_clone_to_owned().unwrap();
        let (guests, stored) = Default::default();
        World { listener, guests, ids, poll, server: Some(server), stored, journal, kills: 0 }
    }

    /// Somebody connects, and is in the store.
    fn connect(&mut self) -> (ItemId, TcpStream) {
        let socket = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = self.listener.accept().unwrap();
        set_socket_recv_buffer_size(&socket, 8 * 1024).unwrap();
        set_socket_send_buffer_size(&accepted, 8 * 1024).unwrap();
        for socket in [&socket, &accepted] {
            socket.set_nonblocking(true).unwrap();
            socket.set_nodelay(true).unwrap();
        }
        let id = self.ids.take().unwrap();
        self.stored.insert(id, accepted.try_clone().unwrap());
        let (said, heard) = Default::default();
        self.guests.push(Guest { id, socket, said, heard, reset: false, end: None });
        (id, accepted)
    }

    /// The server does something, and may be killed in the middle of it.
    fn serve(&mut self, steps: Option<usize>, work: impl FnOnce(&mut Switchboard)) {
        TAPE.with_borrow_mut(|tape| tape.left = steps);
        let mut steps = steps;
        let mut work = Some(work);
        loop {
            let server = self.server.take();
            let done = catch_unwind(AssertUnwindSafe(|| {
                let mut server = server.unwrap_or_else(|| self.restart());
                if let Some(work) = work.take() {
                    work(&mut server);
                }
                server
            }));
            match done {
                Ok(mut server) => {
                    server.take_ended().iter().for_each(|id| drop(self.stored.remove(id)));
                    self.server = Some(server);
                    TAPE.with_borrow_mut(|tape| tape.left = None);
                    return;
                }
                Err(killed) if killed.is::<Killed>() => {
                    self.kills += 1;
                    // A recovery is killed too, some steps earlier each time.
                    steps = steps.map(|steps| steps / 2).filter(|&steps| steps > 0);
                    TAPE.with_borrow_mut(|tape| tape.left = steps);
                }
                Err(failed) => std::panic::resume_unwind(failed),
            }
        }
    }

    /// The next process. Nothing of the last one is left.
    fn restart(&mut self) -> Switchboard {
        // The old one still watches what is stored.
        self.poll = Poll::new().unwrap();
        let stored = self.stored.iter().map(|(&id, socket)| {
            (id, Stored { socket: socket.try_clone().unwrap(), address: "somewhere".into() })
        });
        let journal = self.journal.try_clone().unwrap();
        let registry = self.poll.registry().try_clone().unwrap();
        recover(stored.collect(), Some(journal), self.ids.next(), registry, BACKLOG).unwrap()
    }

    fn work(&mut self, steps: Option<usize>) {
        let ids: Vec<ItemId> = self.guests.iter().map(|guest| guest.id).collect();
        self.work_for(&ids, steps);
    }

    /// The server hears of these.
    fn work_for(&mut self, ids: &[ItemId], steps: Option<usize>) {
        self.serve(steps, |server| {
            ids.iter().for_each(|&id| server.hear_of(id, true, true));
            server.turn(Instant::now());
        });
    }

    fn join(&mut self) -> ItemId {
        let (id, socket) = self.connect();
        self.serve(None, |server| server.join(id, socket, "somewhere".into()).unwrap());
        id
    }

    fn act(&mut self, act: Act) {
        let count = self.guests.len();
        let guest = |who: usize| (count > 0).then(|| who % count.max(1));
        match act {
            Act::Connect => {
                let (id, socket) = self.connect();
                // It is not let in twice, though the server may be killed before or after.
                self.serve(Some(id.0 as usize % 3), |server| {
                    server.join(id, socket, "somewhere".into()).unwrap();
                });
            }
            Act::Say(who, what) => guest(who).into_iter().for_each(|who| self.guests[who].say(&what)),
            Act::Read(who) => guest(who).into_iter().for_each(|who| self.guests[who].read()),
            Act::Shutdown(who) => {
                guest(who).into_iter().for_each(|who| drop(self.guests[who].socket.shutdown(Shutdown::Write)))
            }
            Act::Reset(who) => guest(who).into_iter().for_each(|who| {
                self.guests[who].reset = true;
                let _ = rustix::net::connect_unspec(&self.guests[who].socket);
            }),
            Act::Work(steps) => self.work(steps),
        }
    }

    /// Lets everything come to its end, and compares.
    fn finish(mut self) {
        let give_up = Instant::now() + Duration::from_secs(60);
        loop {
            self.work(None);
            self.guests.iter_mut().for_each(Guest::read);
            let server = self.server.as_ref().unwrap();
            let log = Log::of(TAPE.with_borrow(|tape| tape.events.clone()));
            let settled = self.guests.iter().all(|guest| log.is_settled(guest));
            if settled && !server.has_more() && server.unsent() == 0 {
                self.guests.iter().for_each(|guest| log.check(guest));
                return;
            }
            assert!(Instant::now() < give_up, "it does not come to an end");
        }
    }
}

/// What the events say that everybody has said and was to hear.
struct Log {
    said: BTreeMap<ItemId, Vec<u8>>,
    heard: BTreeMap<ItemId, Vec<u8>>,
    cut_off: Vec<ItemId>,
    gone: Vec<ItemId>,
}

impl Log {
    fn of(events: Vec<Event<'static>>) -> Log {
        let mut room = Room::new(ItemId(3), Counters::default());
        let mut log =
            Log { said: BTreeMap::new(), heard: BTreeMap::new(), cut_off: Vec::new(), gone: Vec::new() };
        for event in events {
            match &event {
                Event::Said { id, bytes } => log.said.entry(*id).or_default().extend_from_slice(bytes),
                Event::CutOff { id } => log.cut_off.push(*id),
                Event::Gone { id, heard } => {
                    assert!(heard, "{id} is cut off only after ten seconds");
                    log.gone.push(*id);
                }
                Event::Joined { id, .. } => {
                    assert!(room.client(*id).is_none() && !log.heard.contains_key(id), "{id} joins twice");
                }
                Event::Left { id } => assert!(!room.client(*id).unwrap().is_leaving(), "{id} leaves twice"),
                Event::Closed => {}
            }
            for client in room.clients() {
                log.heard.insert(client.id(), client.outbox().to_vec());
            }
            room.happen(&event);
        }
        for client in room.clients() {
            log.heard.insert(client.id(), client.outbox().to_vec());
        }
        log
    }

    fn said(&self, guest: &Guest) -> &[u8] {
        self.said.get(&guest.id).map_or(&[], Vec::as_slice)
    }

    /// Whether nothing more is to come.
    fn is_settled(&self, guest: &Guest) -> bool {
        if guest.reset || self.cut_off.contains(&guest.id) {
            return self.gone.contains(&guest.id) || self.cut_off.contains(&guest.id);
        }
        self.said(guest).len() >= guest.said.len() && guest.heard.len() >= self.heard[&guest.id].len()
    }

    #[track_caller]
    fn check(&self, guest: &Guest) {
        let (said, heard) = (self.said(guest), &self.heard[&guest.id]);
        if guest.reset {
            // What it had sent need not have arrived, or been sent.
            assert!(guest.said.starts_with(said));
            return;
        }
        if self.cut_off.contains(&guest.id) {
            assert!(guest.said.starts_with(said) && heard.starts_with(&guest.heard));
            assert!(guest.end.is_none_or(|end| end.is_err()), "{:?}", guest.end);
            return;
        }
        assert!(guest.said == said, "{} has said {:?}, and {said:?} was heard", guest.id, guest.said);
        assert!(
            &guest.heard == heard,
            "{} has heard {:?}, and was to hear {:?}",
            guest.id,
            String::from_utf8_lossy(&guest.heard),
            String::from_utf8_lossy(heard)
        );
        assert_eq!(guest.end, self.gone.contains(&guest.id).then_some(Ok(())), "{}", guest.id);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_step_it_is_killed_at_it_is_as_if_it_was_not(acts in acts()) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        world.finish();
    }
}

/// Killed when what a client has said last is written down and not taken, or later: with its connection over by then, in each
/// way in which it can be.
#[test]
fn a_connection_that_is_over_has_said_everything_once() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Over {
        Reset,
        Closed,
        /// The server has heard the error before it reads.
        ClosedAndTold,
    }
    for over in [Over::Reset, Over::Closed, Over::ClosedAndTold] {
        for (last, steps) in [&b"x"[..], b"xyz"].into_iter().flat_map(|last| (0..8).map(move |n| (last, n))) {
            let mut world = World::new();
            let (other, leaver) = (world.join(), world.join());
            world.guests[1].say(b"a");
            world.work(None);
            // Finds that there is nothing more.
            world.work(None);
            world.guests[1].say(last);
            match over {
                Over::Reset => rustix::net::connect_unspec(&world.guests[1].socket).unwrap(),
                Over::Closed | Over::ClosedAndTold => {
                    // With nothing unread it ends; what is sent to it then is answered with a reset.
                    world.guests[1].read();
                    let elsewhere = TcpStream::connect(world.listener.local_addr().unwrap()).unwrap();
                    drop(std::mem::replace(&mut world.guests[1].socket, elsewhere));
                }
            }
            world.guests[1].reset = true;
            for _ in 0..(1 + usize::from(over == Over::ClosedAndTold)) {
                world.guests[0].say(b"hello\n");
                world.work_for(&[other], None);
            }
            if over != Over::ClosedAndTold {
                let stored = &world.stored[&leaver];
                wait_until_over(stored);
            }
            for _ in 0..3 {
                world.work_for(&[leaver], Some(steps));
            }
            let (said, kills) = (world.guests[1].said.clone(), world.kills);
            world.finish();
            let log = Log::of(TAPE.with_borrow(|tape| tape.events.clone()));
            assert_eq!(log.said[&leaver], said, "{over:?}, killed after {steps} steps");
            assert!(kills > 0 || steps > 0);
        }
    }
}

fn wait_until_over(socket: &TcpStream) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while !heirloom_sys::tcp_counters(socket).unwrap().is_over() {
        assert!(Instant::now() < give_up, "it is not over");
    }
}

/// Killed between the decision to cut somebody off, and the reset: it is reset, so that it does not take what it has for all.
#[test]
fn who_was_about_to_be_cut_off_is() {
    let mut world = World::new();
    let (_, deaf) = (world.join(), world.join());
    let long = [vec![b'x'; 20_000], b"\n".to_vec()].concat();
    let is_cut_off = || TAPE.with_borrow(|tape| tape.events.contains(&Event::CutOff { id: deaf }));
    TAPE.with_borrow_mut(|tape| tape.at_cut_off = true);
    while !is_cut_off() {
        world.guests[0].say(&long);
        world.work(None);
        world.guests[0].read();
    }
    assert_eq!(world.kills, 1);
    world.finish();
}

/// What the store does not hold has ended with the process.
#[test]
fn whose_connection_was_lost_has_left() {
    let mut world = World::new();
    let (_, lost) = (world.join(), world.join());
    world.guests[1].say(b"half a line");
    world.work(None);
    drop((world.server.take(), world.stored.remove(&lost)));
    world.guests[1].reset = true;
    world.guests[0].say(b"\n");
    world.work(None);
    world.guests[0].read();
    let heard = String::from_utf8(world.guests[0].heard.clone()).unwrap();
    assert!(heard.ends_with("<user4> half a line\n<announce> <user4> is disconnected.\n"), "{heard}");
}

/// The server was being stopped: everybody's connection has ended, and the next one begins without clients.
#[test]
fn a_stop_is_not_undone() {
    let mut world = World::new();
    world.join();
    world.guests[0].say(b"half a line");
    world.work(None);
    world.serve(Some(0), Switchboard::close);
    assert!(world.kills == 1 && world.stored.is_empty());
    world.guests[0].read();
    assert_eq!(world.guests[0].end, Some(Ok(())));
    let id = world.join();
    assert_eq!(world.server.as_ref().unwrap().room().clients().count(), 1);
    assert!(id > world.guests[0].id);
}

/// After a takeover the successor may know nothing of the journal.
#[test]
fn a_journal_that_was_handed_over_counts_only_if_nothing_was_touched() {
    for touched in [false, true] {
        let mut world = World::new();
        let ids = [world.join(), world.join()];
        world.guests[0].say(b"hello\nhalf a li");
        world.work(None);
        world.server.as_mut().unwrap().hand_over();
        world.server = None;
        if touched {
            (&world.stored[&ids[1]]).write_all(b"something else\n").unwrap();
        }
        world.guests[0].say(b"ne\n");
        world.work(None);
        world.guests[1].read();
        let heard = String::from_utf8(world.guests[1].heard.clone()).unwrap();
        if touched {
            assert!(world.stored.is_empty() && world.guests[1].end.is_some_and(|end| end.is_err()));
            assert!(heard.ends_with("hello\nsomething else\n"), "{heard}");
        } else {
            world.finish();
        }
    }
}
