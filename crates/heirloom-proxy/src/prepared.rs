//! A proxy that does not serve yet: all that costs time is done here, while an incumbent still serves.
//!
//! It touches nothing of what is handed over: sockets are registered with pollers that nobody polls, addresses are bound at which
//! nobody listens, and threads wait behind a gate. (Only a listener that is in the way of an address [shares its port](crate::bound)
//! meanwhile.) Dropped, it leaves nothing behind.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::thread;
use std::{io, mem};

use heirloom::manifest::Base;
use heirloom::runtime::mio::register;
use heirloom::{Bundle, Entry, EntryRef, ItemId, courtesy};
use heirloom_sys::SignalMask;
use mio::Poll;
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::access::AccessWriter;
use crate::arriving::{Sleeper, Sleepers};
use crate::bound::{Bound, Sharing};
use crate::clock;
use crate::config::{AccessLog, Config};
use crate::error::EngineError;
use crate::event_loop::{self, EventLoop};
use crate::fair::FairMutex;
use crate::gate::Gate;
use crate::handover::{
    BACKEND, CLIENT, CONNECTING, ConnectionState, DoorState, LISTENER, Moved, RELAYING, ServiceState,
    WAITING, decode,
};
use crate::id::{Key, KeyMap, Keys, token};
use crate::inherited::Inherited;
use crate::plan::Plan;
use crate::ready::{LoopThread, Ready, Threads, is_registered};
use crate::shared::{Post, Shared};
use crate::socket::READING;
use crate::table::Table;

/// How many sockets are registered, or connections made ready, in a step.
const AT_ONCE: usize = 32;

/// A proxy that does not serve yet: all that costs time is done in it while an incumbent still serves. It changes nothing of what is
/// handed over, but that a listener in the way of an address that is to be bound has `SO_REUSEPORT` meanwhile; dropped, it leaves nothing
/// behind.
///
/// ```
/// use heirloom::Bundle;
/// use heirloom_proxy::{Config, Prepared};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = Config::parse("listener = [{ listen = '127.0.0.1:0', to = ['127.0.0.1:7'] }]", "echo.toml")?;
/// // Nobody hands anything over:
/// let ready = Prepared::new(config)?.offer(&Bundle::new())?;
/// let engine = ready.start(Bundle::new());
/// assert_eq!(engine.report().connections, 0);
/// # Ok(()) }
/// ```
pub struct Prepared {
    config: Config,
    plan: Plan,
    polls: Vec<Poll>,
    access: Option<AccessWriter>,
    registered: BTreeSet<ItemId>,
    homes: Homes,
    /// There is no way back: what cannot be had is gone without.
    no_way_back: bool,
}

/// Which loop each connection goes to: as many to each.
#[derive(Default)]
pub(crate) struct Homes(KeyMap<usize>);

impl Homes {
    pub(crate) fn of(&mut self, key: Key, loops: usize) -> usize {
        let next = self.0.len() % loops;
        *self.0.entry(key).or_insert(next)
    }

    /// Takes in how much connections have moved by now.
    pub(crate) fn update(&mut self, sleepers: &mut [Sleepers], moved: Vec<Moved>) -> Result<(), String> {
        let loops = sleepers.len();
        let unknown = moved.into_iter().find(|&one| !sleepers[self.of(one.key(), loops)].update(one));
        match unknown {
            Some(_) => Err("a connection has moved that is not there".into()),
            None => Ok(()),
        }
    }
}

/// Where the incumbent's listeners and backends are in our table.
pub(crate) struct Places {
    pub(crate) listeners: Vec<usize>,
    pub(crate) backends: Vec<usize>,
}

impl Prepared {
    /// Makes the pollers of the loops, and opens the access log.
    ///
    /// # Errors
    ///
    /// The configuration needs more descriptors than there may be, or something cannot be made or opened.
    pub fn new(config: Config) -> Result<Prepared, EngineError> {
        let access = open(config.access_log.as_ref())?;
        let plan = Plan::new(&config, limit())?;
        Prepared::with(config, plan, access, false)
    }

    /// As [`new`](Prepared::new), in a process that serves already, as it was upgraded in place: there is nobody to serve on. A
    /// listener or a log that cannot be had after all is gone without, which is logged as an error.
    ///
    /// # Errors
    ///
    /// The pollers cannot be made.
    pub fn in_place(config: Config) -> Result<Prepared, EngineError> {
        let access = open(config.access_log.as_ref()).unwrap_or_else(|error| {
            tracing::error!("goes on without an access log: {error}");
            None
        });
        let plan = Plan::new(&config, limit()).or_else(|error| {
            tracing::error!("goes on with as many connections as there can be: {error}");
            Plan::new(&Config { max_connections: None, ..config.clone() }, limit())
        })?;
        Prepared::with(config, plan, access, true)
    }

    fn with(
        config: Config,
        plan: Plan,
        access: Option<AccessWriter>,
        no_way_back: bool,
    ) -> Result<Prepared, EngineError> {
        let polls = (0..plan.threads).map(|_| Poll::new()).collect::<io::Result<_>>()?;
        let (registered, homes) = (BTreeSet::new(), Homes::default());
        Ok(Prepared { config, plan, polls, access, registered, homes, no_way_back })
    }

    /// Whether what somebody would hand over could be gone on with, and all addresses had; for a preflight.
    ///
    /// # Errors
    ///
    /// It could not.
    pub fn check(self, base: &Base) -> Result<(), EngineError> {
        self.consider(base.state.as_deref(), base.items.len(), base.items.iter(), |_| None).map(drop)
    }

    /// Registers a socket of an offer with the poller of its loop, for reading. What is none is left alone.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn register(&mut self, entry: EntryRef<'_>, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if ![CLIENT, BACKEND].contains(&entry.name) {
            return Ok(());
        }
        let poll = &self.polls[self.homes.of(Key::of(entry.id), self.polls.len())];
        register(poll.registry(), descriptor, token(entry.id), READING)?;
        self.registered.insert(entry.id);
        courtesy::step(self.registered.len(), AT_ONCE);
        Ok(())
    }

    /// Takes in what was offered, binds what is new, and starts the threads, which wait.
    ///
    /// # Errors
    ///
    /// An address cannot be had, or the state cannot be read.
    pub fn offer(self, bundle: &Bundle) -> Result<Ready, EngineError> {
        let descriptor = |id| bundle.descriptor(id);
        self.consider(bundle.encoded_state(), bundle.len(), bundle.entries(), descriptor)
    }

    fn consider<'e>(
        mut self,
        state: Option<&[u8]>,
        count: usize,
        entries: impl Iterator<Item = &'e Entry>,
        descriptor: impl Fn(ItemId) -> Option<BorrowedFd<'e>>,
    ) -> Result<Ready, EngineError> {
        let mut state: ServiceState = match state {
            Some(state) => decode(state, "the proxy").map_err(EngineError::State)?,
            None => ServiceState::default(),
        };
        let mut table = Table::new(&self.config, self.plan.connections);
        let places = Places {
            listeners: state
                .listeners
                .iter()
                .map(|known| table.listener(&known.name, &known.address))
                .collect(),
            backends: state
                .backends
                .iter()
                .map(|known| table.backend(&known.pool, &known.name, &known.address))
                .collect(),
        };
        let mut theirs = Vec::new();
        // A connection has two items, mostly.
        let each = count / 2 / self.polls.len() + 1;
        let mut sleepers: Vec<Sleepers> = self.polls.iter().map(|_| Sleepers::with_capacity(each)).collect();
        for (done, entry) in entries.enumerate() {
            courtesy::step(done, AT_ONCE);
            if entry.name == LISTENER {
                let door: DoorState = decode(&entry.state, "a listener").map_err(EngineError::State)?;
                let address = state.listeners.get(door.listener).map(|known| known.address.as_str());
                theirs.push((entry.id, address));
            } else if entry.name == CLIENT {
                let key = Key::of(entry.id);
                let state = places.read(&table, &entry.state).map_err(EngineError::State)?;
                let registered = is_registered(&self.registered, key, &state);
                table.count(&state);
                let sleeper = Sleeper { state, registered, urgent: false };
                sleepers[self.homes.of(key, self.polls.len())].insert(key, sleeper);
            }
        }
        let inherited = Inherited::find(&self.config.listeners, theirs);
        let moved = mem::take(&mut state.moved);
        self.homes.update(&mut sleepers, moved).map_err(EngineError::State)?;
        let (mut bound, mut sharing) = (Vec::new(), Sharing::default());
        for &at in &inherited.free {
            let listener = &self.config.listeners[at];
            let in_the_way = inherited.in_the_way_of(listener.address.place());
            // In a preflight, which has none of them, the address is not asked for: it can be had when they are there.
            let beside: Vec<_> = in_the_way.iter().filter_map(|id| descriptor(*id)).collect();
            if beside.len() < in_the_way.len() {
                continue;
            }
            let one = sharing
                .add(&beside)
                .and_then(|()| Bound::new(at, &listener.address, listener.mode, !beside.is_empty()))
                .map_err(|source| EngineError::Bind {
                    name: listener.name.clone(),
                    address: listener.address.text().into(),
                    source,
                });
            match one {
                Ok(one) => bound.push(one),
                Err(error) if self.no_way_back => tracing::error!("goes on without it: {error}"),
                Err(error) => return Err(error),
            }
        }
        let doors = inherited.doors;
        let posts = self.polls.iter().map(Post::new);
        let shared = Arc::new(Shared {
            table,
            keys: Keys::from(ItemId::FIRST),
            gate: Gate::closed(),
            loops: posts.collect::<io::Result<_>>()?,
            access: self.access.take(),
            short_until: AtomicU64::new(0),
            lacking: AtomicUsize::new(0),
        });
        let threads = self.spawn(shared)?;
        let Prepared { config, registered, homes, .. } = self;
        Ok(Ready { config, registered, homes, threads, bound, sharing, doors, sleepers, places, state })
    }

    /// Starts the threads, which wait behind the gate.
    fn spawn(&mut self, shared: Arc<Shared>) -> io::Result<Threads> {
        let mut threads = Threads { shared, loops: Vec::new(), begun: false };
        let mut processors =
            self.config.pin_threads.then(own_processors).transpose()?.into_iter().flatten().cycle();
        without_signals(|| {
            for (number, poll) in mem::take(&mut self.polls).into_iter().enumerate() {
                let shared = Arc::clone(&threads.shared);
                let state = EventLoop::new(number, Arc::clone(&shared), self.plan.pipes);
                let state = Arc::new(FairMutex::new(state));
                let run = {
                    let state = Arc::clone(&state);
                    let processor = processors.next();
                    move || event_loop::run(poll, &state, &shared, processor)
                };
                let thread = thread::Builder::new().name(format!("loop {number}")).spawn(run)?;
                threads.loops.push(LoopThread { state, thread: Some(thread) });
            }
            Ok(())
        })?;
        Ok(threads)
    }
}

/// The processors that this process may use.
fn own_processors() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect())
}

impl Places {
    /// The state of a connection, with our own places in it.
    pub(crate) fn read(&self, table: &Table, state: &[u8]) -> Result<ConnectionState, String> {
        let mut state: ConnectionState = decode(state, "a connection")?;
        let listener = self.listeners.get(state.listener);
        state.listener = *listener.ok_or("a connection is of a listener that is not there")?;
        if let Some(backend) = &mut state.backend {
            *backend =
                *self.backends.get(*backend).ok_or("a connection is of a backend that is not there")?;
        }
        if state.stage == RELAYING && !(state.has_server && state.backend.is_some()) {
            return Err("a connection that is relayed has no backend".into());
        }
        let is_gone = |backend: usize| table.backends[backend].place.is_none();
        if state.stage == CONNECTING && !state.has_server && state.backend.is_some_and(is_gone) {
            // What has begun is kept with such a backend, but nothing begins.
            (state.stage, state.backend) = (WAITING, None);
        }
        if state.stage == RELAYING {
            state.until = drain_until(table, &state);
        }
        Ok(state)
    }
}

impl Table {
    /// A connection is there already.
    pub(crate) fn count(&self, state: &ConnectionState) {
        self.open.add();
        self.listeners[state.listener].open.add();
        state.backend.iter().for_each(|&backend| self.backends[backend].open.add());
        if state.waits() {
            self.count_waiting(state.listener, true);
        }
    }

    pub(crate) fn discount(&self, state: &ConnectionState) {
        self.open.remove();
        self.listeners[state.listener].open.remove();
        state.backend.iter().for_each(|&backend| self.backends[backend].open.remove());
        if state.waits() {
            self.count_waiting(state.listener, false);
        }
    }
}

fn limit() -> usize {
    heirloom::descriptors::limit().try_into().unwrap_or(usize::MAX)
}

fn open(log: Option<&AccessLog>) -> Result<Option<AccessWriter>, EngineError> {
    let opened = without_signals(|| Ok(log.map(AccessWriter::open).transpose()))?;
    Ok(opened?)
}

/// Starts threads that get no signals: these are for the thread that serves the control socket, and wait there while the program
/// becomes another in its place.
fn without_signals<T>(start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mask = SignalMask::block_all()?;
    let started = start();
    mask.set()?;
    started
}

/// The time at which a connection has to end whose backend is no longer configured, if it has to.
pub(crate) fn drain_until(table: &Table, state: &ConnectionState) -> Option<clock::Time> {
    let backend = state.backend?;
    match (&table.backends[backend].place, table.drain) {
        (None, Some(drain)) => Some(state.until.unwrap_or(clock::now().saturating_add(drain))),
        _ => None,
    }
}
