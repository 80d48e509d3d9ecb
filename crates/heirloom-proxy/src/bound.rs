//! Addresses that are bound before the takeover, so that one that cannot be had is known while the incumbent still serves. Nobody
//! listens there before the takeover has succeeded.
//!
//! Beside a listener of the incumbent that is in the way, all addresses of its port instead of one or one instead of all, the port is
//! shared (`SO_REUSEPORT`, `socket(7)`) until all listen, or nothing comes of it; for good if this process is killed meanwhile. As
//! long as something is bound to it after that, Linux lets the same user bind there who asks for sharing as well.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use heirloom::Kind;
use rustix::net::{self, sockopt};

use crate::address::{Address, Place};
use crate::socket;

/// A bound socket; unless it is [listened](Bound::listen) at, nothing of it is left in the end.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) listener: usize,
    socket: Option<OwnedFd>,
    path: Option<PathBuf>,
    shared: bool,
}

/// Listeners that share their ports with others as long as this is there.
#[derive(Debug, Default)]
pub(crate) struct Sharing(Vec<OwnedFd>);

impl Bound {
    /// Binds an address; with `shared`, beside listeners that [share](Sharing) its port.
    pub(crate) fn new(
        listener: usize,
        address: &Address,
        mode: Option<u32>,
        shared: bool,
    ) -> io::Result<Bound> {
        let socket = socket::bind(address.place(), mode, shared)?;
        let path = match address.place() {
            Place::Tcp(_) => None,
            Place::Unix(path) => Some(path.clone()),
        };
        Ok(Bound { listener, socket: Some(socket), path, shared })
    }

    /// Begins to listen. If the port is shared, it is as long as the others share theirs.
    pub(crate) fn listen(mut self, backlog: u32, sharing: &mut Sharing) -> io::Result<(OwnedFd, Kind)> {
        let socket = self.socket.take().ok_or_else(|| io::Error::other("it listens already"))?;
        net::listen(&socket, backlog.try_into().unwrap_or(i32::MAX))?;
        if self.shared {
            // If not, it goes on sharing, which is no reason to go without it.
            let _ = sharing.add(&[socket.as_fd()]);
        }
        let kind = if self.path.take().is_some() { Kind::UnixListener } else { Kind::TcpListener };
        Ok((socket, kind))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

impl Sharing {
    /// Has these share their ports, too.
    pub(crate) fn add(&mut self, listeners: &[BorrowedFd<'_>]) -> io::Result<()> {
        for listener in listeners {
            self.0.push(listener.try_clone_to_owned()?);
            sockopt::set_socket_reuseport(listener, true)?;
        }
        Ok(())
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        for listener in &self.0 {
            let _ = sockopt::set_socket_reuseport(listener, false);
        }
    }
}
