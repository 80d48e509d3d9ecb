//! The serving side: the control socket, the service lock, and at most one takeover at a time.
//!
//! An [`Incumbent`] is one descriptor to poll (for reading) and one deadline, whatever the program's runtime:
//! inside is an epoll of its own. When the descriptor is readable or the deadline has passed, call
//! [`Incumbent::turn`] until it says [`Turn::Idle`]; each other turn asks the program for something and borrows the
//! incumbent until it is answered. A [`Freeze`] can only be released or resumed.
//!
//! Nothing that a client of the control socket does can hold up the program, except the one takeover that it has
//! agreed to.

mod admission;
mod asked;
mod clients;
mod connection;
mod delegated;
mod standby;
mod turn;
mod upgrade;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use crate::clock;
use crate::config::Config;
use crate::control::request::{NoRequests, Request, RequestError};
use crate::control::status::{ItemStatus, LastTakeover, Status};
use crate::crash::{self, Point};
use crate::item::ItemId;
use crate::kind::Kind;
use crate::lock::Holding;
use crate::manifest::ServiceRecord;
use crate::protocol::{self, IncumbentOutcome};
use crate::service::Service;
use crate::transport::socket::takeover::{Takeover, Task, Want};
use crate::upgrade::{Launch, Upgrade};
use connection::Connection;
use turn::Audience;
use upgrade::{CHECK, Running, STARTED};

pub use asked::Asked;
pub use connection::ConnectionId;
pub use delegated::{Delegated, StatusAsked, UpgradeAsked};
pub(crate) use standby::Standby;
pub use turn::{Batch, Freeze, HandoverError, Offer, Outcome, TakenBy, Turn};

/// How many rounds of events one turn handles at most, so that the control socket cannot starve the service.
const ROUNDS: usize = 16;

/// How late a wait for a deadline may end.
const LATE: Duration = Duration::from_micros(50);

/// How long a process that was replaced rests before it tidies up.
const REST: Duration = Duration::from_millis(5);

const LISTENER: u64 = 0;
const CHANNEL: u64 = 1;
const SUCCESSOR: u64 = 2;
const FIRST_CONNECTION: u64 = 16;

/// The process that serves. `A` is the application's own requests; see [`Request`].
///
/// ```no_run
/// use heirloom::{Bundle, Config, NoRequests, Outcome, Replace, Service, Start, Turn};
/// use std::time::Instant;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let path = "/run/echo/echo.sock".as_ref();
/// let started = heirloom::start::<NoRequests>(path, Service::new("echo"), Config::default(), Replace::Try)?;
/// let Start::Fresh(mut incumbent) = started else {
///     return Ok(()); // somebody serves already: take over
/// };
/// let bundle = Bundle::new();
/// // … poll `incumbent` among the program's other descriptors; when it is readable:
/// loop {
///     match incumbent.turn(Instant::now())? {
///         Turn::Idle => break,
///         Turn::Offer(offer) => offer.begin_bundle(&bundle)?,
///         Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
///         Turn::Freeze(freeze) => match freeze.release_bundle(&bundle)? {
///             Outcome::Resumed(why) => eprintln!("still serving: {why}"),
///             Outcome::Taken(_) | Outcome::Superseded(_) => return Ok(()),
///         },
///         Turn::Request(asked) => asked.refuse("not here"),
///         Turn::Quit(_) => return Ok(()),
///         Turn::Closed(_) | Turn::Delegated(_) => {}
///     }
/// }
/// # Ok(()) }
/// ```
pub struct Incumbent<A = NoRequests> {
    epoll: OwnedFd,
    listener: UnixListener,
    path: PathBuf,
    lock: Holding,
    service: Service,
    config: Config,
    record: ServiceRecord,
    serving_since_ms: u64,
    items: Vec<ItemStatus>,
    /// How many items there are, if they are not all in `items`.
    unlisted: Option<u64>,
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: u64,
    takeover: Option<Box<Takeover>>,
    launch: Launch,
    upgrade: Option<Box<Running>>,
    /// Who wants to see the manifest.
    inspectors: Vec<ConnectionId>,
    last_takeover: Option<LastTakeover>,
    ended: Option<Outcome>,
    notices: VecDeque<Notice<A>>,
    /// Connections that got a reply late: more lines of theirs may be waiting.
    replied: Vec<ConnectionId>,
    /// When to accept again after that has failed.
    listen_again: Option<Instant>,
    /// Reads a line as a request of ours or of the application.
    parse: fn(&[u8]) -> Result<Request<A>, RequestError>,
    again: bool,
}

/// Something from the control socket that the application has to hear of.
enum Notice<A> {
    Request(ConnectionId, A),
    Quit(ConnectionId),
    Closed(ConnectionId),
    Status(ConnectionId),
    Upgrade(ConnectionId, Upgrade),
}

impl<A> Incumbent<A> {
    /// Handles what has happened at the control socket and in a takeover, and says what the program has to do.
    ///
    /// # Errors
    ///
    /// Only failures of the incumbent's own descriptors; a client's misbehaviour never is one. The program may go on
    /// serving without a control socket.
    pub fn turn(&mut self, now: Instant) -> io::Result<Turn<'_, A>> {
        self.again = false;
        self.process(now)?;
        // A takeover that ends before the freeze needs nothing of the application.
        self.ended = None;
        match self.takeover.as_mut().and_then(|takeover| takeover.want.take()) {
            Some(Want::Offer) => {
                return Ok(Turn::Offer(Offer { incumbent: Some(self), audience: Audience::Successor }));
            }
            Some(Want::Batch(ids)) => return Ok(Turn::Batch(Batch { incumbent: self, ids })),
            Some(Want::Freeze) => return Ok(Turn::Freeze(Freeze { incumbent: Some(self) })),
            None => {}
        }
        self.start_unchecked(now);
        if self.upgrade_wants_offer() {
            return Ok(Turn::Offer(Offer { incumbent: Some(self), audience: Audience::Preflight }));
        }
        if self.upgrade_freezes() {
            return Ok(Turn::Freeze(Freeze { incumbent: Some(self) }));
        }
        if self.can_show_manifest() {
            let audience = Audience::Inspectors(std::mem::take(&mut self.inspectors));
            return Ok(Turn::Offer(Offer { incumbent: Some(self), audience }));
        }
        match self.notices.pop_front() {
            Some(Notice::Request(connection, request)) => Ok(Turn::Request(Asked {
                incumbent: self,
                connection,
                request: Some(request),
                answered: false,
            })),
            Some(Notice::Quit(connection)) => {
                self.withdraw(now, "the incumbent was told to quit");
                Ok(Turn::Quit(connection))
            }
            Some(Notice::Closed(connection)) => Ok(Turn::Closed(connection)),
            Some(Notice::Status(connection)) => Ok(Turn::Delegated(Delegated::Status(StatusAsked {
                incumbent: self,
                connection,
                answered: false,
            }))),
            Some(Notice::Upgrade(connection, request)) => {
                Ok(Turn::Delegated(Delegated::Upgrade(UpgradeAsked {
                    incumbent: self,
                    connection,
                    request,
                    answered: false,
                })))
            }
            None => Ok(Turn::Idle),
        }
    }

    /// Ends a takeover or an upgrade that has not frozen anything yet, if there is one: the other side is told why.
    pub fn withdraw(&mut self, now: Instant, why: &str) {
        if let Some(takeover) = &mut self.takeover {
            takeover.machine.abort(why);
            self.run_takeover(now);
            self.ended = None;
        }
        self.withdraw_upgrade(why);
    }

    fn process(&mut self, now: Instant) -> io::Result<()> {
        self.catch_up(now);
        for round in 0.. {
            self.run_takeover(now);
            if self.is_over() {
                return Ok(());
            }
            if round == ROUNDS {
                self.again = true;
                break;
            }
            if !self.handle_events(Some(now))? {
                break;
            }
            if self.is_over() {
                return Ok(());
            }
        }
        self.handle_timeouts(now);
        Ok(())
    }

    /// What could not be done when it was asked for.
    fn catch_up(&mut self, now: Instant) {
        for id in std::mem::take(&mut self.replied) {
            self.answer(now, id);
        }
        if self.listen_again.take_if(|at| *at <= now).is_some() {
            self.set_listening(true);
        }
    }

    /// Handles what has happened by `now`, or waits for what happens next, or for the [timer](Incumbent::timer). Whether
    /// there was anything.
    fn handle_events(&mut self, now: Option<Instant>) -> io::Result<bool> {
        let timeout = match now {
            Some(_) => Some(Duration::ZERO),
            // The kernel may count in coarser steps: rather a little late than in vain.
            None => self.timer().map(|at| at.saturating_duration_since(Instant::now()) + LATE),
        };
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        let mut events = Vec::with_capacity(64);
        let mut wait = |timeout: Option<&Timespec>| {
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout)
        };
        let waited = match &mut self.takeover {
            Some(takeover) if now.is_none() => takeover.busy_poll.wait(timeout.as_ref(), wait),
            _ => wait(timeout.as_ref()),
        };
        match waited {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        let now = now.unwrap_or_else(Instant::now);
        for event in &events {
            match event.data.u64() {
                LISTENER => self.accept(now),
                CHANNEL => self.channel_ready(now),
                SUCCESSOR => self.successor_exited(now),
                CHECK | STARTED => self.run_upgrade(now),
                id => self.connection_ready(now, ConnectionId(id), event.flags),
            }
            if self.is_over() {
                break;
            }
        }
        Ok(!events.is_empty())
    }

    fn handle_timeouts(&mut self, now: Instant) {
        if let Some(takeover) = &mut self.takeover {
            takeover.machine.handle_timeout(now);
            self.run_takeover(now);
        }
        if self.upgrade_deadline().is_some_and(|at| at <= now) {
            self.run_upgrade(now);
        }
    }

    /// Inspectors wait while somebody else was offered a manifest: what has changed since is reckoned from the last one that
    /// the application wrote.
    fn can_show_manifest(&self) -> bool {
        !self.inspectors.is_empty() && !self.takeover_running()
    }

    /// Whether somebody else serves. Then nothing is answered any more: the control socket is theirs.
    fn is_over(&self) -> bool {
        matches!(self.ended, Some(Outcome::Taken(_) | Outcome::Superseded(_)))
    }

    /// Reads what the successor has sent: it may have taken over, or given up, before it was asked what is answered next.
    fn hear_successor(&mut self, now: Instant) {
        if let Some(takeover) = &mut self.takeover {
            takeover.receive_all(now);
            self.run_takeover(now);
        }
    }

    fn channel_ready(&mut self, now: Instant) {
        let Some(takeover) = &mut self.takeover else { return };
        // One a wake-up: the epoll tells of the next.
        takeover.receive(now);
        if takeover.channel_closed {
            let _ = epoll::delete(&self.epoll, &takeover.channel);
        }
        self.run_takeover(now);
    }

    fn successor_exited(&mut self, now: Instant) {
        let Some(takeover) = &mut self.takeover else { return };
        // The event may be of the one before, when a takeover has ended and another begun since the wait.
        if matches!(takeover.successor.exited(), Ok(Some(false))) {
            return;
        }
        if let Some(pidfd) = takeover.successor.pidfd() {
            let _ = epoll::delete(&self.epoll, pidfd);
        }
        takeover.receive_all(now);
        takeover.machine.handle_exited(now);
        self.run_takeover(now);
    }

    fn run_takeover(&mut self, now: Instant) {
        while let Some(takeover) = &mut self.takeover {
            match takeover.run(now) {
                None => break,
                Some(Task::Unlock) => {
                    self.lock.release();
                    crash::reach(Point::LockReleased);
                }
                Some(Task::Relock) => {
                    if self.lock.try_take() {
                        crash::reach(Point::Relocked);
                        takeover.machine.relocked();
                    } else {
                        takeover.machine.lock_held(now);
                    }
                }
                Some(Task::End(outcome)) => self.end_takeover(outcome),
            }
        }
    }

    fn end_takeover(&mut self, outcome: IncumbentOutcome) {
        let Some(takeover) = self.takeover.take() else { return };
        if !takeover.channel_closed {
            let _ = epoll::delete(&self.epoll, &takeover.channel);
        }
        if let Some(pidfd) = takeover.successor.pidfd() {
            let _ = epoll::delete(&self.epoll, pidfd);
        }
        let pause = takeover.frozen_at_ns.map(|frozen| (clock::monotonic_ns() - frozen) / 1000);
        let (name, reason) = match &outcome {
            IncumbentOutcome::Taken => ("taken", None),
            IncumbentOutcome::Resumed(reason) => ("resumed", Some(reason)),
            IncumbentOutcome::Superseded(reason) => ("superseded", Some(reason)),
        };
        if let Some(reason) = reason {
            tracing::warn!(
                successor = %takeover.successor,
                peer_pid = takeover.successor.pid,
                generation = self.record.generation,
                step = %reason.step,
                reason = %reason.cause,
                "takeover ended: {name}"
            );
        }
        self.last_takeover = Some(LastTakeover {
            outcome: name.into(),
            reason: reason.map(ToString::to_string),
            peer_pid: takeover.successor.pid,
            items: takeover.items,
            bytes: takeover.bytes,
            pause_us: pause,
            total_us: takeover.started.elapsed().as_micros() as u64,
            at_unix_ms: clock::unix_ms(),
        });
        match &outcome {
            IncumbentOutcome::Taken => {
                self.upgrade_taken();
                // The two may share a processor: what is closed and freed from now on must not delay the successor.
                std::thread::sleep(REST);
            }
            IncumbentOutcome::Resumed(reason) | IncumbentOutcome::Superseded(reason) => {
                self.fail_upgrade(&reason.to_string());
            }
        }
        self.ended = Some(match outcome {
            IncumbentOutcome::Taken => Outcome::Taken(TakenBy {
                pid: takeover.successor.pid,
                program: takeover.hello.program,
                version: takeover.hello.version,
                items: takeover.items,
                outsider: takeover.outsider,
            }),
            IncumbentOutcome::Resumed(reason) => Outcome::Resumed(reason),
            IncumbentOutcome::Superseded(reason) => Outcome::Superseded(reason),
        });
    }
}

impl<A> Incumbent<A> {
    /// When [`Incumbent::turn`] wants to be called though nothing is readable.
    pub fn deadline(&self) -> Option<Instant> {
        let asked = !self.notices.is_empty() || !self.replied.is_empty() || self.can_show_manifest();
        if self.again || asked {
            return Some(Instant::now());
        }
        match &self.takeover {
            Some(takeover) if takeover.want.is_some() => Some(Instant::now()),
            _ => self.timer(),
        }
    }

    /// When the incumbent itself has something to do.
    fn timer(&self) -> Option<Instant> {
        let takeover = self.takeover.as_deref().and_then(Takeover::deadline);
        [takeover, self.upgrade_deadline(), self.listen_again].into_iter().flatten().min()
    }

    /// The path of the control socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many times the service has been handed over.
    pub fn generation(&self) -> u64 {
        self.record.generation
    }

    /// How the last takeover that this process had a part in went.
    pub fn last_takeover(&self) -> Option<&LastTakeover> {
        self.last_takeover.as_ref()
    }

    /// Whether a takeover or an upgrade is going on.
    pub fn takeover_running(&self) -> bool {
        self.takeover.is_some() || self.upgrade.is_some()
    }

    /// Whether another program may soon serve in the place of this one: a takeover or an upgrade is going on that is no dry run.
    pub fn is_being_replaced(&self) -> bool {
        self.takeover.is_some() || self.upgrade.as_ref().is_some_and(|running| !running.is_dry_run())
    }

    /// Sets a counter, such as `bytes_in`: shown by status, and handed over, so that it never goes back.
    pub fn set_counter(&mut self, name: &str, value: u64) {
        match self.record.counters.get_mut(name) {
            Some(counter) => *counter = value,
            None => drop(self.record.counters.insert(name.into(), value)),
        }
    }

    /// The counter as it stands, with what former generations counted.
    pub fn counter(&self, name: &str) -> u64 {
        self.record.counters.get(name).copied().unwrap_or(0)
    }

    /// Sets what status shows as the items held, and what room a successor is required to have.
    pub fn set_items(&mut self, items: impl IntoIterator<Item = (ItemId, String, Kind)>) {
        self.items = items
            .into_iter()
            .map(|(id, name, kind)| ItemStatus { id: id.0, name, kind: kind.to_string(), put_by: None })
            .collect();
    }

    /// Says how many items there are, for a program with too many to list: that is what room a successor is required to
    /// have. Status shows those of [`set_items`](Incumbent::set_items) all the same.
    pub fn set_item_count(&mut self, items: u64) {
        self.unlisted = Some(items);
    }

    /// How many items a successor would get, the control listener apart.
    fn item_count(&self) -> u64 {
        self.unlisted.unwrap_or(self.items.len() as u64)
    }

    /// What a status request is answered with.
    pub fn status(&self) -> Status {
        Status {
            name: self.service.name.clone(),
            pid: std::process::id(),
            generation: self.record.generation,
            program: self.service.program.clone(),
            version: self.service.version.clone(),
            protocol: protocol::VERSIONS.max,
            started_unix_ms: self.record.started_unix_ms,
            serving_since_unix_ms: self.serving_since_ms,
            items: self.items.clone(),
            counters: self.record.counters.clone(),
            takeover_running: self.takeover_running(),
            last_takeover: self.last_takeover.clone(),
            supervised: None,
            application: None,
        }
    }

    /// Ends the service for good: removes the control socket's path. Only for a process that is not being replaced.
    pub fn retire(self) {
        if let Holding::Held(_) = self.lock {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl<A> Drop for Incumbent<A> {
    /// A takeover that is going on is aborted: a successor must never take a closed channel for a release.
    fn drop(&mut self) {
        self.withdraw(Instant::now(), "the incumbent ends");
    }
}

impl<A> AsFd for Incumbent<A> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl<A> fmt::Debug for Incumbent<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incumbent")
            .field("path", &self.path)
            .field("service", &self.service)
            .field("generation", &self.record.generation)
            .finish_non_exhaustive()
    }
}
