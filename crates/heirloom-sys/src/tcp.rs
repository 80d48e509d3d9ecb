//! What a TCP connection has carried so far, and what it has still to send, as the kernel counts.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::option::{self, Plain};

/// How many bytes were written to a TCP connection and have not been sent even once: `SIOCOUTQNSD`
/// (`linux/sockios.h`, Linux 2.6.38).
///
/// Changes nothing, and neither waits for the socket nor locks it. Only TCP (and what stands for it, MPTCP and SMC) has
/// an answer: errors are `EINVAL` for a socket that listens, and `ENOTTY` for any other descriptor, so that success also
/// tells what a descriptor is.
///
/// ```
/// use std::net::{TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let connection = TcpStream::connect(listener.local_addr()?)?;
/// assert_eq!(heirloom_sys::never_sent(&connection)?, 0);
/// assert!(heirloom_sys::never_sent(&listener).is_err());
/// # std::io::Result::Ok(())
/// ```
pub fn never_sent(connection: impl AsFd) -> io::Result<usize> {
    Ok(queued(connection.as_fd(), libc::SIOCOUTQNSD as libc::Ioctl)? as usize)
}

/// How many connections wait at a TCP listener to be accepted (`TCP_INFO`, in which `tcpi_unacked` is this then; Linux 2.6.25).
///
/// Cheaper than an `accept4(2)` that finds none, which makes a socket first. Errors: `EINVAL` for a TCP socket that does not listen, and
/// `ENOPROTOOPT` or `EOPNOTSUPP` for others.
///
/// ```
/// use std::net::{TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// assert_eq!(heirloom_sys::accept_queue(&listener)?, 0);
/// let connection = TcpStream::connect(listener.local_addr()?)?;
/// assert_eq!(heirloom_sys::accept_queue(&listener)?, 1);
/// assert!(heirloom_sys::accept_queue(&connection).is_err());
/// # std::io::Result::Ok(())
/// ```
pub fn accept_queue(listener: impl AsFd) -> io::Result<usize> {
    let info = TcpInfo::of(listener.as_fd())?;
    if info.state() != state::LISTEN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(info.unacknowledged_segments() as usize)
}

/// Whether the next byte that will be read of a TCP connection is the urgent one: `SIOCATMARK` (`tcp(7)`; `sockatmark(3)`).
///
/// Changes nothing, and does not wait. It may be so before the byte has arrived: a read tells. Where urgent data is not in line
/// (`SO_OOBINLINE`), a read leaves that byte out, and it is no longer so. Errors: `ENOTTY` for what is no socket, and for UNIX
/// sockets before Linux 5.15.
///
/// ```
/// use std::net::{TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let connection = TcpStream::connect(listener.local_addr()?)?;
/// assert!(!heirloom_sys::is_at_mark(&connection)?);
/// # std::io::Result::Ok(())
/// ```
pub fn is_at_mark(connection: impl AsFd) -> io::Result<bool> {
    Ok(queued(connection.as_fd(), SIOCATMARK)? != 0)
}

/// `asm-generic/sockios.h`. (Alpha, MIPS, SuperH and Xtensa have another.)
const SIOCATMARK: libc::Ioctl = 0x8905;

/// What has passed through a TCP connection at this end, whichever processes have had it: [`tcp_counters`].
///
/// The counters outlive whoever reads and writes, so that a process can tell what one that was killed had read and
/// written: [`consumed`](TcpCounters::consumed) and [`written`](TcpCounters::written), less what they were when the
/// connection was new. (They need not begin at 0: at the end that has connected, the SYN counts as written.)
///
/// Urgent data has to be in line for this (`SO_OOBINLINE`): else the kernel takes an urgent byte for consumed that no
/// read has returned.
///
/// ```
/// use std::io::{Read, Write};
/// use std::net::{TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let mut client = TcpStream::connect(listener.local_addr()?)?;
/// let (mut server, _) = listener.accept()?;
/// let new = heirloom_sys::tcp_counters(&server)?;
///
/// client.write_all(b"hello, world")?;
/// server.read_exact(&mut [0; 5])?;
/// server.write_all(b"hi")?;
/// let now = heirloom_sys::tcp_counters(&server)?;
/// assert_eq!(now.consumed() - new.consumed(), 5);
/// assert_eq!(now.written() - new.written(), 2);
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpCounters {
    /// What has arrived in order, a FIN included (`tcpi_bytes_received`).
    pub received: u64,
    /// What has arrived and was not read (`SIOCINQ`).
    pub unread: u64,
    /// What the peer has acknowledged, our SYN and FIN included (`tcpi_bytes_acked`).
    pub acknowledged: u64,
    /// What was written and the peer has not acknowledged (`SIOCOUTQ`).
    pub unacknowledged: u64,
    /// `tcpi_state`.
    state: u8,
}

/// `TCP_ESTABLISHED` and so on, which `tcpi_state` speaks in (`net/tcp_states.h`).
mod state {
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const TIME_WAIT: u8 = 6;
    pub(super) const CLOSE: u8 = 7;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const LISTEN: u8 = 10;
    pub(super) const CLOSING: u8 = 11;
}

impl TcpCounters {
    /// How many bytes were read. One more when the connection [is over](TcpCounters::is_over) and the peer had ended its
    /// direction before.
    #[must_use]
    pub fn consumed(&self) -> u64 {
        self.received.wrapping_sub(self.unread).wrapping_sub(u64::from(self.peer_has_ended()))
    }

    /// How many bytes were written. One more when the connection [is over](TcpCounters::is_over) and our direction was
    /// ended before.
    #[must_use]
    pub fn written(&self) -> u64 {
        let ended = matches!(
            self.state,
            state::FIN_WAIT1 | state::FIN_WAIT2 | state::TIME_WAIT | state::LAST_ACK | state::CLOSING
        );
        self.acknowledged.wrapping_add(self.unacknowledged).wrapping_sub(u64::from(ended))
    }

    /// Whether the peer has ended its direction: no more will arrive than has. Not known any more once the connection
    /// [is over](TcpCounters::is_over).
    #[must_use]
    pub fn peer_has_ended(&self) -> bool {
        matches!(self.state, state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING | state::TIME_WAIT)
    }

    /// Whether the connection is over in both directions, by a reset for example. What is unread can still be read.
    ///
    /// Counters of a connection that was over because this end has disconnected it (`connect` to `AF_UNSPEC`) are 0.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == state::CLOSE
    }
}

/// The counters of a TCP connection, all of one moment: read again until nothing has arrived or was acknowledged
/// meanwhile. (What this or another process reads and writes meanwhile is not noticed: there is to be none.)
///
/// Changes nothing. Errors: `ENOPROTOOPT` or `EOPNOTSUPP` for other sockets, `ENOTSOCK` for what is none, `EINVAL` for
/// one that listens, and `InvalidData` from a kernel before 4.1, which does not count.
///
/// ```
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// assert!(heirloom_sys::tcp_counters(&listener).is_err());
/// # std::io::Result::Ok(())
/// ```
pub fn tcp_counters(connection: impl AsFd) -> io::Result<TcpCounters> {
    let connection = connection.as_fd();
    let mut info = TcpInfo::of(connection)?;
    loop {
        let unread = queued(connection, libc::FIONREAD)?;
        let unacknowledged = queued(connection, libc::TIOCOUTQ)?;
        let again = TcpInfo::of(connection)?;
        if (info.state(), info.received(), info.acknowledged())
            == (again.state(), again.received(), again.acknowledged())
        {
            return Ok(TcpCounters {
                received: info.received(),
                unread,
                acknowledged: info.acknowledged(),
                unacknowledged,
                state: info.state(),
            });
        }
        info = again;
    }
}

/// As much of `struct tcp_info` (`linux/tcp.h`) as is needed: 8 bytes, 24 times 32 bits, and then 64 bits each. It has
/// only ever grown at its end.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct TcpInfo([u64; 17]);

// SAFETY: an array of integers.
unsafe impl Plain for TcpInfo {}

const _: () = assert!(mem::size_of::<TcpInfo>() == 8 + 24 * 4 + 4 * 8);

impl TcpInfo {
    fn of(connection: BorrowedFd<'_>) -> io::Result<TcpInfo> {
        option::get(connection, libc::IPPROTO_TCP, libc::TCP_INFO)
    }

    fn state(&self) -> u8 {
        self.0[0].to_ne_bytes()[0]
    }

    fn unacknowledged_segments(&self) -> u32 {
        // The fifth of those with 32 bits.
        let [a, b, c, d, ..] = self.0[3].to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }

    fn acknowledged(&self) -> u64 {
        self.0[15]
    }

    fn received(&self) -> u64 {
        self.0[16]
    }
}

/// Asks a socket how much is in one of its queues, or whether something is so.
fn queued(connection: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: each of these requests writes one int, to a live local.
    let result = unsafe { libc::ioctl(connection.as_raw_fd(), request, &raw mut bytes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}
