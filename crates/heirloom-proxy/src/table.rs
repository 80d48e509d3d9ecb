//! All listeners, pools and backends of a proxy with what is counted of them: shared by its loops, and handed over.
//!
//! What is configured does not change in the life of a process: a reload is another process. What is no longer configured has its
//! place here as well, as long as connections belong to it.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::address::Place;
use crate::clock::{Time, nanoseconds};
use crate::config::{Balance, Config};
use crate::socket::TcpOptions;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) pools: Vec<Pool>,
    pub(crate) backends: Vec<Backend>,
    pub(crate) drain: Option<Time>,
    pub(crate) open: Gauge,
    /// Whether somebody waits until something has ended.
    waiting: AtomicBool,
}

/// How many there are, of at most so many.
#[derive(Debug)]
pub(crate) struct Gauge {
    now: AtomicUsize,
    most: usize,
}

impl Gauge {
    fn new(most: Option<usize>) -> Gauge {
        Gauge { now: AtomicUsize::new(0), most: most.unwrap_or(usize::MAX) }
    }

    pub(crate) fn now(&self) -> usize {
        self.now.load(Ordering::SeqCst)
    }

    pub(crate) fn most(&self) -> Option<usize> {
        (self.most != usize::MAX).then_some(self.most)
    }

    pub(crate) fn has_room(&self) -> bool {
        self.now() < self.most
    }

    /// One more, whatever the limit: it is there already.
    pub(crate) fn add(&self) {
        self.now.fetch_add(1, Ordering::SeqCst);
    }

    /// One more, unless there are too many.
    pub(crate) fn try_add(&self) -> bool {
        let more = |now| (now < self.most).then_some(now + 1);
        self.now.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    pub(crate) fn remove(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What has been passed on, since the service began.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Connections accepted of a listener, made to a backend.
    pub(crate) connections: AtomicU64,
    /// Connections that came to nothing: for a listener, since no backend could be had; for a backend, tries to connect.
    pub(crate) failed: AtomicU64,
    /// From clients to backends, in bytes.
    pub(crate) up: AtomicU64,
    /// From backends to clients.
    pub(crate) down: AtomicU64,
}

impl Traffic {
    pub(crate) fn add(&self, up: u64, down: u64) {
        if up > 0 {
            self.up.fetch_add(up, Ordering::Relaxed);
        }
        if down > 0 {
            self.down.fetch_add(down, Ordering::Relaxed);
        }
    }
}

/// A listener, configured or not.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) name: Arc<str>,
    /// As it was written.
    pub(crate) address: String,
    /// Where it goes to. `None`: it is no longer configured.
    pub(crate) pool: Option<usize>,
    pub(crate) idle: Option<Time>,
    pub(crate) open: Gauge,
    pub(crate) traffic: Traffic,
    /// Where it really listens.
    pub(crate) bound: Mutex<String>,
}

/// Backends among which is chosen.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) name: String,
    pub(crate) balance: Balance,
    pub(crate) connect_within: Time,
    pub(crate) tries: usize,
    pub(crate) tcp: TcpOptions,
    /// Its places in [`Table::backends`].
    pub(crate) backends: Vec<usize>,
    next: AtomicUsize,
    /// How many connections there are for which it has no backend.
    waiting: AtomicUsize,
}

/// A backend, configured or not.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) pool: String,
    pub(crate) name: Arc<str>,
    pub(crate) address: String,
    /// `None`: it is no longer configured.
    pub(crate) place: Option<Place>,
    pub(crate) open: Gauge,
    pub(crate) traffic: Traffic,
}

impl Table {
    pub(crate) fn new(config: &Config, most: usize) -> Table {
        let mut backends = Vec::new();
        let pools = config
            .pools
            .iter()
            .map(|pool| {
                let first = backends.len();
                backends.extend(pool.backends.iter().map(|backend| Backend {
                    pool: pool.name.clone(),
                    name: backend.name.as_str().into(),
                    address: backend.address.text().into(),
                    place: Some(backend.address.place().clone()),
                    open: Gauge::new(backend.max_connections),
                    traffic: Traffic::default(),
                }));
                Pool {
                    name: pool.name.clone(),
                    balance: pool.balance,
                    connect_within: nanoseconds(pool.connect_timeout),
                    tries: 1 + (pool.retries as usize).min(pool.backends.len() - 1),
                    tcp: TcpOptions { nodelay: pool.nodelay, keepalive: pool.keepalive },
                    backends: (first..backends.len()).collect(),
                    next: AtomicUsize::new(0),
                    waiting: AtomicUsize::new(0),
                }
            })
            .collect();
        let listeners = config
            .listeners
            .iter()
            .map(|listener| Listener {
                name: listener.name.as_str().into(),
                address: listener.address.text().into(),
                pool: Some(listener.pool),
                idle: listener.idle_timeout.map(nanoseconds),
                open: Gauge::new(listener.max_connections),
                traffic: Traffic::default(),
                bound: Mutex::default(),
            })
            .collect();
        Table {
            listeners,
            pools,
            backends,
            drain: config.drain.map(nanoseconds),
            open: Gauge::new(Some(most)),
            waiting: AtomicBool::new(false),
        }
    }

    /// The place of a listener that a predecessor had; a new one if it is not configured.
    pub(crate) fn listener(&mut self, name: &str, address: &str) -> usize {
        let known = self.listeners.iter().position(|listener| &*listener.name == name);
        known.unwrap_or_else(|| {
            self.listeners.push(Listener {
                name: name.into(),
                address: address.into(),
                pool: None,
                idle: None,
                open: Gauge::new(None),
                traffic: Traffic::default(),
                bound: Mutex::default(),
            });
            self.listeners.len() - 1
        })
    }

    /// The place of a backend that a predecessor had; a new one if it is not configured.
    pub(crate) fn backend(&mut self, pool: &str, name: &str, address: &str) -> usize {
        let known = self
            .backends
            .iter()
            .position(|backend| backend.pool == pool && &*backend.name == name && backend.address == address);
        known.unwrap_or_else(|| {
            self.backends.push(Backend {
                pool: pool.into(),
                name: name.into(),
                address: address.into(),
                place: None,
                open: Gauge::new(None),
                traffic: Traffic::default(),
            });
            self.backends.len() - 1
        })
    }

    /// Somebody will wait until something has ended, unless it is there now: to be called before that is looked at once more.
    pub(crate) fn announce_waiting(&self) {
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// Something has ended. Whether somebody waits for that.
    pub(crate) fn take_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) && self.waiting.swap(false, Ordering::SeqCst)
    }

    /// Whether a listener may have one more connection. Nobody new overtakes those who wait for the same backends.
    pub(crate) fn has_room(&self, listener: usize) -> bool {
        let is_for_new = |pool: &Pool| pool.waiting.load(Ordering::SeqCst) == 0;
        self.open.has_room()
            && self.listeners[listener].open.has_room()
            && self.pool(listener).is_some_and(is_for_new)
            && self.has_backend(listener, &[])
    }

    /// Whether a backend may have one more connection of this listener, and is not among these.
    pub(crate) fn has_backend(&self, listener: usize, not: &[usize]) -> bool {
        let would_do = |backend: &usize| !not.contains(backend) && self.backends[*backend].open.has_room();
        self.pool(listener).is_some_and(|pool| pool.backends.iter().any(would_do))
    }

    /// Counts one more connection of a listener, and chooses the backend that it will have, unless there are too many. So whoever is
    /// accepted has a place: those for whom there is none wait in the kernel, in the order in which they came.
    pub(crate) fn admit(&self, listener: usize) -> Option<usize> {
        if !self.open.try_add() {
            return None;
        }
        if self.listeners[listener].open.try_add() {
            if let Some(backend) = self.choose(listener, &[]) {
                return Some(backend);
            }
            self.listeners[listener].open.remove();
        }
        self.open.remove();
        None
    }

    /// Nobody came for whom this backend was chosen: one less, and it is the next one's turn.
    pub(crate) fn dismiss(&self, listener: usize, backend: usize) {
        if let Some(pool) = self.pool(listener) {
            pool.next.fetch_sub(1, Ordering::Relaxed);
        }
        self.backends[backend].open.remove();
        self.listeners[listener].open.remove();
        self.open.remove();
    }

    /// A connection of this listener begins to wait for a backend, or ends to.
    pub(crate) fn count_waiting(&self, listener: usize, waits: bool) {
        let Some(pool) = self.pool(listener) else { return };
        if waits {
            pool.waiting.fetch_add(1, Ordering::SeqCst);
        } else {
            pool.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Chooses a backend for a connection of this listener, and counts the connection to it. Those in `not` have failed. `None`:
    /// all others are full.
    pub(crate) fn choose(&self, listener: usize, not: &[usize]) -> Option<usize> {
        let pool = &self.pools[self.listeners[listener].pool?];
        let count = pool.backends.len();
        let first = pool.next.fetch_add(1, Ordering::Relaxed);
        let backends = &self.backends;
        let in_turn = || {
            let all = (0..count).map(|n| pool.backends[first.wrapping_add(n) % count]);
            all.filter(|backend| !not.contains(backend))
        };
        match pool.balance {
            Balance::RoundRobin => in_turn().find(|&backend| backends[backend].open.try_add()),
            Balance::LeastConnections => loop {
                let with_room = in_turn().filter(|&backend| backends[backend].open.has_room());
                let least = with_room.min_by_key(|&backend| backends[backend].open.now())?;
                // If not, another loop was faster, and it is full now.
                if backends[least].open.try_add() {
                    return Some(least);
                }
            },
        }
    }

    pub(crate) fn pool(&self, listener: usize) -> Option<&Pool> {
        self.listeners[listener].pool.map(|pool| &self.pools[pool])
    }
}

impl Listener {
    /// Where it listens, for people.
    pub(crate) fn set_bound(&self, address: String) {
        *self.bound.lock().expect("nobody panics with it") = address;
    }

    pub(crate) fn bound(&self) -> String {
        self.bound.lock().expect("nobody panics with it").clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::address::Address;
    use crate::config;

    fn table(balance: Balance, most: [Option<usize>; 3]) -> Table {
        let address = |port: u16| Address::from(std::net::SocketAddr::from(([127, 0, 0, 1], port)));
        let backends = most.iter().enumerate().map(|(n, &max_connections)| config::Backend {
            name: n.to_string(),
            address: address(n as u16),
            max_connections,
        });
        let pool = config::Pool {
            name: "p".into(),
            balance,
            connect_timeout: Duration::from_secs(1),
            retries: 9,
            keepalive: None,
            nodelay: true,
            backends: backends.collect(),
        };
        let listener = config::Listener {
            name: "l".into(),
            address: address(9),
            pool: 0,
            max_connections: None,
            idle_timeout: None,
            keepalive: None,
            nodelay: true,
            backlog: 1,
            mode: None,
        };
        let config = Config {
            threads: None,
            pin_threads: false,
            max_connections: None,
            drain: None,
            access_log: None,
            listeners: vec![listener],
            pools: vec![pool],
        };
        Table::new(&config, 100)
    }

    #[test]
    fn each_in_turn_but_not_those_that_failed_or_are_full() {
        let table = table(Balance::RoundRobin, [None, Some(1), None]);
        let chosen: Vec<_> = (0..5).map(|_| table.choose(0, &[]).unwrap()).collect();
        assert_eq!(chosen, [0, 1, 2, 0, 2]);
        assert_eq!(table.choose(0, &[0, 2]), None, "the other is full");
        table.backends[1].open.remove();
        assert_eq!(table.choose(0, &[0, 2]), Some(1));
        assert_eq!(table.pools[0].tries, 3);
    }

    #[test]
    fn who_is_admitted_has_a_backend_and_who_does_not_come_takes_nobodys_turn() {
        let table = table(Balance::RoundRobin, [Some(1); 3]);
        for expected in 0..2 {
            assert_eq!(table.admit(0), Some(expected));
            let came_to_nothing = table.admit(0).unwrap();
            assert_eq!(came_to_nothing, expected + 1);
            table.dismiss(0, came_to_nothing);
        }
        table.count_waiting(0, true);
        assert!(!table.has_room(0) && table.has_backend(0, &[0, 1]));
        table.count_waiting(0, false);
        assert!(table.has_room(0));
        assert_eq!((table.admit(0), table.admit(0)), (Some(2), None));
        assert!(!table.has_room(0) && !table.has_backend(0, &[]));
        assert_eq!((table.open.now(), table.listeners[0].open.now()), (3, 3));
    }

    #[test]
    fn the_one_with_the_fewest() {
        let table = table(Balance::LeastConnections, [None, Some(1), None]);
        for _ in 0..7 {
            table.choose(0, &[]).unwrap();
        }
        let open: Vec<_> = table.backends.iter().map(|backend| backend.open.now()).collect();
        assert_eq!(open, [3, 1, 3]);
        table.backends[2].open.remove();
        assert_eq!(table.choose(0, &[]), Some(2));
    }

    #[test]
    fn what_is_no_longer_configured_has_a_place_of_its_own() {
        let mut table = table(Balance::RoundRobin, [None; 3]);
        assert_eq!(table.listener("l", "elsewhere"), 0);
        let gone = table.listener("gone", "127.0.0.1:1");
        assert_eq!((gone, table.choose(gone, &[])), (1, None));
        assert_eq!(table.backend("p", "2", "127.0.0.1:2"), 2);
        assert_eq!(table.backend("p", "2", "127.0.0.1:9"), 3, "the name is another's now");
        assert_eq!(table.backend("p", "2", "127.0.0.1:9"), 3);
    }
}
