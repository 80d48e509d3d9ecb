//! The sockets of the relay: how one listens, connects, and ends a connection of which others may hold duplicates.
//!
//! A socket is shared with whoever lends it to a successor, so that closing it may not close it: what its peer is to see is said
//! by [`end`](Socket::end) and [`reset`](Socket::reset) first.

use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use heirloom::Kind;
use mio::Interest;
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, Shutdown, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::address::{Address, Place};

/// Whether there is something to read, be it [urgent](crate::urgent), or the end.
pub(crate) const READING: Interest = Interest::READABLE.add(Interest::PRIORITY);
/// Whether it takes more. That it has failed is told in any case (`epoll_ctl(2)`).
pub(crate) const WRITING: Interest = Interest::WRITABLE;
/// Whether there is something to read, and whether it takes more.
pub(crate) const BOTH: Interest = READING.add(Interest::WRITABLE);

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// A connected socket, or one that is about to be.
#[derive(Clone, Debug)]
pub(crate) struct Socket {
    descriptor: Arc<OwnedFd>,
    tcp: bool,
}

/// What is set on TCP sockets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpOptions {
    pub(crate) nodelay: bool,
    pub(crate) keepalive: Option<Duration>,
}

impl Socket {
    pub(crate) fn new(descriptor: OwnedFd, kind: Kind) -> Socket {
        Socket { descriptor: Arc::new(descriptor), tcp: kind == Kind::TcpStream }
    }

    /// One with which a backend can be connected to.
    pub(crate) fn to(place: &Place, options: TcpOptions) -> io::Result<Socket> {
        let new = |family| net::socket_with(family, SocketType::STREAM, FLAGS, None);
        match place {
            Place::Tcp(address) => {
                let descriptor = new(family(address))?;
                set(&descriptor, options)?;
                Ok(Socket::new(descriptor, Kind::TcpStream))
            }
            Place::Unix(_) => {
                let descriptor = new(AddressFamily::UNIX)?;
                sockopt::set_socket_oobinline(&descriptor, true)?;
                Ok(Socket::new(descriptor, Kind::UnixStream))
            }
        }
    }

    /// Begins to connect. `WouldBlock`: the queue of a UNIX socket is full, and nothing will tell when it is not.
    pub(crate) fn connect(&self, place: &Place) -> io::Result<()> {
        let begun = match place {
            Place::Tcp(address) => net::connect(&self.descriptor, address),
            Place::Unix(path) => net::connect(&self.descriptor, &SocketAddrUnix::new(path)?),
        };
        match begun {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.tcp
    }

    pub(crate) fn kind(&self) -> Kind {
        if self.tcp { Kind::TcpStream } else { Kind::UnixStream }
    }

    pub(crate) fn shared(&self) -> &Arc<OwnedFd> {
        &self.descriptor
    }

    /// The error that the kernel has noted, which it then forgets.
    pub(crate) fn take_error(&self) -> io::Result<()> {
        match sockopt::socket_error(&self.descriptor)? {
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is connected to itself, as may happen on this machine where nobody listens at a port that the kernel also
    /// gives out.
    pub(crate) fn is_its_own_peer(&self, place: &Place) -> bool {
        let Place::Tcp(address) = place else { return false };
        if !address.ip().is_loopback() {
            return false;
        }
        net::getsockname(&self.descriptor).is_ok_and(|own| SocketAddr::try_from(own).as_ref() == Ok(address))
    }

    /// Sends what waits to be sent together with an [end](Socket::finish), which does not come.
    pub(crate) fn flush(&self) {
        if self.tcp {
            let _ = sockopt::set_tcp_nodelay(&self.descriptor, true);
        }
    }

    /// Nothing more is sent: the peer reads an end.
    pub(crate) fn finish(&self) {
        let _ = net::shutdown(&self.descriptor, Shutdown::Write);
    }

    /// An orderly end, whoever holds a duplicate.
    pub(crate) fn end(&self) {
        let _ = net::shutdown(&self.descriptor, Shutdown::Both);
    }

    /// A reset, whoever holds a duplicate. A UNIX socket knows none, and is shut down.
    pub(crate) fn reset(&self) {
        if !self.tcp || net::connect_unspec(&self.descriptor).is_err() {
            self.end();
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn family(address: &SocketAddr) -> AddressFamily {
    match address.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    }
}

fn set(socket: impl AsFd, options: TcpOptions) -> io::Result<()> {
    sockopt::set_socket_oobinline(&socket, true)?;
    if options.nodelay {
        sockopt::set_tcp_nodelay(&socket, true)?;
    }
    if let Some(after) = options.keepalive {
        sockopt::set_socket_keepalive(&socket, true)?;
        // The kernel counts in seconds, and at least one.
        sockopt::set_tcp_keepidle(&socket, after.max(Duration::from_secs(1)))?;
    }
    Ok(())
}

/// Sets what accepted sockets inherit. It is for listeners that are this process's own by now.
pub(crate) fn set_inherited(listener: impl AsFd, options: TcpOptions) -> io::Result<()> {
    sockopt::set_socket_oobinline(&listener, true)?;
    sockopt::set_tcp_nodelay(&listener, options.nodelay)?;
    sockopt::set_socket_keepalive(&listener, options.keepalive.is_some())?;
    match options.keepalive {
        Some(after) => Ok(sockopt::set_tcp_keepidle(&listener, after.max(Duration::from_secs(1)))?),
        None => Ok(()),
    }
}

/// Binds an address without listening there yet; with `shared`, beside others that share the port. A UNIX socket that nobody listens at
/// any more is replaced.
pub(crate) fn bind(place: &Place, mode: Option<u32>, shared: bool) -> io::Result<OwnedFd> {
    match place {
        Place::Tcp(address) => {
            let family = family(address);
            let socket = net::socket_with(family, SocketType::STREAM, FLAGS, None)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            if shared {
                sockopt::set_socket_reuseport(&socket, true)?;
            }
            if family == AddressFamily::INET6 {
                sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
            }
            net::bind(&socket, address)?;
            Ok(socket)
        }
        Place::Unix(path) => {
            let address = SocketAddrUnix::new(path)?;
            let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
            match net::bind(&socket, &address) {
                Err(Errno::ADDRINUSE) if is_stale(path, &address) => {
                    std::fs::remove_file(path)?;
                    net::bind(&socket, &address)?;
                }
                bound => bound?,
            }
            set_mode(place, mode)?;
            Ok(socket)
        }
    }
}

/// Sets the permissions of a UNIX socket's file.
pub(crate) fn set_mode(place: &Place, mode: Option<u32>) -> io::Result<()> {
    match (place, mode) {
        (Place::Unix(path), Some(mode)) => {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        }
        _ => Ok(()),
    }
}

/// Whether it is the socket of a process that has gone.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let probe = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None);
    is_socket && probe.is_ok_and(|probe| net::connect(&probe, address) == Err(Errno::CONNREFUSED))
}

/// Accepts who waits longest. Where it comes from is written only for TCP.
pub(crate) fn accept(listener: impl AsFd, kind: Kind) -> io::Result<(Socket, Option<SocketAddr>)> {
    let (descriptor, from) = net::acceptfrom_with(listener, FLAGS)?;
    let tcp = kind == Kind::TcpListener;
    if !tcp {
        // A UNIX socket inherits nothing.
        sockopt::set_socket_oobinline(&descriptor, true)?;
    }
    let from = from.filter(|_| tcp).and_then(|from: SocketAddrAny| SocketAddr::try_from(from).ok());
    // At a socket of IPv6 that also takes IPv4.
    let from = from.map(|from| SocketAddr::new(from.ip().to_canonical(), from.port()));
    Ok((Socket { descriptor: Arc::new(descriptor), tcp }, from))
}

/// Where a listener really is, for people: the port that the kernel has chosen, for instance.
pub(crate) fn name(listener: impl AsFd, configured: &Address) -> String {
    match (net::getsockname(listener).map(SocketAddr::try_from), configured.place()) {
        (Ok(Ok(address)), Place::Tcp(_)) => address.to_string(),
        _ => configured.text().into(),
    }
}

/// Ends a listener, whoever has a duplicate: those who wait in its queue are reset, and whoever comes is refused.
pub(crate) fn end_listening(listener: impl AsFd) {
    let _ = net::shutdown(listener, Shutdown::Read);
}

/// Removes the file of a UNIX listener that ends.
pub(crate) fn remove_path(listener: impl AsFd) {
    let path = net::getsockname(listener).ok().and_then(|name| SocketAddrUnix::try_from(name).ok());
    if let Some(path) = path.as_ref().and_then(SocketAddrUnix::path_bytes) {
        let _ = std::fs::remove_file(Path::new(OsStr::from_bytes(path)));
    }
}
