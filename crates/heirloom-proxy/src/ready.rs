//! A proxy that has everything it could have while an incumbent still serves: it could serve at once.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use heirloom::manifest::Changes;
use heirloom::{Bundle, ItemId, Kind};

use crate::arriving::{Dormant, Sleeper, Sleepers};
use crate::bound::{Bound, Sharing};
use crate::config::Config;
use crate::door::{Door, Watch};
use crate::engine::Engine;
use crate::error::EngineError;
use crate::event_loop::EventLoop;
use crate::fair::FairMutex;
use crate::handover::{CLIENT, ConnectionState, ServiceState, decode};
use crate::id::Key;
use crate::prepared::{Homes, Places};
use crate::rates::Rates;
use crate::shared::Shared;
use crate::socket::{self, TcpOptions, set_inherited};

/// A [`Prepared`](crate::Prepared) that has taken in what was offered. It can only [start](Ready::start), once everything is this process's own, or
/// be dropped, which leaves nothing behind.
///
/// ```
/// use heirloom::Bundle;
/// use heirloom_proxy::{Config, Prepared, Ready};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = Config::parse("listener = [{ listen = '127.0.0.1:0', to = ['127.0.0.1:7'] }]", "echo.toml")?;
/// let ready: Ready = Prepared::new(config)?.offer(&Bundle::new())?;
/// drop(ready);
/// # Ok(()) }
/// ```
pub struct Ready {
    pub(crate) config: Config,
    pub(crate) registered: BTreeSet<ItemId>,
    pub(crate) homes: Homes,
    pub(crate) threads: Threads,
    pub(crate) bound: Vec<Bound>,
    pub(crate) sharing: Sharing,
    /// The incumbent's listeners, and which of ours they are.
    pub(crate) doors: BTreeMap<ItemId, Option<usize>>,
    pub(crate) sleepers: Vec<Sleepers>,
    pub(crate) places: Places,
    pub(crate) state: ServiceState,
}

/// The threads, which wait behind their gate. Dropped before they have begun, they end.
pub(crate) struct Threads {
    pub(crate) shared: Arc<Shared>,
    pub(crate) loops: Vec<LoopThread>,
    pub(crate) begun: bool,
}

/// A thread, and the state of its loop.
pub(crate) struct LoopThread {
    pub(crate) state: Arc<FairMutex<EventLoop>>,
    /// Until it was waited for.
    pub(crate) thread: Option<JoinHandle<()>>,
}

impl Threads {
    /// They are the engine's from now on, which opens the gate.
    fn begin(&mut self) -> (Arc<Shared>, Vec<LoopThread>) {
        self.begun = true;
        (Arc::clone(&self.shared), mem::take(&mut self.loops))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if !self.begun {
            self.shared.gate.abandon();
        }
    }
}

impl Ready {
    /// Takes in what has changed since the offer.
    ///
    /// # Errors
    ///
    /// The state cannot be read.
    pub fn complete(&mut self, bundle: &Bundle, changes: &Changes) -> Result<(), EngineError> {
        let table = &self.threads.shared.table;
        let count = self.sleepers.len();
        if let Some(state) = bundle.encoded_state() {
            self.state = decode(state, "the proxy").map_err(EngineError::State)?;
        }
        for id in changes.ended.iter().chain(&changes.changed) {
            let key = Key::of(*id);
            if let Some(sleeper) = self.sleepers[self.homes.of(key, count)].remove(key) {
                table.discount(&sleeper.state);
            }
        }
        for id in changes.changed.iter().chain(&changes.added) {
            let Some(entry) = bundle.entry(*id).filter(|entry| entry.name == CLIENT) else { continue };
            let state = self.places.read(table, &entry.state).map_err(EngineError::State)?;
            table.count(&state);
            let key = Key::of(*id);
            let registered = is_registered(&self.registered, key, &state);
            // What came since it was registered is told, be it bytes or an end.
            let urgent = !(registered && state.is_calm());
            let sleeper = Sleeper { state, registered, urgent };
            self.sleepers[self.homes.of(key, count)].insert(key, sleeper);
        }
        self.homes.update(&mut self.sleepers, mem::take(&mut self.state.moved)).map_err(EngineError::State)
    }

    /// Serves. The bundle is this process's own by now.
    pub fn start(mut self, mut bundle: Bundle) -> Engine {
        let (shared, loops) = self.threads.begin();
        shared.keys.at_least(bundle.next_id());
        shared.go_on_counting(&self.places, &self.state);
        let (mut listening, mut retired) = (Vec::new(), Vec::new());
        for (id, ours) in mem::take(&mut self.doors) {
            let kind = bundle.entry(id).map_or(Kind::Other, |entry| entry.kind);
            let Some(socket) = bundle.remove(id) else { continue };
            match ours {
                Some(at) => listening.push((Key::of(id), at, socket, kind)),
                None => retired.push((socket, kind)),
            }
        }
        for bound in mem::take(&mut self.bound) {
            let at = bound.listener;
            let listener = &self.config.listeners[at];
            match bound.listen(listener.backlog, &mut self.sharing) {
                Ok((socket, kind)) => listening.push((shared.keys.take(), at, socket, kind)),
                // The address was there when it was bound.
                Err(error) => {
                    tracing::error!(listener = %listener.name, address = %listener.address, %error, "cannot listen");
                }
            }
        }
        drop(mem::take(&mut self.sharing));
        // Where one of ours has the port as well, nobody is refused.
        retired.into_iter().for_each(|(socket, kind)| retire(socket, kind));
        let bundle = Arc::new(Mutex::new(bundle));
        let sleepers = mem::take(&mut self.sleepers).into_iter();
        let dormant = sleepers.map(|sleepers| Dormant::new(Arc::clone(&bundle), sleepers));
        let mut states: Vec<_> =
            loops.iter().map(|one| one.state.lock().expect("it has not begun")).collect();
        for (state, dormant) in states.iter_mut().zip(dormant) {
            state.go_on_with(dormant);
        }
        for (key, at, socket, kind) in listening {
            self.open(&mut states, Door::new(key, at, socket, kind), &shared);
        }
        drop(states);
        shared.gate.open();
        Engine::new(shared, loops, Rates::from(self.state.samples), self.config)
    }

    /// Lets the loops accept at a listener.
    fn open(&self, states: &mut [MutexGuard<'_, EventLoop>], mut door: Door, shared: &Shared) {
        let listener = &self.config.listeners[door.listener];
        let options = TcpOptions { nodelay: listener.nodelay, keepalive: listener.keepalive };
        let set = match door.kind {
            Kind::TcpListener => set_inherited(&door.socket, options),
            _ => socket::set_mode(listener.address.place(), listener.mode),
        };
        // The other loops begin to watch it in their first turn.
        let at = door.listener % states.len();
        for (_, state) in states.iter_mut().enumerate().filter(|(number, _)| *number != at) {
            state.doors.push(door.for_another());
        }
        let watched = door.watch(&states[at].registry, Watch::Shared);
        let descriptor = Arc::clone(&door.socket);
        // A new owner, and perhaps a new length of the queue.
        let again = rustix::net::listen(&descriptor, listener.backlog.try_into().unwrap_or(i32::MAX));
        for error in [set, watched, again.map_err(Into::into)].into_iter().filter_map(Result::err) {
            tracing::error!(listener = %listener.name, %error, "cannot set up a listener");
        }
        shared.table.listeners[door.listener].set_bound(socket::name(&descriptor, &listener.address));
        states[at].doors.push(door);
    }
}

/// Whether all sockets of a connection were registered with the poller of its loop.
pub(crate) fn is_registered(registered: &BTreeSet<ItemId>, key: Key, state: &ConnectionState) -> bool {
    let sockets = [Some(key.first()), state.has_server.then(|| key.second())];
    sockets.into_iter().flatten().all(|id| registered.contains(&id))
}

/// Ends a listener that is no longer configured.
fn retire(socket: OwnedFd, kind: Kind) {
    if kind == Kind::UnixListener {
        socket::remove_path(&socket);
    }
    socket::end_listening(socket);
}
