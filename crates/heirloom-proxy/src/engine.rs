//! A proxy that serves: its loops, and how everything in them is handed over.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use heirloom::manifest::{Base, Change, Delta};
use heirloom::{ItemId, courtesy};

use crate::clock;
use crate::config::Config;
use crate::event_loop::EventLoop;
use crate::handover::{Items, Lent, Moved, ServiceState, Snapshot, TrafficState, door_item, encode};
use crate::rates::Rates;
use crate::ready::LoopThread;
use crate::report::Report;
use crate::shared::Shared;

/// How many connections are looked at before a loop goes on.
const AT_ONCE: usize = 64;
/// How many items are put in their place in a step.
const SORTED: usize = 512;

/// A proxy that serves in threads of its own. Dropped, it stops: the threads end, nothing is passed on any more, and no connection
/// is shut down; they end with the process, unless a successor has them.
///
/// ```
/// use heirloom::Bundle;
/// use heirloom_proxy::{Engine, EngineError, Prepared};
///
/// fn fresh(config: heirloom_proxy::Config) -> Result<Engine, EngineError> {
///     Ok(Prepared::new(config)?.offer(&Bundle::new())?.start(Bundle::new()))
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = "listener = [{ name = 'echo', listen = '127.0.0.1:0', to = ['127.0.0.1:7'] }]";
/// let engine = fresh(heirloom_proxy::Config::parse(config, "echo.toml")?)?;
/// assert_eq!(engine.report().listeners[0].name, "echo");
/// # Ok(()) }
/// ```
pub struct Engine {
    shared: Arc<Shared>,
    loops: Vec<LoopThread>,
    config: Config,
    rates: Rates,
    /// What was offered, to be sent when it is asked for.
    lent: Option<BTreeMap<ItemId, Lent>>,
}

impl Engine {
    pub(crate) fn new(shared: Arc<Shared>, loops: Vec<LoopThread>, rates: Rates, config: Config) -> Engine {
        Engine { shared, loops, config, rates, lent: None }
    }

    /// What it is configured to do.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Everything as it is now, to be offered. From now on the loops keep account of what changes, until
    /// [`reclaim`](Engine::reclaim). They go on meanwhile: some connections at a time are looked at.
    pub fn offer(&mut self) -> Base {
        let mut items: Items = Vec::new();
        let mut snapshots = Vec::with_capacity(AT_ONCE);
        for LoopThread { state, .. } in &self.loops {
            while state.lock().expect("a loop does not panic").wake_some() {}
            let keys = {
                let mut state = state.lock().expect("a loop does not panic");
                let doors = state.doors.iter().filter(|door| door.home);
                items.extend(doors.map(|door| door_item(door.key, door.listener, door.kind, &door.socket)));
                state.begin_lending()
            };
            items.reserve(2 * keys.len());
            for some in keys.chunks(AT_ONCE) {
                state.lock().expect("a loop does not panic").lend(some, &mut snapshots);
                snapshots.drain(..).for_each(|snapshot| snapshot.items(&mut items));
                courtesy::next_step();
            }
        }
        // Those of each loop are in order by now, which makes this cheap.
        items.sort_by_key(|(entry, _)| entry.id);
        courtesy::next_step();
        let (mut entries, mut lent) = (Vec::with_capacity(items.len()), BTreeMap::new());
        for (done, (entry, descriptor)) in items.into_iter().enumerate() {
            lent.insert(entry.id, descriptor);
            entries.push(entry);
            courtesy::step(done, SORTED);
        }
        self.lent = Some(lent);
        let state = ServiceState::of(&self.shared.table, self.rates.samples().to_vec(), Vec::new());
        Base {
            state: Some(encode(&state)),
            items: entries,
            next_id: self.shared.keys.next().0,
            ..Base::default()
        }
    }

    /// A descriptor of what was offered.
    pub fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        self.lent.as_ref()?.get(&id).map(AsFd::as_fd)
    }

    /// Nothing has come of the offer.
    pub fn reclaim(&mut self) {
        if self.lent.take().is_some() {
            for LoopThread { state, .. } in &self.loops {
                state.lock().expect("a loop does not panic").reclaim();
            }
        }
    }

    /// Stops all loops as one: each after at most one more turn. Nothing is touched until the [thaw](Frozen::thaw).
    pub fn freeze(&mut self) -> Frozen<'_> {
        self.shared.gate.close();
        let states = self.loops.iter().map(|one| one.state.lock().expect("a loop does not panic")).collect();
        let lent = self.lent.get_or_insert_default();
        Frozen { shared: &self.shared, states, lent, rates: &self.rates }
    }

    /// When [`tick`](Engine::tick) is due.
    pub fn next_tick(&self) -> Instant {
        let wait = self.rates.next().saturating_sub(clock::now());
        Instant::now() + Duration::from_nanos(wait)
    }

    /// Takes a sample for the rates, if it is time.
    pub fn tick(&mut self) {
        self.rates.take(clock::now(), self.shared.total());
    }

    /// What it does at the moment.
    pub fn report(&self) -> Report {
        let mut report = self.shared.report();
        for LoopThread { state, .. } in &self.loops {
            let state = state.lock().expect("a loop does not panic");
            report.pipes += state.pipes.count();
            report.pipes_in_use += state.pipes.lent();
            report.max_pipes += state.pipes.limit();
        }
        let (connections, up, down) = self.rates.now(clock::now(), self.shared.total());
        report.connections_per_second = connections;
        report.up_bytes_per_second = up;
        report.down_bytes_per_second = down;
        report
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.shared.table.open.now()
    }

    /// How many items a successor would get at least.
    pub fn item_count(&self) -> u64 {
        (2 * self.connections() + self.config.listeners.len()) as u64
    }

    /// Another process has everything: the threads end, and what is still to be written to the access log is written, for so long at
    /// most. Everything is let go of as long as the calling thread [gives way](courtesy); what is left then is closed when this is
    /// dropped, or by the end of the process, which takes less time.
    pub fn leave(&mut self, within: Duration) {
        self.shared.abandon();
        for (done, _) in self.lent.take().into_iter().flatten().enumerate() {
            courtesy::step(done, AT_ONCE);
        }
        // In this thread, which gives way.
        for LoopThread { state, thread } in &mut self.loops {
            let _ = thread.take().map(JoinHandle::join);
            state.lock().expect("a loop does not panic").let_go();
        }
        self.write_access_log(within);
    }

    /// Ends every connection and every listener, for good, and writes the access log for so long at most.
    pub fn stop(mut self, within: Duration) {
        let Frozen { states, .. } = self.freeze();
        for mut state in states {
            state.stop();
        }
        self.write_access_log(within);
    }

    /// Writes what is still to be written to the access log, for so long at most. Whether it is.
    pub fn flush_access_log(&self, within: Duration) -> bool {
        self.shared.access.as_ref().is_none_or(|access| access.flush(within))
    }

    fn write_access_log(&self, within: Duration) {
        if !self.flush_access_log(within) {
            tracing::warn!("{LINES_LOST}");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}

/// What is said when the process ends before its access log is written.
const LINES_LOST: &str = "the access log does not take everything in time: its last lines are lost";

/// All loops stand still. Dropped, they go on standing still: it is another process's turn.
pub struct Frozen<'e> {
    shared: &'e Shared,
    states: Vec<MutexGuard<'e, EventLoop>>,
    lent: &'e mut BTreeMap<ItemId, Lent>,
    rates: &'e Rates,
}

impl Frozen<'_> {
    /// What has changed since the offer.
    pub fn delta(&mut self) -> Delta {
        let (mut changed, mut ended, mut added) = (Vec::new(), Vec::new(), Vec::new());
        let mut moved = Vec::new();
        for state in &mut self.states {
            let (touched, gone) = state.changes();
            ended.extend(gone.into_iter().flat_map(|key| [key.first(), key.second()]));
            for key in touched {
                let Some(connection) = state.connections.get(&key) else { continue };
                if let Some(only) = Moved::of(key, connection) {
                    moved.push(only);
                    continue;
                }
                let snapshot = Snapshot::of(key, connection, Some(&self.shared.keys));
                if connection.offered {
                    let (id, state) = snapshot.changed(&mut added);
                    changed.push(Change { id, state });
                } else {
                    snapshot.items(&mut added);
                }
            }
        }
        changed.sort_unstable_by_key(|change| change.id);
        added.sort_unstable_by_key(|(entry, _)| entry.id);
        ended.sort_unstable();
        let (added, lent): (Vec<_>, Vec<_>) = added.into_iter().unzip();
        self.lent.extend(added.iter().map(|entry| entry.id).zip(lent));
        let state = ServiceState::of(&self.shared.table, self.rates.samples().to_vec(), moved);
        Delta {
            state: Some(encode(&state)),
            changed,
            added,
            ended,
            next_id: self.shared.keys.next().0,
            ..Delta::default()
        }
    }

    /// A descriptor of what was offered, or is new.
    pub fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        self.lent.get(&id).map(AsFd::as_fd)
    }

    /// Writes what is still to be written to the access log, for so long at most: nobody does it once this process is another
    /// program.
    pub fn write_access_log(&self, within: Duration) {
        if self.shared.access.as_ref().is_some_and(|access| !access.flush(within)) {
            tracing::warn!("{LINES_LOST}");
        }
    }

    /// The loops go on as if nothing had happened.
    pub fn thaw(self) {
        let Frozen { shared, states, .. } = self;
        drop(states);
        shared.gate.open();
        // Of what was put back into a loop nothing tells.
        shared.loops.iter().for_each(|post| drop(post.waker.wake()));
    }
}

impl Shared {
    /// What all listeners have passed on.
    pub(crate) fn total(&self) -> TrafficState {
        let each = self.table.listeners.iter().map(|listener| TrafficState::of(&listener.traffic));
        each.fold(TrafficState::default(), |sum, one| TrafficState {
            connections: sum.connections + one.connections,
            failed: sum.failed + one.failed,
            up: sum.up + one.up,
            down: sum.down + one.down,
        })
    }
}
