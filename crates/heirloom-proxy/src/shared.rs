//! What all loops of a proxy share.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fmt, io};

use mio::{Poll, Registry, Waker};

use crate::access::{AccessRecord, AccessWriter, End};
use crate::clock::{self, Time, nanoseconds, unix_ms};
use crate::connection::{Connection, How};
use crate::event_loop::WAKE;
use crate::gate::Gate;
use crate::handover::{ServiceState, TrafficState};
use crate::id::{Key, Keys, Side};
use crate::prepared::Places;
use crate::report::{BackendReport, ListenerReport, Report};
use crate::table::Table;

pub(crate) struct Shared {
    pub(crate) table: Table,
    pub(crate) keys: Keys,
    pub(crate) gate: Gate,
    pub(crate) loops: Vec<Post>,
    pub(crate) access: Option<AccessWriter>,
    /// Until then nobody is accepted: there are no descriptors.
    pub(crate) short_until: AtomicU64,
    /// How many connections there are that lack a descriptor. Nobody is accepted meanwhile, for they come first.
    pub(crate) lacking: AtomicUsize,
}

/// How a loop is reached by others.
pub(crate) struct Post {
    pub(crate) waker: Arc<Waker>,
    /// What is registered here is told to it.
    pub(crate) registry: Arc<Registry>,
    /// How many connections it has.
    pub(crate) load: AtomicUsize,
    /// How many of them were not just accepted.
    pub(crate) settled: AtomicUsize,
    /// Connections for it, which others have begun with.
    pub(crate) inbox: Mutex<Vec<(Key, Box<Connection>)>>,
}

impl Post {
    /// Of the loop that has this poller.
    pub(crate) fn new(poll: &Poll) -> io::Result<Post> {
        Ok(Post {
            waker: Arc::new(Waker::new(poll.registry(), WAKE)?),
            registry: Arc::new(poll.registry().try_clone()?),
            load: AtomicUsize::new(0),
            settled: AtomicUsize::new(0),
            inbox: Mutex::default(),
        })
    }

    pub(crate) fn take(&self) -> Vec<(Key, Box<Connection>)> {
        std::mem::take(&mut *self.inbox.lock().expect("nobody panics with it"))
    }
}

/// How long nobody is accepted when descriptors are used up.
const REST: Duration = Duration::from_millis(50);
/// When it is said again.
const SAY_AGAIN: Duration = Duration::from_secs(10);

impl Shared {
    /// Which loop is to go on with a connection that this one has begun with.
    pub(crate) fn loop_for(&self, own: usize) -> usize {
        let settled = |at: usize| self.loops[at].settled.load(Ordering::Relaxed);
        let least = (0..self.loops.len()).min_by_key(|&at| settled(at)).unwrap_or(own);
        if settled(own) <= settled(least) { own } else { least }
    }

    /// A connection that was to be accepted did not come.
    pub(crate) fn withdraw(&self, listener: usize, backend: usize) {
        self.table.dismiss(listener, backend);
        self.wake_waiting();
    }

    /// Descriptors are used up: nobody is accepted for a while.
    pub(crate) fn note_shortage(&self, error: &io::Error) {
        let now = clock::now();
        let before = self.short_until.swap(now + nanoseconds(REST), Ordering::Relaxed);
        if before.saturating_add(nanoseconds(SAY_AGAIN)) < now {
            tracing::warn!(%error, "descriptors are used up: clients wait to be accepted");
        }
    }

    /// A connection begins to lack a descriptor, or ends to.
    pub(crate) fn count_lacking(&self, lacks: bool) {
        if lacks {
            self.lacking.fetch_add(1, Ordering::SeqCst);
        } else {
            self.lacking.fetch_sub(1, Ordering::SeqCst);
            self.wake_waiting();
        }
    }

    /// Whether one may be accepted.
    pub(crate) fn has_room(&self, listener: usize) -> bool {
        self.lacking.load(Ordering::SeqCst) == 0 && self.table.has_room(listener)
    }

    /// Has all threads end, also those that wait for events.
    pub(crate) fn abandon(&self) {
        self.gate.abandon();
        self.loops.iter().for_each(|post| drop(post.waker.wake()));
    }

    /// Something has ended for which somebody may wait.
    pub(crate) fn wake_waiting(&self) {
        if self.table.take_waiting() {
            self.loops.iter().for_each(|post| drop(post.waker.wake()));
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("table", &self.table).finish_non_exhaustive()
    }
}

impl Shared {
    /// A connection has ended.
    pub(crate) fn note_end(&self, connection: &Connection, how: How, now: Time) {
        let Some(access) = &self.access else { return };
        let span = |from: Time, to: Time| Duration::from_nanos(to.saturating_sub(from));
        access.submit(AccessRecord {
            unix_ms: unix_ms(),
            client: connection.from.map_or_else(|| "-".into(), |from| from.to_string()),
            listener: Arc::clone(&self.table.listeners[connection.listener].name),
            backend: connection.backend.map(|at| Arc::clone(&self.table.backends[at].name)),
            end: match how {
                How::Closed => End::Closed,
                How::Failed(Side::Client) => End::ClientReset,
                How::Failed(Side::Backend) => End::BackendReset,
                How::Idle => End::Idle,
                How::Drained => End::Drained,
                How::Refused => End::Refused,
                How::Stopped => End::Stopped,
            },
            from_client: connection.up.moved,
            from_backend: connection.down.moved,
            connect: connection.connected.map(|at| span(connection.accepted, at)),
            duration: span(connection.accepted, now),
        });
    }

    /// Goes on counting where the incumbent has ended.
    pub(crate) fn go_on_counting(&self, places: &Places, state: &ServiceState) {
        for (known, &at) in state.listeners.iter().zip(&places.listeners) {
            known.traffic.set(&self.table.listeners[at].traffic);
        }
        for (known, &at) in state.backends.iter().zip(&places.backends) {
            known.traffic.set(&self.table.backends[at].traffic);
        }
    }

    /// What it does at the moment, but for what only the loops know.
    pub(crate) fn report(&self) -> Report {
        let table = &self.table;
        let listeners = table.listeners.iter().map(|listener| {
            let traffic = TrafficState::of(&listener.traffic);
            ListenerReport {
                name: listener.name.as_ref().into(),
                address: listener.bound(),
                pool: listener.pool.map(|pool| table.pools[pool].name.clone()),
                connections: listener.open.now(),
                max_connections: listener.open.most(),
                total_connections: traffic.connections,
                refused: traffic.failed,
                up_bytes: traffic.up,
                down_bytes: traffic.down,
            }
        });
        let backends = table.backends.iter().map(|backend| {
            let traffic = TrafficState::of(&backend.traffic);
            BackendReport {
                pool: backend.pool.clone(),
                name: backend.name.as_ref().into(),
                address: backend.address.clone(),
                configured: backend.place.is_some(),
                connections: backend.open.now(),
                max_connections: backend.open.most(),
                total_connections: traffic.connections,
                failed: traffic.failed,
                up_bytes: traffic.up,
                down_bytes: traffic.down,
            }
        });
        Report {
            threads: self.loops.len(),
            connections: table.open.now(),
            connections_of_loops: self.loops.iter().map(|post| post.load.load(Ordering::Relaxed)).collect(),
            max_connections: table.open.most().unwrap_or_default(),
            listeners: listeners.filter(|one| one.pool.is_some() || one.connections > 0).collect(),
            backends: backends.filter(|one| one.configured || one.connections > 0).collect(),
            ..Report::default()
        }
    }
}
