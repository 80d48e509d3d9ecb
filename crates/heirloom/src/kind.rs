//! What sort of descriptor an item is.
//!
//! A kind is written in the manifest by the process that hands over, and checked by the one that receives
//! against the descriptor that really arrived ([`Kind::of`]), so that a mix-up is an error with a name instead
//! of a connection that behaves strangely.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use minicbor::{Decode, Decoder, Encode, Encoder};
use rustix::{
    fs::{FileType, OFlags, fcntl_get_seals, fcntl_getfl, fstat},
    io::Errno,
    net::{AddressFamily, SocketType, ipproto, sockopt},
    termios::isatty,
};
use serde::{Deserialize, Serialize};

/// The kind of a descriptor.
///
/// ```
/// use heirloom::Kind;
/// use std::net::TcpListener;
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// assert_eq!(Kind::of(&listener)?, Kind::TcpListener);
/// assert_eq!(Kind::TcpListener.to_string(), "tcp-listener");
/// # Ok::<_, std::io::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    // The numbers are those in the manifest. They are for ever: never change or reuse one.
    /// Anything that is not in this list: a directory, a device that is no terminal, an epoll, a raw socket, …
    Other = 0,
    /// A TCP (or MPTCP) socket that listens.
    TcpListener = 1,
    /// A TCP (or MPTCP) socket that does not listen, connected or not.
    TcpStream = 2,
    /// A UNIX stream socket that listens.
    UnixListener = 3,
    /// A UNIX stream socket that does not listen.
    UnixStream = 4,
    /// A UNIX SEQPACKET socket, whether it listens or is connected.
    UnixSeqpacket = 5,
    /// A UDP socket.
    UdpSocket = 6,
    /// A UNIX datagram socket.
    UnixDatagram = 7,
    /// A pipe or FIFO open for reading; also a FIFO open for both.
    PipeReader = 8,
    /// A pipe or FIFO open for writing only.
    PipeWriter = 9,
    /// A regular file.
    File = 10,
    /// A file in memory: `memfd_create(2)`.
    Memfd = 11,
    /// An event counter: `eventfd(2)`.
    Eventfd = 12,
    /// A terminal, either side of a pseudo-terminal included.
    Tty = 13,
}

impl Kind {
    /// Every kind, at the place of its number, with its name.
    const ALL: [(Kind, &'static str); 14] = [
        (Kind::Other, "other"),
        (Kind::TcpListener, "tcp-listener"),
        (Kind::TcpStream, "tcp-stream"),
        (Kind::UnixListener, "unix-listener"),
        (Kind::UnixStream, "unix-stream"),
        (Kind::UnixSeqpacket, "unix-seqpacket"),
        (Kind::UdpSocket, "udp-socket"),
        (Kind::UnixDatagram, "unix-datagram"),
        (Kind::PipeReader, "pipe-reader"),
        (Kind::PipeWriter, "pipe-writer"),
        (Kind::File, "file"),
        (Kind::Memfd, "memfd"),
        (Kind::Eventfd, "eventfd"),
        (Kind::Tty, "tty"),
    ];

    /// Asks the kernel what `fd` is. Changes nothing about it, and reads nothing from it.
    ///
    /// Memfds and eventfds are told from other files by their name in `/proc/self/fd`. Where `/proc` is not
    /// mounted a memfd is still found (it has seals and no links), an eventfd is [`Kind::Other`].
    ///
    /// # Errors
    /// What fstat(2), fcntl(2) or getsockopt(2) said.
    pub fn of(fd: impl AsFd) -> io::Result<Kind> {
        let fd = fd.as_fd();
        // Sockets first: most items are, and each question costs a system call.
        match sockopt::socket_domain(fd) {
            Err(Errno::NOTSOCK) => {}
            domain => return of_socket(fd, domain?),
        }
        let stat = fstat(fd)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => of_pipe(fd),
            FileType::CharacterDevice if isatty(fd) => Ok(Kind::Tty),
            FileType::RegularFile => Ok(of_file(fd, stat.st_nlink == 0)),
            // What has no place in a file system has no file type either.
            FileType::Unknown if proc_name(fd).as_deref() == Some(b"anon_inode:[eventfd]") => {
                Ok(Kind::Eventfd)
            }
            _ => Ok(Kind::Other),
        }
    }

    /// The kind of a descriptor that should be a `self`: as [`Kind::of`], but where that is so, with a single system call
    /// for the kind of which there are many.
    pub(crate) fn expected(self, fd: impl AsFd) -> io::Result<Kind> {
        // Only TCP knows of bytes that were never sent, and only where it does not listen.
        if self == Kind::TcpStream && heirloom_sys::never_sent(&fd).is_ok() {
            return Ok(self);
        }
        Kind::of(fd)
    }

    /// The name, as in messages and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Kind::ALL[self as usize].1
    }

    /// The kind with this number. One that only a newer program knows is something else to this one.
    pub(crate) fn from_code(code: u32) -> Kind {
        usize::try_from(code).ok().and_then(|i| Kind::ALL.get(i)).map_or(Kind::Other, |row| row.0)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl<C> Encode<C> for Kind {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u8(*self as u8)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Kind {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        d.u32().map(Kind::from_code)
    }
}

fn of_socket(fd: BorrowedFd<'_>, domain: AddressFamily) -> io::Result<Kind> {
    let either = |listener, stream| Ok(if sockopt::socket_acceptconn(fd)? { listener } else { stream });
    match (domain, sockopt::socket_type(fd)?) {
        (AddressFamily::UNIX, SocketType::STREAM) => either(Kind::UnixListener, Kind::UnixStream),
        (AddressFamily::UNIX, SocketType::SEQPACKET) => Ok(Kind::UnixSeqpacket),
        (AddressFamily::UNIX, SocketType::DGRAM) => Ok(Kind::UnixDatagram),
        // SCTP has stream sockets too, and an unprivileged ping is a datagram socket: ask for the protocol.
        (AddressFamily::INET | AddressFamily::INET6, kind) => match (kind, sockopt::socket_protocol(fd)?) {
            (SocketType::STREAM, Some(ipproto::TCP | ipproto::MPTCP)) => {
                either(Kind::TcpListener, Kind::TcpStream)
            }
            (SocketType::DGRAM, Some(ipproto::UDP)) => Ok(Kind::UdpSocket),
            _ => Ok(Kind::Other),
        },
        _ => Ok(Kind::Other),
    }
}

fn of_pipe(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    let mode = fcntl_getfl(fd)? & OFlags::RWMODE;
    Ok(if mode == OFlags::WRONLY { Kind::PipeWriter } else { Kind::PipeReader })
}

/// Tells memfds, and kernel objects that pose as regular files (pidfds, namespaces), from files.
fn of_file(fd: BorrowedFd<'_>, unlinked: bool) -> Kind {
    // Every file on tmpfs has seals, but nothing on a disk has: that rules out a file at "/memfd:…".
    let sealable = fcntl_get_seals(fd).is_ok();
    match proc_name(fd) {
        Some(name) if sealable && name.starts_with(b"/memfd:") => Kind::Memfd,
        // A path, perhaps "(unreachable)/…" from a chroot; kernel objects are called "pidfd:[7]", "net:[7]".
        Some(name) if name.starts_with(b"/") || name.starts_with(b"(") => Kind::File,
        Some(_) => Kind::Other,
        None if sealable && unlinked => Kind::Memfd,
        None => Kind::File,
    }
}

/// What `/proc` says this descriptor refers to, or `None` where there is no `/proc`.
fn proc_name(fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link, Vec::new()).ok().map(std::ffi::CString::into_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_distinct_and_stable() {
        for (code, (kind, name)) in (0u8..).zip(Kind::ALL) {
            assert_eq!(kind as u8, code);
            assert_eq!(Kind::from_code(u32::from(code)), kind);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{name}\""));
            assert_eq!(minicbor::to_vec(kind).unwrap(), [code]);
        }
    }

    #[test]
    fn a_kind_from_the_future_is_other() {
        assert_eq!(minicbor::decode::<Kind>(&minicbor::to_vec(4711u32).unwrap()).unwrap(), Kind::Other);
    }

    #[test]
    fn names_pad() {
        assert_eq!(format!("{:>6}|", Kind::Tty), "   tty|");
    }
}
