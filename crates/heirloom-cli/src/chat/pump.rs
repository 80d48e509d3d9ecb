//! The pump: moves the server's bytes to stdout and stdin's bytes to the server, a bounded amount a turn.
//!
//! Between two turns nothing is touched. Then the pump can be written down ([`Pump::state`]) and, with a duplicate of
//! the socket, go on in another process ([`Pump::resume`]): every byte is moved exactly once, by one of the two,
//! as long as only one of them takes turns.
//!
//! What holds:
//! - Bytes leave in the order in which they came. What the server sent before it closed the connection is written out;
//!   what was not sent yet goes to the next connection.
//! - Nothing is read that there is no room for, so that a slow reader slows down the sender.
//! - Stdin's end is not the end: the server's bytes go on, and its connection is not shut down.
//! - The socket's flags are left alone, since its open file description is shared with the other process.
//! - A turn that has nothing to do sleeps.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{fmt, mem};

use heirloom::ItemId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::bytes;
use super::conduit::Conduit;
use super::connect::{Attempt, Progress};
use super::queue::Queue;
use super::reconnect::{GaveUp, Reconnect};
use super::stdio::{Input, Intake, Output, WriteError};

/// The most bytes that wait for stdout.
const FROM_SERVER: usize = 256 * 1024;
/// The most bytes that wait for the server.
const FROM_STDIN: usize = 64 * 1024;
/// The most bytes that a turn reads from, or sends to, one descriptor.
const STEP: usize = 64 * 1024;
/// What every socket takes at once that polls writable.
const SMALL_STEP: usize = 4096;
/// How long stdout is left alone when it polled writable but took nothing. A terminal does that when it has room for
/// one byte and the next is a newline, which it writes as two.
const STDOUT_PAUSE: Duration = Duration::from_millis(10);

/// What a pump works on.
pub(crate) struct Config {
    /// The server's addresses, tried in order.
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) input: Input,
    pub(crate) output: Output,
    /// Where bytes are on their way; without them in memory.
    pub(crate) pipes: Option<Pipes>,
}

/// The two ways in the kernel, for a service whose descriptors a store holds: then no byte is lost with the process.
pub(crate) struct Pipes {
    pub(crate) from_server: Conduit,
    pub(crate) from_stdin: Conduit,
}

impl Pipes {
    /// With these ends of readers and writers, and what is in between; new ones where there are none.
    pub(crate) fn new(
        from_server: Option<(OwnedFd, OwnedFd)>,
        from_stdin: Option<(OwnedFd, OwnedFd)>,
    ) -> io::Result<Self> {
        let conduit = |ends: Option<(OwnedFd, OwnedFd)>, limit| match ends {
            Some((reader, writer)) => Conduit::adopt(reader, writer, limit),
            None => Conduit::new(limit),
        };
        Ok(Self {
            from_server: conduit(from_server, FROM_SERVER)?,
            from_stdin: conduit(from_stdin, FROM_STDIN)?,
        })
    }
}

/// What a pump is made of besides descriptors: all that another process needs to go on. A field that is missing in an
/// older state has its value of a new pump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PumpState {
    /// The server's bytes that are not on stdout yet.
    #[serde(with = "bytes")]
    pub(crate) unwritten: Vec<u8>,
    /// Stdin's bytes that the server has not been sent yet.
    #[serde(with = "bytes")]
    pub(crate) unsent: Vec<u8>,
    /// Whether stdin may have more.
    pub(crate) stdin_open: bool,
    /// Bytes received from the server so far, over all connections.
    pub(crate) bytes_in: u64,
    /// Bytes sent to the server so far, over all connections.
    pub(crate) bytes_out: u64,
    /// Which connection this is: 0 before the first, then one more each time.
    pub(crate) connection_id: u64,
    pub(crate) reconnect: Reconnect,
    /// What a store holds of the streams that are this process's own: another one has others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) streams: Vec<ItemId>,
}

/// What a turn found.
#[derive(Debug)]
pub(crate) struct Turn {
    /// What the poll reported for each of the caller's own descriptors, in the same order.
    pub(crate) extra: Vec<PollFlags>,
}

/// Why a pump cannot go on.
#[derive(Debug)]
pub(crate) enum PumpError {
    /// Nobody reads stdout any more; so many of the server's bytes could not be written.
    StdoutClosed { unwritten: usize },
    /// Stdout failed, such as for a full disk. The bytes are still there: a further turn tries again.
    Stdout { unwritten: usize, source: io::Error },
    /// The server cannot be reached. All that it sent before is written out.
    GaveUp(GaveUp),
    /// The system could not poll.
    Poll(io::Error),
}

pub(crate) struct Pump {
    addresses: Vec<SocketAddr>,
    input: Input,
    output: Output,
    link: Link,
    from_server: Queue,
    from_stdin: Queue,
    stdin_open: bool,
    reading: bool,
    bytes_in: u64,
    bytes_out: u64,
    connection_id: u64,
    reconnect: Reconnect,
    stdout_paused_until: Option<Instant>,
    scratch: Box<[u8]>,
}

/// The way to the server.
enum Link {
    Waiting {
        until: Instant,
    },
    Connecting(Attempt),
    Connected {
        socket: TcpStream,
        /// Why sending failed, if it did: what the server sent before is still to be read.
        broken: Option<io::Error>,
        /// Whether it may be touched: with queues in the kernel, not before somebody else holds it too.
        held: bool,
    },
    GaveUp(GaveUp),
}

/// What the poll reported: nothing for what was not polled.
struct Ready {
    stdout: PollFlags,
    stdin: PollFlags,
    link: PollFlags,
    extra: Vec<PollFlags>,
}

impl Pump {
    /// A pump that goes on where another one was when it gave its `state`. `socket` is its connection, if it had one.
    /// Touches no descriptor before the first turn.
    pub(crate) fn resume(config: Config, state: PumpState, socket: Option<TcpStream>) -> Self {
        let now = Instant::now();
        let mut reconnect = state.reconnect;
        let (from_server, from_stdin) = match config.pipes {
            Some(pipes) => (Some(pipes.from_server), Some(pipes.from_stdin)),
            None => (None, None),
        };
        let from_server = Queue::new(from_server, state.unwritten, FROM_SERVER);
        let link = match socket {
            Some(socket) => {
                reconnect.connected(now);
                Link::Connected { socket, broken: None, held: from_server.is_in_memory() }
            }
            None => Link::Waiting { until: now + reconnect.delay() },
        };
        Self {
            addresses: config.addresses,
            input: config.input,
            output: config.output,
            link,
            from_server,
            from_stdin: Queue::new(from_stdin, state.unsent, FROM_STDIN),
            stdin_open: state.stdin_open,
            reading: true,
            bytes_in: state.bytes_in,
            bytes_out: state.bytes_out,
            connection_id: state.connection_id,
            reconnect,
            stdout_paused_until: None,
            scratch: vec![0; STEP].into(),
        }
    }

    /// All that another process needs to go on from here, but for the [`socket`](Pump::socket) and the
    /// [`conduits`](Pump::conduits), and what they hold. An attempt to connect that has not ended does not travel: the other
    /// process makes its own.
    pub(crate) fn state(&self) -> PumpState {
        PumpState {
            unwritten: self.from_server.to_vec(),
            unsent: self.from_stdin.to_vec(),
            stdin_open: self.stdin_open,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            connection_id: self.connection_id,
            reconnect: self.reconnect.clone(),
            streams: Vec::new(),
        }
    }

    /// The connection to the server, if there is one. It is another one when [`connection_id`](Pump::connection_id) is.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Connected { socket, .. } => Some(socket.as_fd()),
            _ => None,
        }
    }

    /// The queues from the server and from stdin, if they are in the kernel.
    pub(crate) fn conduits(&self) -> Option<(&Conduit, &Conduit)> {
        Some((self.from_server.conduit()?, self.from_stdin.conduit()?))
    }

    /// Whether stdin may have more.
    pub(crate) fn reads_on(&self) -> bool {
        self.stdin_open
    }

    pub(crate) fn input(&self) -> &Input {
        &self.input
    }

    pub(crate) fn output(&self) -> &Output {
        &self.output
    }

    /// Lets it use the connection that there is: somebody else holds it too.
    pub(crate) fn connection_is_held(&mut self) {
        if let Link::Connected { held, .. } = &mut self.link {
            *held = true;
        }
    }

    /// Which connection this is, or was the last: 0 before the first, then one more each time.
    pub(crate) fn connection_id(&self) -> u64 {
        self.connection_id
    }

    /// Bytes received from the server so far, over all connections and processes.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    /// Bytes sent to the server so far, over all connections and processes.
    pub(crate) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// How many of the server's bytes are not on stdout yet.
    pub(crate) fn unwritten(&self) -> usize {
        self.from_server.len()
    }

    /// How many of stdin's bytes the server has not been sent yet.
    pub(crate) fn unsent(&self) -> usize {
        self.from_stdin.len()
    }

    /// Whether there is nothing left to write or to send.
    pub(crate) fn flushed(&self) -> bool {
        self.from_server.is_empty() && self.from_stdin.is_empty()
    }

    /// Without reading, turns take in nothing more, neither from the server nor from stdin; they write and send what is
    /// there. That may take for ever (a reader that sleeps, a server that has gone): wait for
    /// [`flushed`](Pump::flushed) with a deadline.
    pub(crate) fn set_reading(&mut self, reading: bool) {
        self.reading = reading;
    }

    /// Waits until there is something to do, one of the caller's descriptors (`extra`) is ready, or it is `deadline`;
    /// then moves what can be moved without blocking, at most 64 KiB each way. A signal ends the wait as well.
    pub(crate) fn turn(
        &mut self,
        extra: &[PollFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<Turn, PumpError> {
        let now = Instant::now();
        self.connect_when_due(now);
        if let Link::GaveUp(error) = &self.link
            && self.from_server.is_empty()
        {
            return Err(PumpError::GaveUp(error.clone()));
        }
        let ready = self.wait(extra, deadline, now)?;
        let now = Instant::now();
        self.write_stdout(ready.stdout, now)?;
        self.work_link(ready.link, now);
        self.read_stdin(ready.stdin);
        Ok(Turn { extra: ready.extra })
    }

    /// Polls everything that could be worked on right now, and nothing else: a hang-up is reported whether or not it
    /// was asked for, and would keep a poll from sleeping.
    fn wait(
        &self,
        extra: &[PollFd<'_>],
        deadline: Option<Instant>,
        now: Instant,
    ) -> Result<Ready, PumpError> {
        let paused_until = self.stdout_paused_until.filter(|until| now < *until);
        let stdout_events = match paused_until {
            None if !self.from_server.is_empty() => PollFlags::OUT,
            // Still reports when its reader goes.
            _ => PollFlags::empty(),
        };
        let mut fds = Vec::with_capacity(3 + extra.len());
        fds.push(PollFd::from_borrowed_fd(self.output.fd(), stdout_events));
        let stdin = self.reads_stdin().then(|| {
            fds.push(PollFd::from_borrowed_fd(self.input.fd(), PollFlags::IN));
            fds.len() - 1
        });
        let link = self.link_interest().map(|(fd, events)| {
            fds.push(PollFd::from_borrowed_fd(fd, events));
            fds.len() - 1
        });
        let first_extra = fds.len();
        fds.extend_from_slice(extra);

        let wake = [deadline, paused_until, self.link_deadline()];
        let timeout = wake.into_iter().flatten().min().map(|at| {
            // A time too far away for the system is as good as for ever.
            Timespec::try_from(at.saturating_duration_since(now))
                .unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 })
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            // What poll found before the signal is not known: nothing is ready.
            Err(Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
            Err(error) => return Err(PumpError::Poll(error.into())),
        }
        let reported = |index: Option<usize>| index.map_or(PollFlags::empty(), |index| fds[index].revents());
        Ok(Ready {
            stdout: reported(Some(0)),
            stdin: reported(stdin),
            link: reported(link),
            extra: fds[first_extra..].iter().map(PollFd::revents).collect(),
        })
    }

    fn reads_stdin(&self) -> bool {
        self.reading && self.stdin_open && self.from_stdin.has_room()
    }

    fn reads_socket(&self) -> bool {
        self.reading && self.from_server.has_room()
    }

    /// The link's descriptor and what to poll it for, if anything can be done with it.
    fn link_interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.link {
            Link::Connecting(attempt) => Some((attempt.fd(), PollFlags::OUT)),
            Link::Connected { held: false, .. } => None,
            Link::Connected { socket, broken, held: true } => {
                let mut events = PollFlags::empty();
                events.set(PollFlags::IN, self.reads_socket());
                events.set(PollFlags::OUT, broken.is_none() && !self.from_stdin.is_empty());
                (!events.is_empty()).then(|| (socket.as_fd(), events))
            }
            Link::Waiting { .. } | Link::GaveUp(_) => None,
        }
    }

    /// When the link has something to do though no descriptor is ready.
    fn link_deadline(&self) -> Option<Instant> {
        match &self.link {
            Link::Waiting { until } => Some(*until),
            Link::Connecting(attempt) => Some(attempt.deadline()),
            Link::Connected { .. } | Link::GaveUp(_) => None,
        }
    }

    fn write_stdout(&mut self, ready: PollFlags, now: Instant) -> Result<(), PumpError> {
        let unwritten = self.from_server.len();
        if Output::is_closed(ready) {
            return Err(PumpError::StdoutClosed { unwritten });
        }
        if !ready.contains(PollFlags::OUT) {
            return Ok(());
        }
        let written = match &mut self.from_server {
            Queue::Memory(buffer) => {
                self.output.write(buffer.front()).inspect(|count| buffer.consume(*count))
            }
            Queue::Kernel(conduit) => self.output.splice(conduit),
        };
        let count = written.map_err(|error| match error {
            WriteError::Closed => PumpError::StdoutClosed { unwritten },
            WriteError::Failed(source) => PumpError::Stdout { unwritten, source },
        })?;
        self.stdout_paused_until = (count == 0).then(|| now + STDOUT_PAUSE);
        Ok(())
    }

    fn read_stdin(&mut self, ready: PollFlags) {
        if ready.is_empty() {
            return;
        }
        let intake = match &mut self.from_stdin {
            Queue::Memory(buffer) => {
                let room = buffer.space().min(STEP);
                let intake = self.input.read(ready, &mut self.scratch[..room]);
                if let Intake::Bytes(count) = intake {
                    buffer.push(&self.scratch[..count]);
                }
                intake
            }
            Queue::Kernel(conduit) => self.input.splice(ready, conduit),
        };
        match intake {
            Intake::Bytes(_) | Intake::NotNow => {}
            Intake::Ended(cause) => {
                self.stdin_open = false;
                match cause {
                    None => debug!("stdin has ended; the server's bytes go on"),
                    Some(error) => warn!("cannot read stdin: {error}; the server's bytes go on without it"),
                }
            }
        }
    }

    /// Makes it a connection if an attempt to connect has succeeded that no turn has looked at: it travels then.
    pub(crate) fn look_at_attempt(&mut self) {
        let Link::Connecting(attempt) = &self.link else { return };
        let mut fds = [PollFd::from_borrowed_fd(attempt.fd(), PollFlags::OUT)];
        if poll(&mut fds, Some(&Timespec::default())) == Ok(1) {
            let ready = fds[0].revents();
            self.work_link(ready, Instant::now());
        }
    }

    fn connect_when_due(&mut self, now: Instant) {
        if matches!(&self.link, Link::Waiting { until } if *until <= now) {
            let progress = Attempt::start(&self.addresses, now);
            self.progress(progress, now);
        }
    }

    fn work_link(&mut self, ready: PollFlags, now: Instant) {
        match mem::replace(&mut self.link, Link::Waiting { until: now }) {
            Link::Connecting(attempt) => self.progress(attempt.check(!ready.is_empty(), now), now),
            Link::Connected { socket, mut broken, held } if !ready.is_empty() => {
                match self.exchange(&socket, &mut broken, ready) {
                    None => self.link = Link::Connected { socket, broken, held },
                    Some(cause) => self.lost(&format!("connection lost: {cause}"), now),
                }
            }
            link => self.link = link,
        }
    }

    fn progress(&mut self, progress: Progress, now: Instant) {
        match progress {
            Progress::Pending(attempt) => self.link = Link::Connecting(attempt),
            Progress::Connected(socket) => {
                match socket.peer_addr() {
                    Ok(address) => info!("connected to {address}"),
                    Err(_) => info!("connected"),
                }
                self.connection_id = self.connection_id.saturating_add(1);
                self.reconnect.connected(now);
                self.link = Link::Connected { socket, broken: None, held: self.from_server.is_in_memory() };
            }
            Progress::Failed(cause) => self.lost(&format!("cannot connect to {cause}"), now),
        }
    }

    fn lost(&mut self, cause: &str, now: Instant) {
        self.link = match self.reconnect.failed(cause, now) {
            Ok(delay) => {
                info!("{cause}; connecting again in {} ms", delay.as_millis());
                Link::Waiting { until: now + delay }
            }
            Err(gave_up) => Link::GaveUp(gave_up),
        };
    }

    /// Reads and sends once each. Returns why the connection has ended, if it has: not before all is read that the
    /// server sent.
    fn exchange(
        &mut self,
        socket: &TcpStream,
        broken: &mut Option<io::Error>,
        ready: PollFlags,
    ) -> Option<String> {
        let failed = ready.intersects(PollFlags::ERR | PollFlags::HUP);
        if self.reads_socket() && (failed || ready.contains(PollFlags::IN)) {
            match self.receive(socket) {
                Ok(0) => {
                    return Some(match broken {
                        Some(error) => error.to_string(),
                        None => "the server closed it".to_owned(),
                    });
                }
                Ok(count) => {
                    self.bytes_in = self.bytes_in.saturating_add(count as u64);
                    self.reconnect.delivered();
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Some(error.to_string()),
            }
        }
        let sends = broken.is_none() && !self.from_stdin.is_empty();
        if sends && (failed || ready.contains(PollFlags::OUT)) {
            match self.send(socket) {
                Ok(count) => self.bytes_out = self.bytes_out.saturating_add(count as u64),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => *broken = Some(error.into()),
            }
        }
        None
    }

    fn receive(&mut self, socket: &TcpStream) -> Result<usize, Errno> {
        match &mut self.from_server {
            Queue::Memory(buffer) => {
                let room = buffer.space().min(STEP);
                let (_, count) = recv(socket, &mut self.scratch[..room], RecvFlags::DONTWAIT)?;
                buffer.push(&self.scratch[..count]);
                Ok(count)
            }
            Queue::Kernel(conduit) => conduit.fill(socket),
        }
    }

    fn send(&mut self, socket: &TcpStream) -> Result<usize, Errno> {
        match &mut self.from_stdin {
            Queue::Memory(buffer) => {
                let bytes = buffer.front();
                let bytes = &bytes[..bytes.len().min(STEP)];
                let count = send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
                buffer.consume(count);
                Ok(count)
            }
            // One that is blocking (an older program may have made it) blocks when more is sent than has room.
            Queue::Kernel(conduit) => conduit.drain(
                socket,
                if fcntl_getfl(socket)?.contains(OFlags::NONBLOCK) { STEP } else { SMALL_STEP },
            ),
        }
    }
}

impl Default for PumpState {
    /// The state of a new pump.
    fn default() -> Self {
        Self {
            unwritten: Vec::new(),
            unsent: Vec::new(),
            stdin_open: true,
            bytes_in: 0,
            bytes_out: 0,
            connection_id: 0,
            reconnect: Reconnect::default(),
            streams: Vec::new(),
        }
    }
}

impl fmt::Display for PumpError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StdoutClosed { unwritten } => write!(
                formatter,
                "nobody reads stdout any more; {unwritten} bytes of the server could not be written"
            ),
            Self::Stdout { unwritten, source } => write!(
                formatter,
                "cannot write to stdout: {source}; {unwritten} bytes of the server could not be written"
            ),
            Self::GaveUp(gave_up) => gave_up.fmt(formatter),
            Self::Poll(error) => write!(formatter, "cannot wait for input or output: poll: {error}"),
        }
    }
}

// The messages contain their causes, so that there is no source to be printed a second time.
impl std::error::Error for PumpError {}

#[cfg(test)]
mod tests;
