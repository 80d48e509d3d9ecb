//! Addresses that are bound before the takeover, so that one that cannot be had is known while the incumbent still serves. Nobody
//! listens there before the takeover has succeeded.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use heirloom::Kind;
use rustix::net;

use crate::address::{Address, Place};
use crate::socket;

/// A bound socket; unless it is [listened](Bound::listen) at, nothing of it is left in the end.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) listener: usize,
    socket: Option<OwnedFd>,
    path: Option<PathBuf>,
}

impl Bound {
    pub(crate) fn new(listener: usize, address: &Address, mode: Option<u32>) -> io::Result<Bound> {
        let socket = socket::bind(address.place(), mode)?;
        let path = match address.place() {
            Place::Tcp(_) => None,
            Place::Unix(path) => Some(path.clone()),
        };
        Ok(Bound { listener, socket: Some(socket), path })
    }

    /// Begins to listen.
    pub(crate) fn listen(mut self, backlog: u32) -> io::Result<(OwnedFd, Kind)> {
        let socket = self.socket.take().ok_or_else(|| io::Error::other("it listens already"))?;
        net::listen(&socket, backlog.try_into().unwrap_or(i32::MAX))?;
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
