//! The mio front end: an [`Incumbent`] is an event source, and descriptors of a bundle can be registered ahead of the
//! freeze.
//!
//! A registration ahead of the freeze is for reading only and edge-triggered: it misses nothing that arrives, whatever
//! the incumbent still reads meanwhile. The poller must not be polled before the takeover has succeeded.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use mio::event::Source;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::incumbent::Incumbent;

/// Readable when [`Incumbent::turn`] has something to do.
///
/// ```no_run
/// # fn f(mut incumbent: heirloom::Incumbent) -> std::io::Result<()> {
/// let mut poll = mio::Poll::new()?;
/// poll.registry().register(&mut incumbent, mio::Token(0), mio::Interest::READABLE)?;
/// let mut events = mio::Events::with_capacity(128);
/// poll.poll(&mut events, heirloom::runtime::mio::timeout(&incumbent))?;
/// # Ok(()) }
/// ```
impl<A> Source for Incumbent<A> {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_fd().as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_fd().as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.as_fd().as_raw_fd()).deregister(registry)
    }
}

/// How long a poll may take before the incumbent wants its turn; `None`: as long as it likes.
pub fn timeout<A>(incumbent: &Incumbent<A>) -> Option<Duration> {
    incumbent.deadline().map(|at| at.saturating_duration_since(Instant::now()))
}

/// Registers a descriptor of an offer for reading, ahead of the freeze. The registration stays valid for the
/// descriptor when it is taken from the bundle, until it is [deregistered](deregister) or closed.
///
/// # Errors
///
/// Those of epoll_ctl(2), for instance EPERM for a regular file.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// use std::os::fd::AsFd;
///
/// let poll = mio::Poll::new()?;
/// let (reader, _writer) = std::io::pipe()?;
/// heirloom::runtime::mio::register(poll.registry(), reader.as_fd(), mio::Token(1), mio::Interest::READABLE)?;
/// heirloom::runtime::mio::deregister(poll.registry(), reader.as_fd())?;
/// # Ok(()) }
/// ```
pub fn register(
    registry: &Registry,
    descriptor: BorrowedFd<'_>,
    token: Token,
    interests: Interest,
) -> io::Result<()> {
    SourceFd(&descriptor.as_raw_fd()).register(registry, token, interests)
}

/// Changes what a registered descriptor is waited for.
///
/// # Errors
///
/// Those of epoll_ctl(2).
pub fn reregister(
    registry: &Registry,
    descriptor: BorrowedFd<'_>,
    token: Token,
    interests: Interest,
) -> io::Result<()> {
    SourceFd(&descriptor.as_raw_fd()).reregister(registry, token, interests)
}

/// Ends a registration. Needed before a connection is closed of which another process holds a duplicate: the poller
/// would go on reporting it.
///
/// # Errors
///
/// Those of epoll_ctl(2).
pub fn deregister(registry: &Registry, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    SourceFd(&descriptor.as_raw_fd()).deregister(registry)
}
