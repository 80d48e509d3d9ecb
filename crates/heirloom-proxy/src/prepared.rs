//! A proxy that does not serve yet: all that costs time is done here, while an incumbent still serves.
//!
//! It touches nothing of what is handed over: sockets are registered with pollers that nobody polls, addresses are bound at which
//! nobody listens, and threads wait behind a gate. Dropped, it leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::{io, mem};

use heirloom::manifest::Base;
use heirloom::manifest::Changes;
use heirloom::runtime::mio::register;
use heirloom::{Bundle, Entry, ItemId, Kind};
use heirloom_sys::SignalMask;
use mio::{Interest, Poll, Waker};

use crate::access::AccessWriter;
use crate::address::Address;
use crate::arriving::{Dormant, Sleeper, Sleepers};
use crate::bound::Bound;
use crate::clock;
use crate::config::{AccessLog, Config};
use crate::door::Door;
use crate::engine::Engine;
use crate::error::EngineError;
use crate::event_loop::{self, EventLoop, WAKE};
use crate::gate::Gate;
use crate::handover::{
    BACKEND, CLIENT, ConnectionState, DoorState, LISTENER, RELAYING, ServiceState, decode,
};
use crate::id::{Key, KeyMap, Keys, token};
use crate::plan::Plan;
use crate::rates::Rates;
use crate::shared::{Post, Shared};
use crate::socket::{self, TcpOptions, set_inherited};
use crate::table::Table;

/// A proxy that does not serve yet: all that costs time is done in it while an incumbent still serves. It touches nothing of what is
/// handed over; dropped, it leaves nothing behind.
///
/// ```
/// use heirloom::Bundle;
/// use heirloom_proxy::{Config, Prepared};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = Config::parse("listener = [{ listen = '127.0.0.1:0', to = ['127.0.0.1:7'] }]", "echo.toml")?;
/// // Nobody hands anything over:
/// let mut prepared = Prepared::new(config)?;
/// prepared.offer(&Bundle::new())?;
/// let engine = prepared.start(Bundle::new());
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
    offered: Option<Offered>,
}

/// What is known once everything was offered.
struct Offered {
    shared: Arc<Shared>,
    loops: Vec<Arc<Mutex<EventLoop>>>,
    bound: Vec<Bound>,
    /// The incumbent's listeners, and which of ours they are.
    doors: BTreeMap<ItemId, Option<usize>>,
    sleepers: Vec<Sleepers>,
    places: Places,
    state: ServiceState,
}

/// Which loop each connection goes to: as many to each.
#[derive(Default)]
struct Homes(KeyMap<usize>);

impl Homes {
    fn of(&mut self, key: Key, loops: usize) -> usize {
        let next = self.0.len() % loops;
        *self.0.entry(key).or_insert(next)
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
        Ok(Prepared { config, plan, polls, access, registered, homes, no_way_back, offered: None })
    }

    /// Whether what somebody would hand over could be gone on with, and all addresses had; for a preflight.
    ///
    /// # Errors
    ///
    /// It could not.
    pub fn check(mut self, base: &Base) -> Result<(), EngineError> {
        self.consider(base.state.as_deref(), base.items.iter())
    }

    /// Registers a socket of an offer with the poller of its loop, for reading. What is none is left alone.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn register(&mut self, entry: &Entry, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if ![CLIENT, BACKEND].contains(&entry.name.as_str()) {
            return Ok(());
        }
        let poll = &self.polls[self.homes.of(Key::of(entry.id), self.polls.len())];
        register(poll.registry(), descriptor, token(entry.id), Interest::READABLE)?;
        self.registered.insert(entry.id);
        Ok(())
    }

    /// Takes in what was offered, binds what is new, and starts the threads, which wait.
    ///
    /// # Errors
    ///
    /// An address cannot be had, or the state cannot be read.
    pub fn offer(&mut self, bundle: &Bundle) -> Result<(), EngineError> {
        self.consider(bundle.encoded_state(), bundle.entries())
    }

    fn consider<'e>(
        &mut self,
        state: Option<&[u8]>,
        entries: impl Iterator<Item = &'e Entry>,
    ) -> Result<(), EngineError> {
        let state: ServiceState = match state {
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
        let mut doors = BTreeMap::new();
        let mut otherwise_written = Vec::new();
        let mut free: BTreeSet<usize> = (0..self.config.listeners.len()).collect();
        let mut sleepers: Vec<Sleepers> = self.polls.iter().map(|_| Sleepers::default()).collect();
        for entry in entries {
            if entry.name == LISTENER {
                let door: DoorState = decode(&entry.state, "a listener").map_err(EngineError::State)?;
                let address = state.listeners.get(door.listener).map(|known| known.address.as_str());
                let same = |at: &usize| Some(self.config.listeners[*at].address.text()) == address;
                let ours = free.iter().copied().find(same);
                if let Some(at) = ours {
                    free.remove(&at);
                } else if let Some(address) = address {
                    otherwise_written.push((entry.id, address));
                }
                doors.insert(entry.id, ours);
            } else if entry.name == CLIENT {
                let key = Key::of(entry.id);
                let state = places.read(&table, &entry.state).map_err(EngineError::State)?;
                let sockets = [Some(key.first()), state.has_server.then(|| key.second())];
                let registered = sockets.into_iter().flatten().all(|id| self.registered.contains(&id));
                table.count(&state);
                let sleeper = Sleeper { state, registered, urgent: false };
                sleepers[self.homes.of(key, self.polls.len())].insert(key, sleeper);
            }
        }
        for (id, address) in otherwise_written {
            // `localhost:80` is where `127.0.0.1:80` was: it could not be bound.
            let Ok(address) = Address::to_listen(address) else { continue };
            let same = |at: &usize| self.config.listeners[*at].address.place() == address.place();
            if let Some(at) = free.iter().copied().find(same) {
                free.remove(&at);
                doors.insert(id, Some(at));
            }
        }
        let bind = |at: usize| {
            let listener = &self.config.listeners[at];
            Bound::new(at, &listener.address, listener.mode).map_err(|source| EngineError::Bind {
                name: listener.name.clone(),
                address: listener.address.text().into(),
                source,
            })
        };
        let mut bound = Vec::new();
        for at in free {
            match bind(at) {
                Ok(one) => bound.push(one),
                Err(error) if self.no_way_back => tracing::error!("goes on without it: {error}"),
                Err(error) => return Err(error),
            }
        }
        let posts = self.polls.iter().map(|poll| Waker::new(poll.registry(), WAKE).map(Post::new));
        let shared = Arc::new(Shared {
            table,
            keys: Keys::from(ItemId::FIRST),
            gate: Gate::closed(),
            loops: posts.collect::<io::Result<_>>()?,
            access: self.access.take(),
            short_until: AtomicU64::new(0),
        });
        let loops = self.spawn(&shared)?;
        self.offered = Some(Offered { shared, loops, bound, doors, sleepers, places, state });
        Ok(())
    }

    /// Starts the threads, which wait behind the gate.
    fn spawn(&mut self, shared: &Arc<Shared>) -> io::Result<Vec<Arc<Mutex<EventLoop>>>> {
        let spawned = mem::take(&mut self.polls).into_iter().enumerate().map(|(number, poll)| {
            let registry = poll.registry().try_clone()?;
            let state = EventLoop::new(number, Arc::clone(shared), registry, self.plan.pipes);
            let state = Arc::new(Mutex::new(state));
            let (of_thread, shared) = (Arc::clone(&state), Arc::clone(shared));
            let run = move || event_loop::run(poll, &of_thread, &shared);
            thread::Builder::new().name(format!("loop {number}")).spawn(run)?;
            Ok(state)
        });
        let loops = without_signals(|| spawned.collect());
        if loops.is_err() {
            shared.gate.abandon();
        }
        loops
    }

    /// Takes in what has changed since the offer.
    ///
    /// # Errors
    ///
    /// The state cannot be read.
    pub fn complete(&mut self, bundle: &Bundle, changes: &Changes) -> Result<(), EngineError> {
        let Some(offered) = &mut self.offered else { return Ok(()) };
        let table = &offered.shared.table;
        let count = offered.sleepers.len();
        if let Some(state) = bundle.encoded_state() {
            offered.state = decode(state, "the proxy").map_err(EngineError::State)?;
        }
        for id in changes.ended.iter().chain(&changes.changed) {
            let key = Key::of(*id);
            if let Some(sleeper) = offered.sleepers[self.homes.of(key, count)].remove(key) {
                table.discount(&sleeper.state);
            }
        }
        for id in changes.changed.iter().chain(&changes.added) {
            let Some(entry) = bundle.entry(*id).filter(|entry| entry.name == CLIENT) else { continue };
            let state = offered.places.read(table, &entry.state).map_err(EngineError::State)?;
            table.count(&state);
            let (key, registered) = (Key::of(*id), self.registered.contains(id));
            let sleeper = Sleeper { state, registered, urgent: true };
            offered.sleepers[self.homes.of(key, count)].insert(key, sleeper);
        }
        Ok(())
    }

    /// Serves. The bundle is this process's own by now.
    ///
    pub fn start(mut self, mut bundle: Bundle) -> Engine {
        let offered = self.offered.take().expect("what is handed over was looked at");
        let Offered { shared, loops, bound, doors, sleepers, places, state } = offered;
        shared.keys.at_least(bundle.next_id());
        shared.go_on_counting(&places, &state);
        let mut listening = Vec::new();
        for (id, ours) in doors {
            let kind = bundle.entry(id).map_or(Kind::Other, |entry| entry.kind);
            let Some(socket) = bundle.remove(id) else { continue };
            match ours {
                Some(at) => listening.push((Key::of(id), at, socket, kind)),
                None => retire(socket, kind),
            }
        }
        for bound in bound {
            let at = bound.listener;
            let listener = &self.config.listeners[at];
            match bound.listen(listener.backlog) {
                Ok((socket, kind)) => listening.push((shared.keys.take(), at, socket, kind)),
                // The address was there when it was bound.
                Err(error) => {
                    tracing::error!(listener = %listener.name, address = %listener.address, %error, "cannot listen");
                }
            }
        }
        let bundle = Arc::new(Mutex::new(bundle));
        let dormant = sleepers.into_iter().map(|sleepers| Dormant::new(Arc::clone(&bundle), sleepers));
        let mut states: Vec<_> = loops.iter().map(|state| state.lock().expect("it has not begun")).collect();
        for (state, dormant) in states.iter_mut().zip(dormant) {
            state.go_on_with(dormant);
        }
        for (key, at, socket, kind) in listening {
            self.open(&mut states, Door::new(key, at, socket, kind), &shared);
        }
        drop(states);
        shared.gate.open();
        Engine::new(shared, loops, Rates::from(state.samples), self.config.clone())
    }

    /// Lets a loop accept at a listener.
    fn open(&self, states: &mut [MutexGuard<'_, EventLoop>], door: Door, shared: &Shared) {
        let listener = &self.config.listeners[door.listener];
        let options = TcpOptions { nodelay: listener.nodelay, keepalive: listener.keepalive };
        let set = match door.kind {
            Kind::TcpListener => set_inherited(&door.socket, options),
            _ => socket::set_mode(listener.address.place(), listener.mode),
        };
        let at = door.listener % states.len();
        let state = &mut states[at];
        let (descriptor, token) = (Arc::clone(&door.socket), token(door.key.first()));
        let watched = register(&state.registry, descriptor.as_fd(), token, Interest::READABLE);
        // A new owner, and perhaps a new length of the queue.
        let again = rustix::net::listen(&descriptor, listener.backlog.try_into().unwrap_or(i32::MAX));
        for error in [set, watched, again.map_err(Into::into)].into_iter().filter_map(Result::err) {
            tracing::error!(listener = %listener.name, %error, "cannot set up a listener");
        }
        shared.table.listeners[door.listener].set_bound(socket::name(&descriptor, &listener.address));
        state.doors.push(door);
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(offered) = &self.offered {
            offered.shared.gate.abandon();
        }
    }
}

impl Places {
    /// The state of a connection, with our own places in it.
    fn read(&self, table: &Table, state: &[u8]) -> Result<ConnectionState, String> {
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
        if state.stage == RELAYING {
            state.until = drain_until(table, &state);
        }
        Ok(state)
    }
}

impl Table {
    /// A connection is there already.
    fn count(&self, state: &ConnectionState) {
        self.open.add();
        self.listeners[state.listener].open.add();
        state.backend.iter().for_each(|&backend| self.backends[backend].open.add());
    }

    fn discount(&self, state: &ConnectionState) {
        self.open.remove();
        self.listeners[state.listener].open.remove();
        state.backend.iter().for_each(|&backend| self.backends[backend].open.remove());
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

/// Ends a listener that is no longer configured: those who wait in its queue are reset, as they would be if it had ended before.
fn retire(socket: OwnedFd, kind: Kind) {
    if kind == Kind::UnixListener {
        socket::remove_path(&socket);
    }
    drop(socket);
}

/// The time at which a connection has to end whose backend is no longer configured, if it has to.
pub(crate) fn drain_until(table: &Table, state: &ConnectionState) -> Option<clock::Time> {
    let backend = state.backend?;
    match (&table.backends[backend].place, table.drain) {
        (None, Some(drain)) => Some(state.until.unwrap_or(clock::now().saturating_add(drain))),
        _ => None,
    }
}
