//! One event loop: the connections of a thread, and what happens to them.
//!
//! It does nothing unless something has happened, and gives each connection a bounded turn. Its state is touched under its lock
//! alone: by its own thread in a turn, or by whoever hands over while the [gate](crate::gate) is closed.

mod accepting;
mod balancing;
mod connecting;
mod lending;
mod waking;

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heirloom::courtesy;
use heirloom::runtime::mio::{deregister, reregister};
use mio::{Events, Poll, Registry, Token};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::arriving::Dormant;
use crate::clock::{self, Time, nanoseconds};
use crate::connection::{Connection, How, Next, Stage, Told};
use crate::door::Door;
use crate::fair::FairMutex;
use crate::id::{Key, KeyMap, Side, token};
use crate::pipes::Pipes;
use crate::shared::Shared;

/// Another loop has something for this one. No item ever has this id.
pub(crate) const WAKE: Token = Token(usize::MAX);
const EVENTS: usize = 512;
/// When those are tried again for which there was no pipe.
const AGAIN: Duration = Duration::from_millis(5);
/// Between two times at which some of those are woken that were taken over and have not moved yet.
const WAKE_EVERY: Duration = Duration::from_millis(1);

/// See the [module](self).
pub(crate) struct EventLoop {
    pub(crate) number: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) registry: Arc<Registry>,
    /// Each in a place of its own, so that the map is small, and no turn has much to move when it grows.
    pub(crate) connections: KeyMap<Box<Connection>>,
    pub(crate) doors: Vec<Door>,
    pub(crate) pipes: Pipes,
    pub(crate) timers: crate::timers::Timers,
    /// Taken over, and of these nobody tells that there is something to do.
    urgent: Vec<Key>,
    /// Taken over, and not touched yet.
    pub(crate) dormant: Option<Dormant>,
    /// When some more of these are woken.
    wake_next: Time,
    /// A successor was offered what there is.
    pub(crate) lending: bool,
    /// Of these something has changed since then, or they are new.
    pub(crate) touched: Vec<Key>,
    /// These were offered, and have ended since.
    pub(crate) ended: Vec<Key>,
    /// Those that were accepted here of late, and when they are to be settled.
    young: VecDeque<(Time, Key)>,
    /// Connections that have their turn next.
    due: VecDeque<Key>,
    /// Those for which there is no pipe.
    starving: VecDeque<Key>,
    /// Those for which there is no backend.
    pub(crate) waiting: VecDeque<Key>,
    /// There is more to accept.
    more: bool,
    /// When to try again, with nothing to tell.
    again: Option<Time>,
    now: Time,
}

/// Runs a loop until the gate is abandoned, on this processor alone if there is one.
pub(crate) fn run(mut poll: Poll, state: &FairMutex<EventLoop>, shared: &Shared, processor: Option<usize>) {
    // Who has started this thread gives way.
    courtesy::take_turns();
    if let Some(Err(error)) = processor.map(stay_on) {
        tracing::warn!(%error, "cannot keep an event loop on a processor");
    }
    let mut events = Events::with_capacity(EVENTS);
    let mut patience = Some(Duration::ZERO);
    while shared.gate.pass() {
        match poll.poll(&mut events, patience) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                // Nothing that can be put right from here: not even a closed connection does it.
                tracing::error!(%error, "cannot wait for events");
                std::thread::sleep(Duration::from_millis(100));
            }
            _ => {}
        }
        let mut state = loop {
            if !shared.gate.pass() {
                return;
            }
            let state = state.lock().expect("nobody panics with it");
            if shared.gate.is_open() {
                break state;
            }
        };
        patience = state.turn(&events);
    }
}

fn stay_on(processor: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor);
    Ok(sched_setaffinity(None, &only)?)
}

impl EventLoop {
    pub(crate) fn new(number: usize, shared: Arc<Shared>, pipes: usize) -> EventLoop {
        let registry = Arc::clone(&shared.loops[number].registry);
        let pipes = Pipes::new(pipes, shared.loops.len());
        EventLoop {
            number,
            shared,
            registry,
            connections: KeyMap::default(),
            doors: Vec::new(),
            pipes,
            timers: Default::default(),
            urgent: Vec::new(),
            dormant: None,
            wake_next: 0,
            lending: false,
            touched: Vec::new(),
            ended: Vec::new(),
            young: VecDeque::new(),
            due: VecDeque::new(),
            starving: VecDeque::new(),
            waiting: VecDeque::new(),
            more: false,
            again: None,
            now: clock::now(),
        }
    }

    /// Does what has become possible, and says how long there is nothing more to do; `None`: until something happens.
    fn turn(&mut self, events: &Events) -> Option<Duration> {
        self.now = clock::now();
        self.more = false;
        for key in mem::take(&mut self.urgent) {
            self.wake(key);
        }
        for event in events {
            if event.token() != WAKE {
                let told = Told {
                    readable: event.is_readable(),
                    urgent: event.is_priority(),
                    ended: event.is_read_closed(),
                    writable: event.is_writable() || event.is_write_closed(),
                    failed: event.is_error(),
                };
                self.hear(event.token(), told);
            }
        }
        self.adopt();
        if self.again.take_if(|at| *at <= self.now).is_some() {
            let starving = mem::take(&mut self.starving);
            starving.into_iter().for_each(|key| self.queue(key));
        }
        while let Some(key) = self.timers.take_due(self.now) {
            self.timer(key);
        }
        self.settle();
        self.retry_waiting();
        self.watch_doors();
        for at in 0..self.doors.len() {
            self.open_door(at);
        }
        for _ in 0..self.due.len() {
            let Some(key) = self.due.pop_front() else { break };
            self.drive(key);
        }
        if self.has_unheard() || self.dormant.is_some() && self.wake_next <= self.now {
            self.wake_some();
            self.wake_next = self.now + nanoseconds(WAKE_EVERY);
        }
        self.patience()
    }

    fn patience(&mut self) -> Option<Duration> {
        if self.more || !self.due.is_empty() || self.has_unheard() {
            return Some(Duration::ZERO);
        }
        if self.dormant.is_some() {
            return Some(WAKE_EVERY);
        }
        if !self.starving.is_empty() && self.again.is_none() {
            self.again = Some(self.now + nanoseconds(AGAIN));
        }
        let doors = self.doors.iter().filter_map(|door| door.resting).min();
        let next =
            [self.timers.next(), doors, self.again, self.settles_next()].into_iter().flatten().min()?;
        // The kernel counts in milliseconds: rather late than in vain.
        Some(Duration::from_nanos(next.saturating_sub(clock::now())) + Duration::from_millis(1))
    }

    fn hear(&mut self, from: Token, told: Told) {
        let (key, side) = Key::of_token(from);
        if self.dormant.as_ref().is_some_and(|dormant| dormant.has(key)) {
            self.wake(key);
        }
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.hear(side, told);
            self.queue(key);
        } else if let Some(door) = self.doors.iter_mut().find(|door| door.key == key) {
            door.ready = true;
        }
    }

    /// A connection is to have its turn.
    pub(crate) fn queue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !mem::replace(&mut connection.queued, true)
        {
            self.due.push_back(key);
        }
    }

    fn drive(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.queued = false;
        match connection.stage {
            Stage::Waiting if connection.failed[Side::Client] => self.end(key, How::Failed(Side::Client)),
            Stage::Waiting => {}
            Stage::Connecting => self.connecting(key),
            Stage::Relaying => self.relay(key),
        }
    }

    fn relay(&mut self, key: Key) {
        let EventLoop { connections, pipes, shared, .. } = self;
        let Some(connection) = connections.get_mut(&key) else { return };
        let mark = connection.mark();
        let next = connection.relay(self.now, pipes);
        let ((up, ..), (down, ..)) = mark;
        let (up, down) = (connection.up.moved - up, connection.down.moved - down);
        shared.table.listeners[connection.listener].traffic.add(up, down);
        if let Some(backend) = connection.backend {
            shared.table.backends[backend].traffic.add(up, down);
        }
        if self.lending && mark != connection.mark() && !mem::replace(&mut connection.touched, true) {
            self.touched.push(key);
        }
        for side in [Side::Client, Side::Backend] {
            watch(&self.registry, key, connection, side);
        }
        match next {
            Next::Wait => {}
            Next::Again => self.queue(key),
            Next::Starve => {
                if self.pipes.lent() < self.pipes.limit() {
                    // There might be more of them, if there were descriptors.
                    shared.note_shortage(&Errno::MFILE.into());
                }
                return self.starving.push_back(key);
            }
            Next::End(how) => self.end(key, how),
        }
        self.feed();
    }

    /// Gives pipes that have become free to those who wait for one.
    fn feed(&mut self) {
        if !self.starving.is_empty()
            && self.pipes.lent() < self.pipes.limit()
            && let Some(key) = self.starving.pop_front()
        {
            self.queue(key);
        }
    }

    /// A successor will have to be told of it.
    pub(super) fn touch(&mut self, key: Key) {
        if self.lending
            && let Some(connection) = self.connections.get_mut(&key)
            && !mem::replace(&mut connection.touched, true)
        {
            self.touched.push(key);
        }
    }

    /// Sets when a relayed connection is to be looked at next.
    pub(crate) fn set_timer(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let idle = self.shared.table.listeners[connection.listener].idle;
        let idle = idle.map(|idle| connection.active.saturating_add(idle));
        let at = [idle, connection.until].into_iter().flatten().min();
        self.timers.set(key, &mut connection.timer, at);
    }

    fn timer(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.timer = None;
        let is_over = connection.until.is_some_and(|until| until <= self.now);
        match connection.stage {
            Stage::Connecting if is_over => {
                self.failed_to_connect(key, &io::ErrorKind::TimedOut.into());
                self.connect(key);
            }
            Stage::Connecting => self.connect(key),
            Stage::Relaying if is_over => self.end(key, How::Drained),
            Stage::Relaying => {
                let idle = self.shared.table.listeners[connection.listener].idle;
                if idle.is_some_and(|idle| connection.active.saturating_add(idle) <= self.now) {
                    self.end(key, How::Idle);
                } else {
                    self.set_timer(key);
                }
            }
            Stage::Waiting => {}
        }
    }

    /// Ends a connection.
    pub(crate) fn end(&mut self, key: Key, how: How) {
        let Some(mut connection) = self.connections.remove(&key) else { return };
        let shared = Arc::clone(&self.shared);
        self.timers.set(key, &mut connection.timer, None);
        if self.lending {
            // Closing them does not take them from the poller: others hold duplicates.
            for side in [Side::Client, Side::Backend] {
                if connection.watched[side].is_some()
                    && let Some(socket) = connection.socket(side)
                {
                    let _ = deregister(&self.registry, socket.as_fd());
                }
            }
            if connection.offered {
                self.ended.push(key);
            }
        }
        connection.end(how, &mut self.pipes);
        shared.note_end(&connection, how, self.now);
        let table = &shared.table;
        let listener = &table.listeners[connection.listener];
        if how == How::Refused {
            listener.traffic.failed.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(backend) = connection.backend {
            table.backends[backend].open.remove();
        }
        if connection.lacks {
            shared.count_lacking(false);
        }
        if connection.stage == Stage::Waiting {
            table.count_waiting(connection.listener, false);
        }
        listener.open.remove();
        table.open.remove();
        let post = &shared.loops[self.number];
        post.load.fetch_sub(1, Ordering::Relaxed);
        if connection.settled {
            post.settled.fetch_sub(1, Ordering::Relaxed);
        }
        drop(connection);
        shared.wake_waiting();
    }
}

/// Has the poller tell of a socket what is to be known now.
fn watch(registry: &Registry, key: Key, connection: &mut Connection, side: Side) {
    let Some(wanted) = connection.change_of_interest(side) else { return };
    let Some(socket) = connection.socket(side) else { return };
    match reregister(registry, socket.as_fd(), token(key.id(side)), wanted) {
        Ok(()) => connection.watched[side] = Some(wanted),
        Err(error) => tracing::error!(%error, "cannot wait for a connection"),
    }
}

/// Whether something is used up that may be there again.
fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].contains(&errno))
}
