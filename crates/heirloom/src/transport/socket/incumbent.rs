//! The serving side: the control socket, the service lock, and at most one takeover at a time.
//!
//! An [`Incumbent`] is one descriptor to poll (for reading) and one deadline, whatever the program's runtime:
//! inside is an epoll of its own. When the descriptor is readable or the deadline has passed, call
//! [`Incumbent::turn`] until it says [`Turn::Idle`]; each other turn asks the program for something and borrows the
//! incumbent until it is answered. A [`Freeze`] can only be released or resumed.
//!
//! Nothing that a client of the control socket does can hold up the program, except the one takeover that it has
//! agreed to.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::{Connection, ConnectionId};
use super::takeover::{Offered, Takeover, Task, Want};
use crate::bundle::Bundle;
use crate::channel::Channel;
use crate::clock;
use crate::config::Config;
use crate::control::request::{
    Failure, FailureCode, Hello, NoRequests, Reply, Request, RequestError, VersionRange, Welcome,
};
use crate::control::status::{ItemStatus, LastTakeover, Status};
use crate::descriptors::{Wait, send_with};
use crate::item::{CONTROL_NAME, Entry, ItemId};
use crate::kind::Kind;
use crate::lock::{Holding, ServiceLock};
use crate::manifest::{Base, Delta, ManifestError, ServiceRecord, seal};
use crate::peer::Peer;
use crate::protocol::{self, IncumbentOutcome, Reason};
use crate::service::Service;

/// Descriptors that a successor needs beside the items: manifests, channel, epoll, lock and some air.
const SPARE_DESCRIPTORS: u64 = 16;
/// How many rounds of events one turn handles at most, so that the control socket cannot starve the service.
const ROUNDS: usize = 16;

/// How long the control socket rests when a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
///         Turn::Closed(_) => {}
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
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: u64,
    takeover: Option<Box<Takeover>>,
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
}

/// What the program has to do next.
///
/// ```
/// use heirloom::{Incumbent, Turn};
/// use std::time::Instant;
///
/// /// For a program that never lets itself be replaced.
/// fn refuse_all(incumbent: &mut Incumbent) -> std::io::Result<()> {
///     loop {
///         match incumbent.turn(Instant::now())? {
///             Turn::Idle => return Ok(()),
///             Turn::Offer(offer) => offer.refuse("this one stays"),
///             _ => {}
///         }
///     }
/// }
/// ```
pub enum Turn<'i, A = NoRequests> {
    /// Nothing; serve, and come back when the incumbent's descriptor is readable or its deadline has passed.
    Idle,
    /// A successor was admitted: write down what there is to hand over.
    Offer(Offer<'i, A>),
    /// Lend these items' descriptors, to be sent.
    Batch(Batch<'i, A>),
    /// The successor is ready: stop touching everything.
    Freeze(Freeze<'i, A>),
    /// A request of the application's own.
    Request(Asked<'i, A>),
    /// Somebody asked the program to end; it was told "Bye".
    Quit(ConnectionId),
    /// A connection that the application [watches](Asked::watch) has ended.
    Closed(ConnectionId),
}

/// How a frozen takeover ended.
///
/// ```
/// use heirloom::Outcome;
///
/// fn say(outcome: &Outcome) -> String {
///     match outcome {
///         Outcome::Taken(by) => format!("replaced by {by}"),
///         Outcome::Resumed(reason) => format!("serving on; the takeover ended {reason}"),
///         Outcome::Superseded(reason) => format!("somebody else serves; the takeover ended {reason}"),
///     }
/// }
/// ```
#[derive(Debug)]
pub enum Outcome {
    /// The successor serves: exit, closing everything with a plain close, never a shutdown.
    Taken(TakenBy),
    /// Serve on.
    Resumed(Reason),
    /// A third process took the service lock meanwhile and serves: exit.
    Superseded(Reason),
}

/// Why this side could not hand over. The takeover is aborted: serve on.
///
/// ```
/// use heirloom::{Bundle, HandoverError, Offer};
///
/// fn offer<A>(offer: Offer<'_, A>, bundle: &Bundle) {
///     match offer.begin_bundle(bundle) {
///         Ok(()) => {}
///         Err(HandoverError::Manifest(error)) => eprintln!("too much to hand over: {error}"),
///         Err(HandoverError::Io(error)) => eprintln!("no memory for it: {error}"),
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// What is to be handed over exceeds a limit, or is in disorder.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A memfd could not be written (memory is full), or the incumbent's own descriptors fail.
    #[error("cannot hand over: {0}")]
    Io(#[from] io::Error),
}

/// Who has taken over.
///
/// ```
/// use heirloom::TakenBy;
///
/// let by = TakenBy { pid: Some(7), program: "echod".into(), version: "2.0".into(), items: 3 };
/// assert_eq!(by.to_string(), "echod 2.0 (pid 7)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenBy {
    /// Its process id, where it can be seen from here.
    pub pid: Option<u32>,
    /// Its program's name, as it says.
    pub program: String,
    /// Its program's version, as it says.
    pub version: String,
    /// How many items it got.
    pub items: u64,
}

impl fmt::Display for TakenBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{} {} (pid {pid})", self.program, self.version),
            None => write!(f, "{} {} (in another pid namespace)", self.program, self.version),
        }
    }
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
            Some(Want::Offer) => return Ok(Turn::Offer(Offer { incumbent: Some(self) })),
            Some(Want::Batch(ids)) => return Ok(Turn::Batch(Batch { incumbent: self, ids })),
            Some(Want::Freeze) => return Ok(Turn::Freeze(Freeze { incumbent: Some(self) })),
            None => {}
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
            None => Ok(Turn::Idle),
        }
    }

    /// Ends a takeover that has not frozen anything yet, if there is one: the successor is told why.
    pub fn withdraw(&mut self, now: Instant, why: &str) {
        if let Some(takeover) = &mut self.takeover {
            takeover.machine.abort(why);
            self.run_takeover(now);
            self.ended = None;
        }
    }

    fn process(&mut self, now: Instant) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        for id in std::mem::take(&mut self.replied) {
            self.answer(now, id);
        }
        if self.listen_again.take_if(|at| *at <= now).is_some() {
            self.set_listening(true);
        }
        for round in 0.. {
            self.run_takeover(now);
            if self.is_over() {
                return Ok(());
            }
            if round == ROUNDS {
                self.again = true;
                break;
            }
            events.clear();
            let no_wait = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&no_wait)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(now),
                    CHANNEL => self.channel_ready(now),
                    SUCCESSOR => self.successor_exited(now),
                    id => self.connection_ready(now, ConnectionId(id), event.flags),
                }
                if self.is_over() {
                    return Ok(());
                }
            }
        }
        if let Some(takeover) = &mut self.takeover {
            takeover.machine.handle_timeout(now);
            self.run_takeover(now);
        }
        Ok(())
    }

    /// Whether somebody else serves. Then nothing is answered any more: the control socket is theirs.
    fn is_over(&self) -> bool {
        matches!(self.ended, Some(Outcome::Taken(_) | Outcome::Superseded(_)))
    }

    fn accept(&mut self, now: Instant) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, most likely: looking again at once would be a busy loop.
                    tracing::warn!(%error, "cannot accept at the control socket for now");
                    self.set_listening(false);
                    self.listen_again = Some(now + ACCEPT_PAUSE);
                    return;
                }
            };
            let peer = match Peer::of(&stream) {
                Ok(peer) => peer,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell who connected to the control socket");
                    let line = failure(FailureCode::Failed, format_args!("it cannot tell who asks: {error}"));
                    let _ = send_with(&stream, &line, &[], Wait::DontWait);
                    continue;
                }
            };
            let refused = self.config.peers.check(&peer).err();
            let mut connection = Connection::new(stream, peer, &self.config.limits);
            if let Some(refused) = refused {
                tracing::warn!(peer = %connection.peer, "refused at the control socket");
                connection.send(failure(FailureCode::Permission, refused), Vec::new());
                continue;
            }
            if self.connections.len() >= self.config.limits.control_connections {
                self.make_room();
            }
            let id = ConnectionId(self.next_connection);
            self.next_connection += 1;
            let flags = epoll::EventFlags::IN;
            if epoll::add(&self.epoll, &connection, epoll::EventData::new_u64(id.0), flags).is_ok() {
                self.connections.insert(id, connection);
                self.connection_ready(now, id, flags);
            }
        }
    }

    fn set_listening(&self, listening: bool) {
        let interest = if listening { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        let _ = epoll::modify(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), interest);
    }

    /// Closes the oldest connection that nothing is owed to, so that idle clients cannot keep others out.
    fn make_room(&mut self) {
        let idle = self.connections.iter().find(|(_, connection)| !connection.waiting && !connection.watched);
        if let Some((&id, _)) = idle
            && let Some(mut connection) = self.connections.remove(&id)
        {
            let _ = epoll::delete(&self.epoll, &connection);
            connection.send(
                failure(FailureCode::Busy, "too many control connections: this was the oldest"),
                Vec::new(),
            );
        }
    }

    fn connection_ready(&mut self, now: Instant, id: ConnectionId, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if flags.contains(epoll::EventFlags::OUT) {
            connection.flush();
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            connection.fill();
        }
        if flags.contains(epoll::EventFlags::HUP) {
            connection.hang_up();
        }
        self.answer(now, id);
    }

    /// Answers the whole lines that a connection has sent.
    fn answer(&mut self, now: Instant, id: ConnectionId) {
        while let Some(line) = self.connections.get_mut(&id).and_then(Connection::next_line) {
            let request = match line {
                Ok(line) => (self.parse)(&line),
                Err(too_long) => {
                    self.reply(id, failure(FailureCode::TooLong, too_long));
                    break;
                }
            };
            match request {
                Ok(Request::Ping) => self.reply(id, Reply::Pong.to_line()),
                Ok(Request::Status) => {
                    let status = self.status();
                    self.reply(id, Reply::Status(status).to_line());
                }
                Ok(Request::Quit) => {
                    self.reply(id, Reply::Bye.to_line());
                    self.notices.push_back(Notice::Quit(id));
                }
                Ok(Request::Takeover(hello)) => self.hello(now, id, hello),
                Ok(Request::Application(request)) => {
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.waiting = true;
                    }
                    self.notices.push_back(Notice::Request(id, request));
                }
                Err(error) => {
                    let code = match &error {
                        RequestError::Unknown { .. } => FailureCode::Unknown,
                        _ => FailureCode::Malformed,
                    };
                    self.reply(id, failure(code, error));
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.count_bad_line(&self.config.limits);
                        if connection.has_ended() {
                            break;
                        }
                    }
                }
            }
        }
        self.settle(id);
    }

    /// Closes a connection that has ended, or waits for what it wants next.
    fn settle(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else { return };
        let data = epoll::EventData::new_u64(id.0);
        if !connection.has_ended()
            && epoll::modify(&self.epoll, connection, data, connection.interest()).is_ok()
        {
            return;
        }
        let _ = epoll::delete(&self.epoll, connection);
        if connection.watched {
            self.notices.push_back(Notice::Closed(id));
        }
        self.connections.remove(&id);
    }

    fn reply(&mut self, id: ConnectionId, line: Vec<u8>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.send(line, Vec::new());
        }
    }

    /// Checks a Hello, and starts the takeover that it asks for.
    fn hello(&mut self, now: Instant, id: ConnectionId, hello: Hello) {
        let admitted = self.admit(&hello).and_then(|protocol| {
            let connection = self.connections.get(&id).ok_or_else(|| failed("the connection has ended"))?;
            let peer = Peer::of(connection).map_err(failed)?;
            let (channel, other) = Channel::pair().map_err(failed)?;
            let token = |token| epoll::EventData::new_u64(token);
            epoll::add(&self.epoll, &channel, token(CHANNEL), epoll::EventFlags::IN).map_err(failed)?;
            if let Some(pidfd) = peer.pidfd() {
                epoll::add(&self.epoll, pidfd, token(SUCCESSOR), epoll::EventFlags::IN).map_err(failed)?;
            }
            Ok((protocol, peer, channel, other))
        });
        match admitted {
            Ok((protocol, peer, channel, other)) => {
                tracing::info!(successor = %peer, program = hello.program, version = hello.version, "takeover begins");
                let welcome = Reply::Takeover(Welcome {
                    protocol,
                    generation: self.record.generation,
                    pid: std::process::id(),
                    program: self.service.program.clone(),
                    version: self.service.version.clone(),
                    schema: self.service.writes,
                    items: self.items.len() as u64 + 1,
                });
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.send(welcome.to_line(), vec![other]);
                }
                let machine = protocol::Incumbent::new(now, self.config.times);
                self.takeover = Some(Box::new(Takeover::new(machine, channel, peer, hello)));
            }
            Err(refusal) => {
                tracing::warn!(pid = hello.pid, reason = refusal.message, "takeover refused");
                if refusal.code != FailureCode::Busy {
                    self.last_takeover = Some(LastTakeover {
                        outcome: "refused".into(),
                        reason: Some(refusal.message.clone()),
                        peer_pid: Some(hello.pid),
                        items: 0,
                        bytes: 0,
                        pause_us: None,
                        total_us: 0,
                        at_unix_ms: clock::unix_ms(),
                    });
                }
                self.reply(id, Reply::Error(refusal).to_line());
            }
        }
    }

    fn admit(&self, hello: &Hello) -> Result<u32, Failure> {
        if let Some(running) = &self.takeover {
            return Err(Failure {
                code: FailureCode::Busy,
                message: format!(
                    "a takeover by {} is going on; try again when it has ended",
                    running.successor
                ),
            });
        }
        if hello.service != self.service.name {
            return Err(Failure {
                code: FailureCode::WrongService,
                message: format!(
                    "this process serves `{}`, the successor is for `{}`; give it another control path or name",
                    self.service.name, hello.service
                ),
            });
        }
        let ours: VersionRange = protocol::VERSIONS;
        let Some(protocol) = ours.meet(hello.protocol) else {
            return Err(Failure {
                code: FailureCode::Protocol,
                message: format!(
                    "the incumbent ({} {}) speaks takeover protocol {ours}, the successor ({} {}) {}; go by a version that speaks both",
                    self.service.program, self.service.version, hello.program, hello.version, hello.protocol
                ),
            });
        };
        if !hello.schema.contains(self.service.writes) {
            return Err(Failure {
                code: FailureCode::Schema,
                message: format!(
                    "the incumbent ({} {}) writes state of schema {}, the successor ({} {}) reads {}",
                    self.service.program,
                    self.service.version,
                    self.service.writes,
                    hello.program,
                    hello.version,
                    hello.schema
                ),
            });
        }
        let needed = self.items.len() as u64 + 1 + SPARE_DESCRIPTORS;
        if hello.room < needed {
            return Err(Failure {
                code: FailureCode::Room,
                message: format!(
                    "the successor has room for {} descriptors, {needed} are needed; raise its limit (ulimit -n, LimitNOFILE=)",
                    hello.room
                ),
            });
        }
        Ok(protocol)
    }

    fn channel_ready(&mut self, now: Instant) {
        let Some(takeover) = &mut self.takeover else { return };
        takeover.receive_all(now);
        if takeover.channel_closed {
            let _ = epoll::delete(&self.epoll, &takeover.channel);
        }
        self.run_takeover(now);
    }

    fn successor_exited(&mut self, now: Instant) {
        let Some(takeover) = &mut self.takeover else { return };
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
                Some(Task::Unlock) => self.lock.release(),
                Some(Task::Relock) => {
                    if self.lock.try_take() {
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
            IncumbentOutcome::Resumed(reason) => ("resumed", Some(reason.to_string())),
            IncumbentOutcome::Superseded(reason) => ("superseded", Some(reason.to_string())),
        };
        if let Some(reason) = &reason {
            tracing::warn!(successor = %takeover.successor, reason, "takeover ended: {name}");
        }
        self.last_takeover = Some(LastTakeover {
            outcome: name.into(),
            reason,
            peer_pid: takeover.successor.pid,
            items: takeover.items,
            bytes: takeover.bytes,
            pause_us: pause,
            total_us: takeover.started.elapsed().as_micros() as u64,
            at_unix_ms: clock::unix_ms(),
        });
        self.ended = Some(match outcome {
            IncumbentOutcome::Taken => Outcome::Taken(TakenBy {
                pid: takeover.successor.pid,
                program: takeover.hello.program,
                version: takeover.hello.version,
                items: takeover.items,
            }),
            IncumbentOutcome::Resumed(reason) => Outcome::Resumed(reason),
            IncumbentOutcome::Superseded(reason) => Outcome::Superseded(reason),
        });
    }
}

impl<A> Incumbent<A> {
    /// When [`Incumbent::turn`] wants to be called though nothing is readable.
    pub fn deadline(&self) -> Option<Instant> {
        if self.again || !self.notices.is_empty() || !self.replied.is_empty() {
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
        [takeover, self.listen_again].into_iter().flatten().min()
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

    /// Whether a takeover is going on.
    pub fn takeover_running(&self) -> bool {
        self.takeover.is_some()
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
            .map(|(id, name, kind)| ItemStatus { id: id.0, name, kind: kind.to_string() })
            .collect();
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
            takeover_running: self.takeover.is_some(),
            last_takeover: self.last_takeover.clone(),
        }
    }

    /// Ends the service for good: removes the control socket's path. Only for a process that is not being replaced.
    pub fn retire(self) {
        if let Holding::Held(_) = self.lock {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub(super) fn serve(
        listener: UnixListener,
        path: &Path,
        lock: ServiceLock,
        service: Service,
        config: Config,
        record: ServiceRecord,
        last_takeover: Option<LastTakeover>,
    ) -> io::Result<Self>
    where
        A: DeserializeOwned,
    {
        // Whoever had it before may have left it blocking; from here on it is ours to change.
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Incumbent {
            epoll,
            listener,
            path: path.into(),
            lock: Holding::Held(lock),
            record: ServiceRecord {
                name: service.name.clone(),
                program: service.program.clone(),
                version: service.version.clone(),
                schema: service.writes,
                ..record
            },
            service,
            config,
            serving_since_ms: clock::unix_ms(),
            items: Vec::new(),
            connections: BTreeMap::new(),
            next_connection: FIRST_CONNECTION,
            takeover: None,
            last_takeover,
            ended: None,
            notices: VecDeque::new(),
            replied: Vec::new(),
            listen_again: None,
            parse: Request::<A>::parse,
            again: false,
        })
    }

    fn wait(&self, deadline: Option<Instant>) -> io::Result<()> {
        let timeout =
            deadline.map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_micros(50));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        let mut fds = [rustix::event::PollFd::new(&self.epoll, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
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

/// A successor was admitted and waits for the base manifest. Dropping it refuses.
///
/// ```
/// use heirloom::manifest::Base;
/// use heirloom::{Cbor, Codec, Offer};
///
/// fn hand_over<A>(offer: Offer<'_, A>, topic: &str) -> Result<(), Box<dyn std::error::Error>> {
///     Ok(offer.begin(Base { state: Some(Cbor::encode(topic)?), ..Base::default() })?)
/// }
/// ```
pub struct Offer<'i, A> {
    incumbent: Option<&'i mut Incumbent<A>>,
}

impl<A> Offer<'_, A> {
    /// Sends the base manifest: the application's state and its items, as they are now. Their descriptors are asked
    /// for in [`Turn::Batch`]es. The control listener and the service's record are added here.
    ///
    /// # Errors
    ///
    /// The manifest exceeds a limit or cannot be written (memory is full): the takeover is aborted, serve on.
    pub fn begin(mut self, mut base: Base) -> Result<(), HandoverError> {
        let Some(incumbent) = self.incumbent.take() else { return Ok(()) };
        let now = Instant::now();
        base.service = incumbent.record.clone();
        base.items.insert(0, control_entry());
        let Some(takeover) = &mut incumbent.takeover else { return Ok(()) };
        let result = base.encode(&incumbent.config.limits).map_err(HandoverError::from).and_then(|encoded| {
            takeover.bytes += encoded.bytes.len() as u64;
            let ids = base.items.iter().map(|entry| entry.id).collect();
            let memfd = seal("base", &encoded.bytes)?;
            takeover.offered = Some(Offered { base, crc: encoded.crc, memfd });
            takeover.machine.offered(now, ids);
            Ok(())
        });
        if let Err(error) = &result {
            takeover.machine.abort(format_args!("the incumbent cannot write its manifest: {error}"));
        }
        incumbent.run_takeover(now);
        result
    }

    /// Like [`Offer::begin`], for a program that keeps a [`Bundle`].
    ///
    /// # Errors
    ///
    /// See [`Offer::begin`].
    pub fn begin_bundle(self, bundle: &Bundle) -> Result<(), HandoverError> {
        self.begin(bundle.base(ServiceRecord::default()))
    }

    /// Refuses: the successor is told why.
    pub fn refuse(mut self, why: &str) {
        if let Some(incumbent) = self.incumbent.take() {
            incumbent.withdraw(Instant::now(), why);
        }
    }
}

impl<A> Drop for Offer<'_, A> {
    fn drop(&mut self) {
        if let Some(takeover) = self.incumbent.take().and_then(|incumbent| incumbent.takeover.as_mut()) {
            takeover.machine.abort("the application did not offer anything");
        }
    }
}

/// Some descriptors are to be sent.
///
/// ```
/// use heirloom::{Batch, ItemId};
/// use std::collections::BTreeMap;
/// use std::net::TcpStream;
/// use std::os::fd::AsFd;
///
/// fn lend<A>(batch: Batch<'_, A>, connections: &BTreeMap<ItemId, TcpStream>) {
///     batch.send(|id| connections.get(&id).map(AsFd::as_fd));
/// }
/// ```
pub struct Batch<'i, A> {
    incumbent: &'i mut Incumbent<A>,
    ids: Vec<ItemId>,
}

impl<A> Batch<'_, A> {
    /// Sends them; `descriptor` lends each. `None` means that the item has ended since it was offered; the delta must
    /// then say so.
    pub fn send<'d>(self, mut descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>) {
        let now = Instant::now();
        self.incumbent.send_batch(now, self.ids, &mut descriptor);
        self.incumbent.run_takeover(now);
    }
}

impl<A> Incumbent<A> {
    fn send_batch<'d>(
        &mut self,
        now: Instant,
        ids: Vec<ItemId>,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) {
        let listener = self.listener.as_fd();
        if let Some(takeover) = &mut self.takeover {
            takeover.send_batch(now, ids, &mut |id| {
                if id == ItemId::CONTROL { Some(listener) } else { descriptor(id) }
            });
        }
    }
}

/// The successor is ready, and nothing may be touched until this is released or resumed. Dropping it resumes.
///
/// ```
/// use heirloom::{Bundle, Freeze, HandoverError, Outcome};
///
/// fn release<A>(freeze: Freeze<'_, A>, bundle: &Bundle) -> Result<bool, HandoverError> {
///     Ok(matches!(freeze.release_bundle(bundle)?, Outcome::Taken(_)))
/// }
/// ```
#[must_use = "a frozen incumbent serves nobody: release it or resume"]
pub struct Freeze<'i, A> {
    incumbent: Option<&'i mut Incumbent<A>>,
}

impl<A> Freeze<'_, A> {
    /// The manifest that was offered, to compare with.
    pub fn base(&self) -> Option<&Base> {
        self.offered().map(|(base, _)| base)
    }

    fn offered(&self) -> Option<(&Base, u32)> {
        let offered = self.incumbent.as_ref()?.takeover.as_ref()?.offered.as_ref()?;
        Some((&offered.base, offered.crc))
    }

    /// Releases everything: sends what has changed since the offer, lends the descriptors of added items, and waits
    /// until the successor serves or has failed. Meanwhile the control socket is answered.
    ///
    /// The caller has stopped reading, writing and accepting in all its threads. `delta` says what changed; its
    /// checksum, counts, counters and time are filled in here.
    ///
    /// # Errors
    ///
    /// The delta exceeds a limit or cannot be written, or the incumbent's own descriptors fail. The takeover is
    /// aborted then: serve on.
    pub fn release<'d>(
        mut self,
        delta: Delta,
        mut descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        let Some(incumbent) = self.incumbent.take() else {
            return Err(io::Error::other("released twice").into());
        };
        if let Err(error) = incumbent.seal_delta(delta) {
            let why = format!("the incumbent cannot write its delta: {error}");
            incumbent.finish(Some(&why), &mut |_| None)?;
            return Err(error);
        }
        Ok(incumbent.finish(None, &mut descriptor)?)
    }

    /// Like [`Freeze::release`], with everything as it is now instead of what has changed. Compares item by item: for
    /// programs with few of them.
    ///
    /// # Errors
    ///
    /// See [`Freeze::release`].
    pub fn release_all<'d>(
        self,
        mut now: Base,
        descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        now.items.insert(0, control_entry());
        let delta = match self.offered() {
            Some((base, crc)) => Delta::between(base, crc, &now),
            None => Ok(Delta::default()),
        };
        match delta {
            Ok(delta) => self.release(delta, descriptor),
            Err(error) => {
                self.resume(&format!("the incumbent cannot write its delta: {error}"));
                Err(error.into())
            }
        }
    }

    /// Like [`Freeze::release_all`], for a program that keeps a [`Bundle`].
    ///
    /// # Errors
    ///
    /// See [`Freeze::release`].
    pub fn release_bundle(self, bundle: &Bundle) -> Result<Outcome, HandoverError> {
        self.release_all(bundle.base(ServiceRecord::default()), |id| bundle.descriptor(id))
    }

    /// Does not hand over; the successor is told why. Serve on.
    pub fn resume(mut self, why: &str) {
        if let Some(incumbent) = self.incumbent.take() {
            let _ = incumbent.finish(Some(why), &mut |_| None);
        }
    }
}

impl<A> Drop for Freeze<'_, A> {
    fn drop(&mut self) {
        if let Some(incumbent) = self.incumbent.take() {
            let _ = incumbent.finish(Some("the application resumed"), &mut |_| None);
        }
    }
}

impl<A> Incumbent<A> {
    fn seal_delta(&mut self, mut delta: Delta) -> Result<(), HandoverError> {
        let Some(takeover) = &mut self.takeover else { return Ok(()) };
        let Some(offered) = &takeover.offered else { return Ok(()) };
        delta.base_crc = offered.crc;
        // If the application ends more than there was, the successor finds out and refuses.
        let count = (offered.base.items.len() + delta.added.len()).saturating_sub(delta.ended.len());
        delta.count = count as u64;
        delta.counters = self.record.counters.clone();
        delta.frozen_at_ns = takeover.frozen_at_ns.unwrap_or_else(clock::monotonic_ns);
        let late = delta.added.iter().map(|entry| entry.id).collect();
        let encoded = delta.encode(&self.config.limits)?;
        takeover.bytes += encoded.bytes.len() as u64;
        takeover.delta = Some(seal("delta", &encoded.bytes)?);
        takeover.machine.frozen(Instant::now(), late);
        Ok(())
    }

    /// Drives the takeover to its end. Nothing else happens in the program meanwhile.
    fn finish<'d>(
        &mut self,
        abort: Option<&str>,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> io::Result<Outcome> {
        if let (Some(why), Some(takeover)) = (abort, &mut self.takeover) {
            takeover.machine.abort(why);
        }
        loop {
            let now = Instant::now();
            if let Err(error) = self.process(now) {
                self.withdraw(now, &format!("the incumbent's own event loop fails: {error}"));
                return Err(error);
            }
            if let Some(outcome) = self.ended.take() {
                return Ok(outcome);
            }
            if self.takeover.is_none() {
                return Err(io::Error::other("the takeover has ended before"));
            }
            let want = self.takeover.as_mut().and_then(|takeover| takeover.want.take());
            match want {
                Some(Want::Batch(ids)) => self.send_batch(now, ids, descriptor),
                _ if self.again => {}
                _ => self.wait(self.timer())?,
            }
        }
    }
}

/// A request of the application's own. Each must be answered; dropping it answers with an error.
///
/// ```
/// use heirloom::Asked;
/// use serde::Deserialize;
///
/// #[derive(Deserialize)]
/// enum Mine {
///     Topic,
/// }
///
/// fn answer(mut asked: Asked<'_, Mine>) {
///     match asked.request() {
///         Some(Mine::Topic) => asked.reply(&"cats"),
///         None => asked.refuse("answered already"),
///     }
/// }
/// ```
pub struct Asked<'i, A> {
    incumbent: &'i mut Incumbent<A>,
    connection: ConnectionId,
    request: Option<A>,
    answered: bool,
}

impl<A> Asked<'_, A> {
    /// The request. It is there once.
    pub fn request(&mut self) -> Option<A> {
        self.request.take()
    }

    /// On which connection it came.
    pub fn connection(&self) -> ConnectionId {
        self.connection
    }

    /// Says [`Turn::Closed`] when this connection ends.
    pub fn watch(&mut self) {
        if let Some(connection) = self.incumbent.connections.get_mut(&self.connection) {
            connection.watched = true;
        }
    }

    /// Answers with a value, as one line of JSON.
    pub fn reply(self, value: &impl Serialize) {
        let line = match serde_json::to_value(value) {
            Ok(value) => Reply::Application(value).to_line(),
            Err(error) => failure(FailureCode::Failed, error),
        };
        self.reply_raw(line, Vec::new());
    }

    /// Answers with these bytes and, beside the first of them, these descriptors.
    pub fn reply_raw(mut self, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) {
        self.answered = true;
        self.incumbent.answer_later(self.connection, bytes, descriptors);
    }

    /// Answers with an error.
    pub fn refuse(self, why: &str) {
        self.reply_raw(failure(FailureCode::Failed, why), Vec::new());
    }

    /// Keeps the client waiting for [`Incumbent::answer_later`].
    pub fn defer(mut self) -> ConnectionId {
        self.answered = true;
        self.connection
    }
}

impl<A> Drop for Asked<'_, A> {
    fn drop(&mut self) {
        if !self.answered {
            let line = failure(FailureCode::Failed, "the application gave no answer");
            self.incumbent.answer_later(self.connection, line, Vec::new());
        }
    }
}

impl<A> Incumbent<A> {
    /// Answers a request that was [deferred](Asked::defer), with bytes and, beside the first of them, descriptors.
    /// Returns false if the client has gone.
    pub fn answer_later(&mut self, id: ConnectionId, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        connection.waiting = false;
        connection.send(bytes, descriptors);
        self.replied.push(id);
        true
    }
}

fn control_entry() -> Entry {
    Entry { id: ItemId::CONTROL, name: CONTROL_NAME.into(), kind: Kind::UnixListener, state: Vec::new() }
}

fn failure(code: FailureCode, message: impl ToString) -> Vec<u8> {
    Reply::Error(Failure { code, message: message.to_string() }).to_line()
}

fn failed(error: impl ToString) -> Failure {
    let message = format!("it cannot begin a takeover, and serves on: {}", error.to_string());
    Failure { code: FailureCode::Failed, message }
}
