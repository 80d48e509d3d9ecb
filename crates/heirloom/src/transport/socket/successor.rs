//! The successor's side: a blocking conversation, since a process that does not serve yet has nothing else to do.
//!
//! Each stage is a type, and each can only go on to the next or be dropped, which withdraws: [`Successor`] (admitted)
//! → [`Offered`] (holds every early descriptor; the incumbent still serves) → [`Complete`] (holds everything; the
//! incumbent is frozen) → [`Taken`] (serves). Only the last gives descriptors away; before it they can be looked at
//! and registered with a poller, but a borrowed descriptor must not be read, written or changed: the file description
//! is the incumbent's.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde::de::DeserializeOwned;

use super::arriving::Arriving;
use super::lent::Lent;
use crate::bundle::{Bundle, BundleError};
use crate::busy_poll::BusyPoll;
use crate::channel::{Channel, Incoming, SendError};
use crate::clock;
use crate::config::Config;
use crate::control::path::relisten;
use crate::control::request::Welcome;
use crate::control::status::LastTakeover;
use crate::crash::{self, Point};
use crate::incumbent::{Incumbent, Standby};
use crate::item::{Entry, ItemId};
use crate::lock::{Holding, LockFile};
use crate::manifest::{Changes, Delta, Listing, read_sealed};
use crate::peer::Peer;
use crate::protocol::{
    self, Cause, Reason, Step, SuccessorAction, SuccessorOutcome, ToIncumbent, ToSuccessor, WINDOW,
};
use crate::service::Service;
use crate::store::LEDGER_NAME;

/// How soon a packet that the kernel had no room for is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// How many credits are sent together while packets wait to be received: each time they wake the incumbent.
const TOGETHER: u32 = WINDOW / 2;

/// Why a takeover that was admitted did not happen. The incumbent, if it lives, serves on.
///
/// ```
/// fn explain(error: &heirloom::TakeoverError) -> String {
///     match error {
///         heirloom::TakeoverError::Ended(reason) => format!("rolled back {reason}"),
///         other => other.to_string(),
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// It ended at this step, for this reason.
    #[error("the takeover ended {0}; {left}", left = left(.0))]
    Ended(Reason),
    /// The successor serves in name, but its own descriptors fail: it cannot go on.
    #[error("took over, but cannot serve: {0}; nobody serves now: start again")]
    Serving(#[source] io::Error),
}

/// Who is left after a takeover that ended.
fn left(reason: &Reason) -> &'static str {
    match reason.cause {
        Cause::Exited => "nobody serves now: start again",
        Cause::LockHeld => "the process that holds it serves",
        _ => "the incumbent, if it lives, serves on",
    }
}

/// A successor that was admitted: the incumbent prepares its offer.
///
/// ```
/// use heirloom::{NoRequests, Successor, Taken, TakeoverError};
///
/// fn take_over(successor: Successor) -> Result<Taken<NoRequests>, TakeoverError> {
///     println!("taking over from {}", successor.incumbent());
///     successor.receive()?.ready()?.accept()
/// }
/// ```
#[derive(Debug)]
pub struct Successor {
    takeover: Box<Takeover>,
}

/// What the conversation has brought so far, and the means to go on with it.
#[derive(Debug)]
struct Takeover {
    machine: protocol::Successor,
    channel: Channel,
    channel_closed: bool,
    incumbent: Peer,
    incumbent_exited: bool,
    welcome: Welcome,
    lock: Holding,
    path: PathBuf,
    service: Service,
    config: Config,
    /// Until every early descriptor is there; then they are in the bundle.
    arriving: Option<Arriving>,
    base_crc: u32,
    delta: Option<Delta>,
    changes: Changes,
    frozen_at_ns: u64,
    /// Descriptors of the base that were not checked yet.
    unchecked: Vec<(ItemId, OwnedFd)>,
    /// Descriptors of items that the delta will list.
    late: BTreeMap<ItemId, OwnedFd>,
    /// Items of the base that had ended before they were sent; the delta has to say so.
    missing: Vec<Entry>,
    bundle: Bundle,
    /// From `Ready` on.
    standby: Option<Standby>,
    busy_poll: BusyPoll,
    /// Withheld while there is more to receive.
    credits: u32,
    bytes: u64,
    items: u64,
    started: Instant,
}

/// Where the conversation waits for the application.
enum Stop {
    /// Items of the base have just arrived.
    Arrived,
    Prepare,
    Decide,
    End(SuccessorOutcome),
}

impl Successor {
    pub(crate) fn new(
        channel: Channel,
        incumbent: Peer,
        welcome: Welcome,
        lock: LockFile,
        path: &Path,
        service: Service,
        config: Config,
    ) -> Self {
        let now = Instant::now();
        Successor {
            takeover: Box::new(Takeover {
                machine: protocol::Successor::new(now, config.times),
                channel,
                channel_closed: false,
                incumbent,
                incumbent_exited: false,
                welcome,
                lock: Holding::Free(lock),
                path: path.into(),
                service,
                arriving: None,
                base_crc: 0,
                delta: None,
                changes: Changes::default(),
                frozen_at_ns: 0,
                unchecked: Vec::new(),
                late: BTreeMap::new(),
                missing: Vec::new(),
                bundle: Bundle::new(),
                standby: None,
                busy_poll: BusyPoll::new(config.times.look),
                config,
                credits: 0,
                bytes: 0,
                items: 0,
                started: now,
            }),
        }
    }

    /// The incumbent's process.
    pub fn incumbent(&self) -> &Peer {
        &self.takeover.incumbent
    }

    /// What the incumbent said of itself.
    pub fn welcome(&self) -> &Welcome {
        &self.takeover.welcome
    }

    /// Gives up before anything was received, and tells the incumbent why: the configuration is wrong, for example.
    ///
    /// ```
    /// use heirloom::{Offered, Successor, TakeoverError};
    ///
    /// fn begin(successor: Successor, config: Result<u16, String>) -> Option<Result<Offered, TakeoverError>> {
    ///     match config {
    ///         Ok(_) => Some(successor.receive()),
    ///         Err(wrong) => {
    ///             successor.withdraw(wrong);
    ///             None
    ///         }
    ///     }
    /// }
    /// ```
    pub fn withdraw(self, why: impl ToString) {
        self.takeover.withdraw(&why.to_string());
    }

    /// Waits for the offer: the base manifest, and every descriptor in it.
    ///
    /// # Errors
    ///
    /// The incumbent withdrew, died, or sent what cannot be used.
    pub fn receive(self) -> Result<Offered, TakeoverError> {
        self.receive_each(|_| Ok(()))
    }

    /// As [`Successor::receive`], and lends each descriptor once it has come, the control listener's apart. To register them
    /// with a poller here takes less time than afterwards, for the incumbent sends meanwhile. That a descriptor is of the kind
    /// that its entry says has been checked when this returns, and not before.
    ///
    /// What was lent may still end before the freeze, and is then not in the [`Complete::bundle`].
    ///
    /// # Errors
    ///
    /// As [`Successor::receive`]. An error of `each` withdraws.
    ///
    /// ```
    /// use heirloom::{Offered, Successor, TakeoverError};
    /// use mio::{Interest, Registry, Token};
    ///
    /// fn receive(successor: Successor, registry: &Registry) -> Result<Offered, TakeoverError> {
    ///     successor.receive_each(|item| {
    ///         let token = Token(item.id().0 as usize);
    ///         heirloom::runtime::mio::register(registry, item.descriptor(), token, Interest::READABLE)
    ///     })
    /// }
    /// ```
    pub fn receive_each(
        mut self,
        mut each: impl FnMut(Lent<'_>) -> io::Result<()>,
    ) -> Result<Offered, TakeoverError> {
        loop {
            match self.takeover.run() {
                Stop::Arrived => self.takeover.show_arrived(&mut each),
                Stop::Prepare => return Ok(Offered { takeover: self.takeover }),
                stop => return Err(self.takeover.ended(stop)),
            }
        }
    }
}

/// Everything that travels early has arrived; the incumbent still serves.
///
/// ```
/// use heirloom::{Complete, Offered, TakeoverError};
///
/// fn look(offered: Offered) -> Option<Result<Complete, TakeoverError>> {
///     match offered.bundle().state::<String>() {
///         Ok(_) => Some(offered.ready()),
///         Err(error) => {
///             offered.withdraw(error);
///             None
///         }
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Offered {
    takeover: Box<Takeover>,
}

impl Offered {
    /// What was offered. Its state may change until the freeze. Descriptors may be registered with a poller, and
    /// nothing else: see [`Bundle::descriptor`].
    pub fn bundle(&self) -> &Bundle {
        &self.takeover.bundle
    }

    /// Says that this process could serve at once, and waits for the incumbent to freeze.
    ///
    /// # Errors
    ///
    /// The incumbent withdrew, died, or sent what cannot be used.
    pub fn ready(mut self) -> Result<Complete, TakeoverError> {
        match self.takeover.stand_by() {
            Ok(()) => self.takeover.machine.ready(Instant::now()),
            Err(error) => self.takeover.machine.abort(format_args!("the successor could not serve: {error}")),
        }
        match self.takeover.run() {
            Stop::Decide => Ok(Complete { takeover: self.takeover }),
            stop => Err(self.takeover.ended(stop)),
        }
    }

    /// Gives up, and tells the incumbent why.
    pub fn withdraw(self, why: impl ToString) {
        self.takeover.withdraw(&why.to_string());
    }
}

/// Everything has arrived and was checked; the incumbent is frozen and waits.
///
/// ```
/// use heirloom::{Complete, NoRequests, Taken, TakeoverError};
///
/// fn decide(complete: Complete) -> Result<Taken<NoRequests>, TakeoverError> {
///     println!("{} items", complete.bundle().len());
///     complete.accept()
/// }
/// ```
#[derive(Debug)]
pub struct Complete {
    takeover: Box<Takeover>,
}

impl Complete {
    /// Everything, as it is at the freeze.
    pub fn bundle(&self) -> &Bundle {
        &self.takeover.bundle
    }

    /// What has changed since the offer: what was made of everything else then is still right.
    pub fn changes(&self) -> &Changes {
        &self.takeover.changes
    }

    /// Accepts: takes the service lock when the incumbent has released it, commits, and serves.
    ///
    /// # Errors
    ///
    /// The incumbent resumed, or another process holds the lock.
    pub fn accept<A: DeserializeOwned>(mut self) -> Result<Taken<A>, TakeoverError> {
        self.takeover.machine.accept(Instant::now());
        match self.takeover.run() {
            Stop::End(SuccessorOutcome::Serve) => self.takeover.serve(),
            stop => Err(self.takeover.ended(stop)),
        }
    }

    /// Gives up, and tells the incumbent why.
    pub fn withdraw(self, why: impl ToString) {
        self.takeover.withdraw(&why.to_string());
    }
}

/// The takeover has succeeded: this process serves.
///
/// ```
/// use heirloom::Taken;
/// use std::net::TcpListener;
///
/// fn listener<A>(taken: &mut Taken<A>) -> Result<TcpListener, heirloom::BundleError> {
///     Ok(taken.bundle.take::<TcpListener>("listener")?.descriptor)
/// }
/// ```
#[derive(Debug)]
pub struct Taken<A> {
    /// Everything that was handed over.
    pub bundle: Bundle,
    /// The serving side: the control socket and the service lock are ours.
    pub incumbent: Incumbent<A>,
    /// Who served before.
    pub from: Peer,
    /// From the incumbent's freeze to the commit. Needs both in one time namespace.
    pub pause: Duration,
}

impl Takeover {
    /// Drives the conversation until it waits for the application or has ended.
    fn run(&mut self) -> Stop {
        loop {
            // First of all: the machine counts as arrived what the application has not seen yet.
            if !self.unchecked.is_empty() {
                return Stop::Arrived;
            }
            let now = Instant::now();
            while let Some(action) = self.machine.poll() {
                match action {
                    SuccessorAction::Send(ToIncumbent::Credit) => {
                        self.credits += 1;
                        if self.credits == TOGETHER {
                            self.send_credits();
                        }
                    }
                    SuccessorAction::Send(message) => {
                        self.send_credits();
                        self.send(&message);
                    }
                    SuccessorAction::Prepare => match self.check_offer() {
                        Ok(()) => {
                            crash::reach(Point::OfferChecked);
                            return Stop::Prepare;
                        }
                        Err(error) => self.machine.abort(error),
                    },
                    SuccessorAction::Decide => match self.check_everything() {
                        Ok(()) => {
                            crash::reach(Point::AllChecked);
                            return Stop::Decide;
                        }
                        Err(error) => self.machine.abort(error),
                    },
                    SuccessorAction::Lock => {
                        if self.lock.try_take() {
                            crash::reach(Point::LockTaken);
                            self.machine.locked();
                        } else {
                            self.machine.lock_held(now);
                        }
                    }
                    SuccessorAction::Commit => self.commit(),
                    SuccessorAction::Unlock => self.lock.release(),
                    SuccessorAction::End(outcome) => return Stop::End(outcome),
                }
            }
            if let Err(error) = self.wait() {
                self.machine.abort(format_args!("cannot wait for the incumbent: {error}"));
            }
            self.machine.handle_timeout(Instant::now());
        }
    }

    /// Waits for a packet, the incumbent's exit, or the machine's deadline, and feeds it what has come.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = match self.machine.deadline() {
            // Only a look: what is withheld is sent before there is any waiting.
            _ if self.credits > 0 => Some(Duration::ZERO),
            deadline => deadline.map(|at| at.saturating_duration_since(Instant::now())),
        };
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        let mut fds = Vec::with_capacity(2);
        if !self.channel_closed {
            fds.push(PollFd::new(&self.channel, PollFlags::IN));
        }
        let watched = self.incumbent.pidfd().filter(|_| !self.incumbent_exited);
        if let Some(pidfd) = &watched {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        match self.busy_poll.wait(timeout.as_ref(), |timeout| poll(&mut fds, timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let exited = watched.is_some() && fds.last().is_some_and(|fd| !fd.revents().is_empty());
        let arrived = !self.channel_closed && fds.first().is_some_and(|fd| !fd.revents().is_empty());
        if exited {
            // In this order: what an exited process has sent is all in the channel by now.
            self.receive_all();
            self.incumbent_exited = true;
            self.machine.handle_exited(Instant::now());
        } else if arrived {
            // One a wake-up: the poll tells of the next.
            self.receive();
        } else {
            self.send_credits();
        }
        Ok(())
    }

    fn receive_all(&mut self) {
        while self.receive() {}
    }

    /// Feeds the next packet to the machine, if there is one; whether there may be more.
    fn receive(&mut self) -> bool {
        if self.channel_closed {
            return false;
        }
        let now = Instant::now();
        match self.channel.receive() {
            Ok(Incoming::Empty) => false,
            Ok(Incoming::Packet { bytes, descriptors }) => {
                let result = ToSuccessor::from_packet(&bytes, descriptors.len())
                    .map_err(|error| error.to_string())
                    .and_then(|message| self.keep(&message, descriptors).map(|()| message));
                result.iter().for_each(read);
                match result {
                    Ok(message) => self.machine.handle(now, message),
                    Err(what) => self.machine.handle_nonsense(what),
                }
                !matches!(self.machine.outcome(), Some(SuccessorOutcome::Failed(_)))
            }
            Ok(Incoming::Closed) => {
                self.channel_closed = true;
                self.machine.handle_closed(now);
                false
            }
            Err(error) => {
                self.machine.abort(format_args!("cannot receive: {error}"));
                false
            }
        }
    }

    /// Keeps what came beside a message.
    fn keep(&mut self, message: &ToSuccessor, mut descriptors: Vec<OwnedFd>) -> Result<(), String> {
        match message {
            ToSuccessor::Offer => {
                let bytes = self.read(descriptors.pop(), "the base manifest")?;
                let listing = Listing::read(bytes, &self.config.limits).map_err(|e| e.to_string())?;
                listing.rest().check_sections(&[]).map_err(|e| e.to_string())?;
                self.base_crc = listing.crc();
                self.arriving = Some(Arriving::new(listing));
            }
            ToSuccessor::Batch { ids } => {
                self.items += ids.len() as u64;
                let mut arrived = ids.iter().copied().zip(descriptors);
                if self.arriving.is_some() {
                    self.unchecked.extend(arrived);
                } else {
                    arrived.try_for_each(|(id, descriptor)| self.keep_late(id, descriptor))?;
                }
            }
            ToSuccessor::Freeze => {
                let bytes = self.read(descriptors.pop(), "the delta")?;
                let delta = Delta::decode(&bytes, &self.config.limits).map_err(|e| e.to_string())?;
                self.delta = Some(delta);
            }
            ToSuccessor::Offered | ToSuccessor::Released | ToSuccessor::Abort { .. } => {}
        }
        Ok(())
    }

    fn keep_late(&mut self, id: ItemId, descriptor: OwnedFd) -> Result<(), String> {
        if self.late.insert(id, descriptor).is_some() {
            return Err(format!("item {id} was sent twice"));
        }
        if self.late.len() > self.config.limits.items {
            return Err(format!("more than {} items", self.config.limits.items));
        }
        Ok(())
    }

    /// Lends the descriptors of the base that have just arrived.
    fn show_arrived(&mut self, each: &mut impl FnMut(Lent<'_>) -> io::Result<()>) {
        let Some(arriving) = &mut self.arriving else { return };
        for (id, descriptor) in self.unchecked.drain(..) {
            if let Err(what) = arriving.take_in(id, descriptor, each) {
                return self.machine.abort(what);
            }
        }
    }

    fn read(&mut self, memfd: Option<OwnedFd>, what: &str) -> Result<Vec<u8>, String> {
        let memfd = memfd.ok_or_else(|| format!("{what} did not come"))?;
        let bytes = read_sealed(&memfd, self.config.limits.manifest_bytes)
            .map_err(|error| format!("{what}: {error}"))?;
        self.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Puts base manifest and descriptors together, and checks them.
    fn check_offer(&mut self) -> Result<(), String> {
        let arriving = self.arriving.take().ok_or("the base manifest did not come")?;
        (self.bundle, self.missing) = arriving.finish().map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Gets ready to serve, ahead of the freeze. The listener is the incumbent's until the commit: it is only watched.
    fn stand_by(&mut self) -> io::Result<()> {
        let listener = self.bundle.descriptor(ItemId::CONTROL);
        let listener = listener.ok_or_else(|| io::Error::other("the control listener did not come"))?;
        self.standby = Some(Standby::new(listener, &self.path, self.service.clone(), self.config.clone())?);
        self.busy_poll.check_load();
        Ok(())
    }

    /// Brings the bundle up to date: each item has its descriptor, and nothing else has come.
    fn check_everything(&mut self) -> Result<(), BundleError> {
        let mut delta = self.delta.take().unwrap_or_default();
        delta.check_sections(&[])?;
        for entry in self.missing.drain(..) {
            match delta.ended.binary_search(&entry.id) {
                Ok(at) => drop(delta.ended.remove(at)),
                Err(_) => return Err(BundleError::NoDescriptor { item: entry.to_string() }),
            }
        }
        self.frozen_at_ns = delta.frozen_at_ns;
        self.changes = Changes::of(&delta);
        self.bundle.apply(delta, self.base_crc, std::mem::take(&mut self.late))
    }

    /// Sends what was withheld.
    fn send_credits(&mut self) {
        for _ in 0..std::mem::take(&mut self.credits) {
            self.send(&ToIncumbent::Credit);
        }
    }

    fn send(&mut self, message: &ToIncumbent) {
        match self.send_patiently(message) {
            Ok(()) => sent(message),
            Err(SendError::Closed) => {
                self.receive_all();
                self.machine.handle_closed(Instant::now());
            }
            Err(error) => self.machine.abort(format_args!("cannot send to the incumbent: {error}")),
        }
    }

    fn commit(&mut self) {
        crash::reach(Point::Committing);
        match self.send_patiently(&ToIncumbent::Taken) {
            Ok(()) => {
                crash::reach(Point::TakenSent);
                self.machine.committed();
            }
            Err(SendError::Closed) => self.machine.refused(Instant::now()),
            Err(error) => {
                self.machine.abort(format_args!("cannot commit: {error}"));
            }
        }
    }

    /// Sends a packet. The queue has room for all that this side ever sends; a kernel short of memory is waited out.
    fn send_patiently(&mut self, message: &ToIncumbent) -> Result<(), SendError> {
        let packet = message.to_packet();
        let give_up = Instant::now() + self.config.times.released;
        loop {
            match self.channel.send(&packet, &[]) {
                Err(SendError::Full) if Instant::now() < give_up => std::thread::sleep(RETRY),
                other => return other,
            }
        }
    }

    fn withdraw(mut self: Box<Self>, why: &str) {
        self.machine.abort(why);
        let stop = self.run();
        self.ended(stop);
    }

    /// Closes what was received, knowingly, and says why.
    fn ended(mut self: Box<Self>, stop: Stop) -> TakeoverError {
        let _ = std::mem::take(&mut self.bundle).close_rest();
        match stop {
            Stop::End(SuccessorOutcome::Failed(reason)) => TakeoverError::Ended(reason),
            _ => TakeoverError::Ended(Reason {
                step: Step::Offer,
                cause: Cause::Local("the incumbent skipped a step".into()),
            }),
        }
    }

    fn serve<A: DeserializeOwned>(mut self: Box<Self>) -> Result<Taken<A>, TakeoverError> {
        let now_ns = clock::monotonic_ns();
        // An incumbent that does not say when it froze leaves it at 0.
        let frozen_at_ns = if self.frozen_at_ns == 0 { now_ns } else { self.frozen_at_ns };
        let pause = Duration::from_nanos(now_ns.saturating_sub(frozen_at_ns));
        let mut bundle = std::mem::take(&mut self.bundle);
        let listener = bundle.take_id::<UnixListener>(ItemId::CONTROL);
        let listener = listener.map_err(|error| TakeoverError::Serving(io::Error::other(error)))?.descriptor;
        if self.welcome.outsider {
            // It tells of what another's supervisor holds.
            drop(bundle.take_all::<OwnedFd>(LEDGER_NAME));
        }
        // From now on those who connect are to see our credentials, not our ancestor's.
        relisten(&listener).map_err(TakeoverError::Serving)?;
        let Holding::Held(lock) = std::mem::replace(&mut self.lock, Holding::Moving) else {
            return Err(TakeoverError::Serving(io::Error::other("the service lock is not held")));
        };
        let record = bundle.service().succeeded();
        let last = LastTakeover {
            outcome: "taken".into(),
            reason: None,
            peer_pid: self.incumbent.pid,
            items: self.items,
            bytes: self.bytes,
            pause_us: Some(pause.as_micros() as u64),
            total_us: self.started.elapsed().as_micros() as u64,
            at_unix_ms: clock::unix_ms(),
        };
        let standby = self.standby.take();
        let standby =
            standby.ok_or_else(|| TakeoverError::Serving(io::Error::other("it was never ready")))?;
        let incumbent = standby.serve(listener, lock, record, Some(last)).map_err(TakeoverError::Serving)?;
        crash::reach(Point::Serving);
        Ok(Taken { bundle, incumbent, from: self.incumbent, pause })
    }
}

/// The points that lie behind the reading of a message.
fn read(message: &ToSuccessor) {
    match message {
        ToSuccessor::Offer => crash::reach(Point::BaseRead),
        ToSuccessor::Batch { .. } => crash::reach(Point::BatchRead),
        ToSuccessor::Freeze => crash::reach(Point::FreezeRead),
        ToSuccessor::Released => crash::reach(Point::ReleasedRead),
        ToSuccessor::Offered | ToSuccessor::Abort { .. } => {}
    }
}

/// The points that lie behind the sending of a message.
fn sent(message: &ToIncumbent) {
    match message {
        ToIncumbent::Ready => crash::reach(Point::ReadySent),
        ToIncumbent::Accept => crash::reach(Point::AcceptSent),
        ToIncumbent::Credit | ToIncumbent::Taken | ToIncumbent::Abort { .. } => {}
    }
}
