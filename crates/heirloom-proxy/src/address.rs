//! Where one listens or connects: a TCP address, or the path of a UNIX socket.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// An address as it was written, and the place that it means.
///
/// Two configurations speak of the same address when they write it alike: that is how a listener is found again after a reload.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    text: String,
    place: Place,
}

/// What an [`Address`] means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// TCP, over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A UNIX stream socket in the file system.
    Unix(PathBuf),
}

impl Address {
    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it means.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address { text: address.to_string(), place: Place::Tcp(address) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
