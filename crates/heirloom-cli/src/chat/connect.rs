//! An attempt to connect to one of several addresses, without blocking.
//!
//! The addresses are tried in order, one at a time. A socket is the caller's only when it is connected.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

/// How long one address may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection in the making: poll [`fd`](Attempt::fd) for writing until [`deadline`](Attempt::deadline), then
/// [`check`](Attempt::check).
pub(super) struct Attempt {
    address: SocketAddr,
    socket: OwnedFd,
    deadline: Instant,
    others: VecDeque<SocketAddr>,
}

/// How an attempt stands.
pub(super) enum Progress {
    Pending(Attempt),
    Connected(TcpStream),
    /// No address answered; what went wrong with the last.
    Failed(String),
}

impl Attempt {
    /// Begins with the first address.
    pub(super) fn start(addresses: &[SocketAddr], now: Instant) -> Progress {
        let others = addresses.iter().copied().collect();
        next(others, "there is no address to connect to".to_owned(), now)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on after polling; `ready` says whether the poll reported anything.
    pub(super) fn check(self, ready: bool, now: Instant) -> Progress {
        let result = match (ready, now < self.deadline) {
            (false, true) => return Progress::Pending(self),
            (false, false) => Err(Errno::TIMEDOUT.into()),
            (true, _) => outcome(&self.socket),
        };
        match result.and_then(|()| established(self.socket)) {
            Ok(stream) => Progress::Connected(stream),
            Err(error) => next(self.others, describe(self.address, &error), now),
        }
    }
}

/// Tries the next of `addresses`, or fails for `cause` when there is none.
fn next(mut addresses: VecDeque<SocketAddr>, mut cause: String, now: Instant) -> Progress {
    while let Some(address) = addresses.pop_front() {
        match begin(address) {
            Ok((socket, false)) => {
                return Progress::Pending(Attempt {
                    address,
                    socket,
                    deadline: now + PATIENCE,
                    others: addresses,
                });
            }
            Ok((socket, true)) => match established(socket) {
                Ok(stream) => return Progress::Connected(stream),
                Err(error) => cause = describe(address, &error),
            },
            Err(error) => cause = describe(address, &error),
        }
    }
    Progress::Failed(cause)
}

/// A socket on its way to `address`, and whether it is there already.
fn begin(address: SocketAddr) -> io::Result<(OwnedFd, bool)> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) => Ok((socket, true)),
        // An interrupted connect goes on by itself (connect(2)).
        Err(Errno::INPROGRESS | Errno::INTR) => Ok((socket, false)),
        Err(error) => Err(error.into()),
    }
}

/// How a connect has ended, of a socket that polled ready.
fn outcome(socket: &OwnedFd) -> io::Result<()> {
    Ok(sockopt::socket_error(socket)??)
}

/// The stream of a socket that has connected.
fn established(socket: OwnedFd) -> io::Result<TcpStream> {
    let stream = TcpStream::from(socket);
    // Where nobody listens on a port of the ephemeral range, a socket may get that very port and meet itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(Errno::CONNREFUSED.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn describe(address: SocketAddr, error: &io::Error) -> String {
    format!("{address}: {error}")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Polls until the attempt has ended.
    fn finish(mut progress: Progress) -> Result<TcpStream, String> {
        loop {
            match progress {
                Progress::Connected(stream) => return Ok(stream),
                Progress::Failed(cause) => return Err(cause),
                Progress::Pending(attempt) => {
                    let fd = attempt.fd();
                    let ready = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None);
                    progress = attempt.check(ready == Ok(1), Instant::now());
                }
            }
        }
    }

    fn closed_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[test]
    fn the_first_address_that_answers_is_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let addresses = [closed_address(), "[::1]:1".parse().unwrap(), address];
        let stream = finish(Attempt::start(&addresses, Instant::now())).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
    }

    #[test]
    fn when_no_address_answers_the_last_cause_is_told() {
        let closed = closed_address();
        let cause = finish(Attempt::start(&[closed], Instant::now())).unwrap_err();
        assert!(cause.contains(&closed.to_string()), "{cause}");
        assert!(cause.contains("refused"), "{cause}");
        assert!(finish(Attempt::start(&[], Instant::now())).unwrap_err().contains("no address"));
    }

    #[test]
    fn an_address_that_is_silent_for_too_long_has_failed() {
        // A listener whose queue is full does not answer: fill it with connections that nobody accepts.
        let listener =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
        let _queued = TcpStream::connect(address).unwrap();

        let now = Instant::now();
        let Progress::Pending(attempt) = Attempt::start(&[address], now) else {
            panic!("a full queue answered");
        };
        let Progress::Pending(attempt) = attempt.check(false, now) else {
            panic!("ended before its time");
        };
        assert_eq!(attempt.deadline(), now + PATIENCE);
        let Progress::Failed(cause) = attempt.check(false, now + PATIENCE) else {
            panic!("went on after its time");
        };
        assert!(cause.contains("timed out"), "{cause}");
    }
}
