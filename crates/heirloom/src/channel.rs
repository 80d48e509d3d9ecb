//! The channel: the private socket on which a takeover is held.
//!
//! It is one end of a UNIX `SOCK_SEQPACKET` pair. Every packet arrives whole, in order, and together
//! with exactly the descriptors that were sent with it, which a stream does not promise. Nothing here
//! waits: a full queue and an empty one are answers. To wait, poll the descriptor.
//!
//! The promise that the commit rule rests on: once [`Channel::shutdown_receive`] has returned, no
//! packet can be added to our queue any more (the other end gets [`SendError::Closed`]), and what was
//! queued before can still be received.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};

use crate::descriptors::{self, Received, Wait, receive_with, send_with};

/// The most descriptors in one packet: one less than the kernel's limit of 253 (`unix(7)`).
pub const MAX_DESCRIPTORS: usize = 252;

/// The longest packet in bytes. Bigger things travel in a memfd, of which the packet carries the
/// descriptor.
pub const MAX_PACKET: usize = 32 * 1024;

/// Our end of the private socket on which a takeover is held.
///
/// It never waits, and it doesn't depend on `O_NONBLOCK` either. It can be sent to and used from
/// several threads: each packet stays whole.
///
/// ```
/// use heirloom::channel::{Channel, Incoming};
///
/// let (ours, theirs) = Channel::pair()?;
/// let theirs = Channel::adopt(theirs)?; // in truth the other process does this
///
/// ours.send(b"hello", &[])?;
/// assert!(matches!(theirs.receive()?, Incoming::Packet { bytes, .. } if bytes == b"hello"));
/// assert!(matches!(theirs.receive()?, Incoming::Empty));
/// drop(ours);
/// assert!(matches!(theirs.receive()?, Incoming::Closed));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// What [`Channel::receive`] found.
///
/// ```
/// use heirloom::channel::{Channel, Incoming};
///
/// let (ours, theirs) = Channel::pair()?;
/// let theirs = Channel::adopt(theirs)?;
/// ours.send(b"hello", &[])?;
/// let Incoming::Packet { bytes, descriptors } = theirs.receive()? else { panic!() };
/// assert_eq!((bytes.as_slice(), descriptors.len()), (b"hello".as_slice(), 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub enum Incoming {
    /// One packet, and the descriptors that were sent with it, in order and close-on-exec.
    Packet {
        /// The bytes, at least one and at most [`MAX_PACKET`].
        bytes: Vec<u8>,
        /// The descriptors, as many as were sent.
        descriptors: Vec<OwnedFd>,
    },
    /// Nothing is queued at the moment.
    Empty,
    /// Nothing is queued, and nothing will be: the other end is gone, or has ended its sending, or we
    /// have shut down our receiving.
    Closed,
}

/// Why a packet was not sent. None of it is on its way.
///
/// ```
/// use heirloom::channel::{Channel, SendError};
///
/// let (ours, theirs) = Channel::pair()?;
/// drop(theirs);
/// assert!(matches!(ours.send(b"hello", &[]), Err(SendError::Closed)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The queue is full: wait until the channel is writable, then send again.
    #[error("the channel is full until the other process reads from it")]
    Full,
    /// Too many descriptors are in flight: sent, but not yet received (`ETOOMANYREFS`). The limit is
    /// `RLIMIT_NOFILE` for all processes of one unprivileged user together.
    #[error(
        "too many descriptors are in flight: their number is bounded by the limit on open files \
         ({limit}, see `ulimit -n`) until the other process takes them"
    )]
    InFlight {
        /// Our soft `RLIMIT_NOFILE`.
        limit: u64,
    },
    /// The other end is closed, or has shut down its receiving.
    #[error("the other process has closed the channel")]
    Closed,
    /// The packet is longer than [`MAX_PACKET`], or empty.
    #[error("a packet of {bytes} bytes cannot be sent: it must have 1 to {MAX_PACKET}")]
    Length {
        /// The length of the packet.
        bytes: usize,
    },
    /// More than [`MAX_DESCRIPTORS`] for one packet.
    #[error("{count} descriptors cannot be sent in one packet: at most {MAX_DESCRIPTORS}")]
    Descriptors {
        /// How many there were.
        count: usize,
    },
    /// Another error of `sendmsg(2)`. `EINVAL` means a descriptor that cannot be passed, such as an
    /// io_uring.
    #[error("cannot send on the channel: {0}")]
    Io(#[source] io::Error),
}

/// Why the channel cannot be used any longer. What was received with the error has been closed.
///
/// ```
/// use heirloom::channel::{Channel, ChannelError};
///
/// let (stream, _) = std::os::unix::net::UnixStream::pair()?;
/// assert!(matches!(Channel::adopt(stream.into()), Err(ChannelError::NotAChannel { .. })));
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The descriptor is no UNIX `SOCK_SEQPACKET` socket.
    #[error("the descriptor is not a channel: {found}; a channel is a UNIX SEQPACKET socket")]
    NotAChannel {
        /// What it is instead.
        found: String,
    },
    /// Some of a packet's descriptors could not be taken in (`MSG_CTRUNC`), and are lost.
    #[error(
        "only {received} descriptors of a packet could be received: {open} are open and the limit \
         on open files is {limit}; raise it (`ulimit -n`, or LimitNOFILE= of the unit)"
    )]
    NoRoom {
        /// How many arrived; they have been closed.
        received: usize,
        /// How many were open with them.
        open: u64,
        /// Our soft `RLIMIT_NOFILE`.
        limit: u64,
    },
    /// A packet was longer than [`MAX_PACKET`] (`MSG_TRUNC`): the other side does not keep to the rules.
    #[error("the other process sent a packet of more than {MAX_PACKET} bytes")]
    PacketTooLong,
    /// Another error of the system.
    #[error("cannot receive from the channel: {0}")]
    Io(#[from] io::Error),
}

impl Channel {
    /// A new channel: our end, and the end to pass to the other process. Both are close-on-exec.
    ///
    /// The credentials of either end are those of the caller (`unix(7)`, `SO_PEERCRED`), so that the
    /// receiver of the other end learns who made it. Errors are those of `socketpair(2)`.
    pub fn pair() -> io::Result<(Channel, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel { socket: ours }, theirs))
    }

    /// Takes a descriptor that came from the other process as our end, and makes it close-on-exec.
    ///
    /// # Errors
    ///
    /// [`ChannelError::NotAChannel`] when it is anything but a UNIX `SOCK_SEQPACKET` socket.
    pub fn adopt(socket: OwnedFd) -> Result<Channel, ChannelError> {
        let domain = socket_domain(&socket).map_err(not_a_socket)?;
        let kind = socket_type(&socket).map_err(not_a_socket)?;
        if (domain, kind) != (AddressFamily::UNIX, SocketType::SEQPACKET) {
            return Err(ChannelError::NotAChannel {
                found: format!("a socket of family {} and type {}", domain.as_raw(), kind.as_raw()),
            });
        }
        fcntl_setfd(&socket, FdFlags::CLOEXEC).map_err(io::Error::from)?;
        Ok(Channel { socket })
    }

    /// Queues one packet with duplicates of descriptors, entirely or not at all.
    ///
    /// # Errors
    ///
    /// [`SendError::Full`] and [`SendError::InFlight`] pass when the other side receives; the others
    /// do not. Success means queued, not received.
    pub fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        if packet.is_empty() || packet.len() > MAX_PACKET {
            return Err(SendError::Length { bytes: packet.len() });
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(SendError::Descriptors { count: descriptors.len() });
        }
        match send_with(&self.socket, packet, descriptors, Wait::DontWait) {
            Ok(_) => Ok(()),
            Err(error) => Err(match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::NOBUFS) => SendError::Full,
                Some(Errno::TOOMANYREFS) => SendError::InFlight { limit: descriptors::limit() },
                Some(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => SendError::Closed,
                _ => SendError::Io(error),
            }),
        }
    }

    /// Takes the next packet from the queue, if there is one.
    ///
    /// # Errors
    ///
    /// After [`ChannelError::NoRoom`] or [`ChannelError::PacketTooLong`] something is lost: the
    /// takeover has to be aborted.
    pub fn receive(&self) -> Result<Incoming, ChannelError> {
        let mut buffer = [0; MAX_PACKET];
        let received = loop {
            match receive_with(&self.socket, &mut buffer, Wait::DontWait) {
                Ok(received) => break received,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(Incoming::Empty),
                    // The other end closed with packets of ours unread. The kernel says so once, and
                    // before packets that are still in our own queue: the end is 0 bytes, later.
                    Some(Errno::CONNRESET) => continue,
                    _ => return Err(ChannelError::Io(error)),
                },
            }
        };
        whole(received, &buffer)
    }

    /// Refuses everything that the other side has not sent yet: from now on its sends fail with
    /// [`SendError::Closed`], and [`Channel::receive`] says [`Incoming::Closed`] after the packets that
    /// were queued before. Sending is not affected.
    pub fn shutdown_receive(&self) -> io::Result<()> {
        match shutdown(&self.socket, Shutdown::Read) {
            // The other end is gone, so that it cannot send anyway.
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.socket
    }
}

/// A packet of which nothing is missing, or the error that tells what is.
fn whole(received: Received, buffer: &[u8]) -> Result<Incoming, ChannelError> {
    if received.descriptors_truncated {
        return Err(ChannelError::NoRoom {
            received: received.descriptors.len(),
            open: descriptors::open_descriptors().unwrap_or(0),
            limit: descriptors::limit(),
        });
    }
    if received.data_truncated {
        return Err(ChannelError::PacketTooLong);
    }
    // Nobody who keeps to the rules sends an empty packet.
    if received.bytes == 0 {
        return Ok(Incoming::Closed);
    }
    Ok(Incoming::Packet { bytes: buffer[..received.bytes].to_vec(), descriptors: received.descriptors })
}

fn not_a_socket(error: Errno) -> ChannelError {
    match error {
        Errno::NOTSOCK => ChannelError::NotAChannel { found: "no socket at all".to_owned() },
        other => ChannelError::Io(other.into()),
    }
}
