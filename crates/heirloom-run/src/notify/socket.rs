//! The socket at which programs speak to their supervisor.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use heirloom_sys::{Datagram, receive_datagram};
use rustix::net::sockopt::set_socket_passcred;

/// The longest message; systemd takes as much.
const LONGEST: usize = 4096;

/// A datagram socket that tells who sends.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    socket: OwnedFd,
    buffer: Box<[u8; LONGEST]>,
}

/// Where it is: beside the control socket.
pub(crate) fn path_beside(control: &Path) -> PathBuf {
    let mut path = OsString::from(control);
    path.push(".notify");
    path.into()
}

impl NotifySocket {
    /// Binds it. The caller holds the service lock of the control socket: whatever is there is left over.
    pub(crate) fn bind(path: &Path) -> io::Result<NotifySocket> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(path)?;
        set_socket_passcred(&socket, true)?;
        Ok(NotifySocket::adopt(socket.into()))
    }

    /// One that was bound before this process became another program.
    pub(crate) fn adopt(socket: OwnedFd) -> NotifySocket {
        NotifySocket { socket, buffer: Box::new([0; LONGEST]) }
    }

    /// Whether what is sent to a path arrives at this socket, whose address may be that of a file that is gone.
    pub(crate) fn is_at(socket: &OwnedFd, path: &Path) -> bool {
        let named = rustix::net::SocketAddrUnix::new(path)
            .is_ok_and(|path| rustix::net::getsockname(socket).is_ok_and(|name| name == path.into()));
        // Under the service lock there is no other that could be bound there.
        let reached = || UnixDatagram::unbound().and_then(|other| other.connect(path)).is_ok();
        named && reached()
    }

    /// The next message, if there is one: its bytes, and all that came along.
    pub(crate) fn receive(&mut self) -> io::Result<Option<(&[u8], Datagram)>> {
        match receive_datagram(&self.socket, &mut self.buffer[..]) {
            Ok(datagram) => Ok(Some((&self.buffer[..datagram.bytes], datagram))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How many messages may wait at a socket at most, so that this many hold all that were sent before a moment.
pub(crate) fn longest_queue() -> usize {
    // Of the network namespace; where it cannot be told, more than anybody sets.
    let set = fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").ok();
    set.and_then(|text| text.trim().parse().ok()).unwrap_or(4096_usize).saturating_add(1)
}
