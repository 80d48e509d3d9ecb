//! A client of the control socket that waits for its answers.
//!
//! Descriptors may come with any byte of a stream, and a plain read would close them. So everything is
//! received together with its descriptors, which are kept in the order in which they came.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use super::line::{LineReader, MAX_REPLY, TooLong};
use super::path::{PathError, address, stream_socket};
use super::request::{Reply, Request, RequestError};
use crate::descriptors::{PER_MESSAGE, Wait, receive_with, send_with};

/// How long an operation may take unless [`Client::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a full backlog is tried again: `connect(2)` of a UNIX socket cannot be polled for.
const CONNECT_EVERY: Duration = Duration::from_millis(5);

/// Bytes asked for in one receive.
const CHUNK: usize = 16 * 1024;

/// A connection to an incumbent's control socket.
///
/// Every operation ends within the timeout. After an error other than [`ClientError::Reply`] the
/// connection is of no further use.
///
/// ```no_run
/// use heirloom::control::{Client, NoRequests, Reply, Request};
///
/// let mut client = Client::connect("/run/heirloom/chat.sock")?;
/// if let Reply::Status(status) = client.request(&Request::<NoRequests>::Status)? {
///     println!("{} items", status.items.len());
/// }
/// # Ok::<(), heirloom::control::ClientError>(())
/// ```
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    path: PathBuf,
    timeout: Duration,
    lines: LineReader,
    descriptors: Vec<OwnedFd>,
}

/// Why there is no answer.
///
/// ```
/// use heirloom::control::{Client, ClientError};
///
/// let nowhere = std::env::temp_dir().join("no such socket");
/// assert!(matches!(Client::connect(nowhere), Err(ClientError::Nobody { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens there.
    #[error("nobody serves at {}: {why}; start the program there first, or say where it is (--control, --name)", path.display())]
    Nobody {
        /// The control socket.
        path: PathBuf,
        /// Whether there is no socket, or a stale one.
        why: &'static str,
    },
    /// We may not connect.
    #[error(
        "no permission to connect to {}: run it as the user who owns the socket, or as root",
        path.display()
    )]
    Permission {
        /// The control socket.
        path: PathBuf,
    },
    /// The path cannot be a socket's.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The other side takes too long.
    #[error(
        "no answer from {} within {timeout:?}: the process there may be stopped or very busy",
        path.display()
    )]
    Timeout {
        /// The control socket.
        path: PathBuf,
        /// How long we waited.
        timeout: Duration,
    },
    /// The connection ended before the answer.
    #[error("{} closed the connection without an answer: the process there has ended, or failed; look at its log", path.display())]
    Closed {
        /// The control socket.
        path: PathBuf,
    },
    /// Descriptors of the answer could not be received, or there were far too many.
    #[error(
        "descriptors sent by {} are lost: no room for them under the limit on open files (`ulimit \
         -n`), or more than {PER_MESSAGE} with one line",
        path.display()
    )]
    Descriptors {
        /// The control socket.
        path: PathBuf,
    },
    /// The answer never ends.
    #[error("the answer of {} cannot be read: {source}; is it the control socket of such a program?", path.display())]
    TooLong {
        /// The control socket.
        path: PathBuf,
        /// The limit.
        source: TooLong,
    },
    /// The answer is no reply.
    #[error("the answer of {} cannot be understood: {source}; is it the control socket of such a program?", path.display())]
    Reply {
        /// The control socket.
        path: PathBuf,
        /// What is wrong with it.
        source: RequestError,
    },
    /// The request cannot be written as JSON.
    #[error("the request cannot be written: {0}")]
    Request(#[source] serde_json::Error),
    /// Another error of the system.
    #[error("cannot talk to {}: {source}", path.display())]
    Io {
        /// The control socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Client {
    /// Connects to the control socket at a path, within [`DEFAULT_TIMEOUT`].
    ///
    /// # Errors
    ///
    /// [`ClientError::Nobody`] when there is no socket or nobody listens at it, and
    /// [`ClientError::Timeout`] when somebody does, but has not accepted a whole backlog of clients.
    pub fn connect(path: impl AsRef<Path>) -> Result<Client, ClientError> {
        Client::connect_within(path, DEFAULT_TIMEOUT)
    }

    /// Connects as [`Client::connect`], with another timeout for this and all that follows.
    pub fn connect_within(path: impl AsRef<Path>, timeout: Duration) -> Result<Client, ClientError> {
        let path = path.as_ref();
        let address = address(path)?;
        let socket = stream_socket().map_err(|source| ClientError::Io { path: path.to_owned(), source })?;
        let client = Client {
            socket,
            path: path.to_owned(),
            timeout,
            lines: LineReader::new(MAX_REPLY),
            descriptors: Vec::new(),
        };
        let deadline = client.deadline();
        loop {
            let path = client.path.clone();
            match rustix::net::connect(&client.socket, &address) {
                Ok(()) => return Ok(client),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if Instant::now() >= deadline {
                        return Err(ClientError::Timeout { path, timeout });
                    }
                    thread::sleep(CONNECT_EVERY);
                }
                Err(Errno::NOENT) => {
                    let why = "no such socket";
                    return Err(ClientError::Nobody { path, why });
                }
                Err(Errno::CONNREFUSED) => {
                    let why = "nobody listens at the socket, which was left behind";
                    return Err(ClientError::Nobody { path, why });
                }
                Err(Errno::ACCESS | Errno::PERM) => return Err(ClientError::Permission { path }),
                Err(error) => return Err(client.io_error(error.into())),
            }
        }
    }

    /// How long each of the following operations may take, from its beginning to its end.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends a request and waits for the reply. Descriptors that come with it are closed: where some
    /// are expected, use [`Client::send`] and [`Client::receive`].
    ///
    /// An answer that refuses is `Ok(Reply::Error(…))`.
    pub fn request<A: Serialize>(&mut self, request: &Request<A>) -> Result<Reply, ClientError> {
        match self.send(request) {
            // A peer that refuses us at once may have said why before it closed.
            Ok(()) | Err(ClientError::Closed { .. }) => {}
            Err(error) => return Err(error),
        }
        let (line, _descriptors) = self.receive()?;
        Reply::parse(&line).map_err(|source| ClientError::Reply { path: self.path.clone(), source })
    }

    /// Sends a request, without waiting for the reply.
    pub fn send<A: Serialize>(&mut self, request: &Request<A>) -> Result<(), ClientError> {
        let line = request.to_line().map_err(ClientError::Request)?;
        let deadline = self.deadline();
        let mut rest = line.as_slice();
        while !rest.is_empty() {
            match send_with(&self.socket, rest, &[], Wait::DontWait) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, deadline)?;
                }
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(())
    }

    /// Waits for the next line, and gives it with all descriptors that have come since the line
    /// before. Lines that arrive together cannot be told apart in this: the first gets them all.
    pub fn receive(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), ClientError> {
        let deadline = self.deadline();
        loop {
            let line = self.lines.next_line();
            match line.map_err(|source| ClientError::TooLong { path: self.path.clone(), source })? {
                Some(line) => return Ok((line, mem::take(&mut self.descriptors))),
                None => self.receive_more(deadline)?,
            }
        }
    }

    /// Waits for any bytes at all, complete line or not, and gives them with the descriptors that have
    /// come: for a peer that does not answer in lines.
    pub fn receive_bytes(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), ClientError> {
        let deadline = self.deadline();
        loop {
            let bytes = self.lines.take_rest();
            if !bytes.is_empty() {
                return Ok((bytes, mem::take(&mut self.descriptors)));
            }
            self.receive_more(deadline)?;
        }
    }

    /// The path of the control socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn receive_more(&mut self, deadline: Instant) -> Result<(), ClientError> {
        let mut buffer = [0; CHUNK];
        let received = loop {
            match receive_with(&self.socket, &mut buffer, Wait::DontWait) {
                Ok(received) => break received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, deadline)?;
                }
                // Said once, when the peer closed with something unread; what it sent before is still queued.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(self.io_error(error)),
            }
        };
        self.descriptors.extend(received.descriptors);
        if received.descriptors_truncated || self.descriptors.len() > PER_MESSAGE {
            return Err(ClientError::Descriptors { path: self.path.clone() });
        }
        if received.bytes == 0 {
            return Err(ClientError::Closed { path: self.path.clone() });
        }
        self.lines.feed(&buffer[..received.bytes]);
        Ok(())
    }

    fn wait(&self, ready: PollFlags, deadline: Instant) -> Result<(), ClientError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&self.socket, ready)];
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut polled, timeout.as_ref()) {
                Ok(0) if left.is_zero() => {
                    return Err(ClientError::Timeout { path: self.path.clone(), timeout: self.timeout });
                }
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(self.io_error(error.into())),
            }
        }
    }

    fn deadline(&self) -> Instant {
        const FAR: Duration = Duration::from_secs(365 * 24 * 3600);
        Instant::now() + self.timeout.min(FAR)
    }

    fn io_error(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match Errno::from_io_error(&source) {
            Some(Errno::PIPE | Errno::CONNRESET) => ClientError::Closed { path },
            _ => ClientError::Io { path, source },
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
