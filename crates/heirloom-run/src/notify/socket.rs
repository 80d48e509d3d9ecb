//! The socket at which programs speak to their supervisor.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use heirloom_sys::{Datagram, peek_datagram, receive_datagram, set_peek_offset};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{RecvFlags, recv};

/// The longest message; systemd takes as much.
const LONGEST: usize = 4096;

/// A datagram socket that tells who sends.
///
/// It may be one that *looks*: messages stay in its queue, descriptors and all, until [`NotifySocket::done`]. Then a barrier is
/// answered there and not before, and a message that was heard by a process which was killed before it had done anything about
/// it is heard again by the next one: to do a row of messages twice is to do it once.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    socket: OwnedFd,
    looks: bool,
    /// How many messages were heard that are still in the queue.
    heard: usize,
    /// The last one was longer than the buffer, so that the next one is not where it would be looked for.
    lost_place: bool,
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
        NotifySocket { socket, looks: false, heard: 0, lost_place: false, buffer: Box::new([0; LONGEST]) }
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
        let received = match self.looks {
            true => self.look(),
            false => receive_datagram(&self.socket, &mut self.buffer[..]),
        };
        match received {
            Ok(datagram) => Ok(Some((&self.buffer[..datagram.bytes], datagram))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Leaves messages in the queue from now on.
    pub(crate) fn look_only(&mut self) -> io::Result<()> {
        set_peek_offset(&self.socket, Some(0))?;
        self.looks = true;
        Ok(())
    }

    fn look(&mut self) -> io::Result<Datagram> {
        if self.lost_place {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.heard == 0 {
            self.take_out_empty()?;
        }
        let datagram = peek_datagram(&self.socket, &mut self.buffer[..])?;
        // One without bytes, among others, is not seen at all; here it was the first.
        self.heard += usize::from(datagram.bytes > 0);
        self.lost_place = datagram.truncated;
        Ok(datagram)
    }

    /// Messages without a byte have no place in a queue in which places are counted in bytes. They say nothing either.
    fn take_out_empty(&self) -> io::Result<()> {
        set_peek_offset(&self.socket, None)?;
        let looked = loop {
            match recv(&self.socket, &mut [0; 1][..], RecvFlags::DONTWAIT | RecvFlags::PEEK) {
                Ok((0, _)) => recv(&self.socket, &mut [0; 1][..], RecvFlags::DONTWAIT)?,
                Ok(_) => break Ok(()),
                Err(error) => break Err(error.into()),
            };
        };
        set_peek_offset(&self.socket, Some(0))?;
        looked
    }

    /// Takes out of the queue what was heard.
    pub(crate) fn done(&mut self) {
        let taken = self.heard > 0;
        while self.heard > 0 {
            match recv(&self.socket, &mut [0; 1][..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {}
                Ok(_) => self.heard -= 1,
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot take a message out of the queue");
                    self.heard = 0;
                }
            }
        }
        self.lost_place = false;
        if taken && let Err(error) = set_peek_offset(&self.socket, Some(0)) {
            tracing::error!(%error, "cannot begin at the first message");
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
