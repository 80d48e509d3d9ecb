//! The sockets that a program gets from the start: bound before it first runs, and open whether it runs or not.

use std::fmt;
use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How many connections may wait to be accepted while the program is away; the kernel lowers it to `somaxconn`.
const BACKLOG: i32 = 4096;

/// The name of a socket that was given none.
const DEFAULT_NAME: &str = "listen";

/// A socket to listen at: `[NAME=]HOST:PORT`, `[NAME=]udp:HOST:PORT`, or `[NAME=]/PATH`.
///
/// ```
/// use heirloom_run::{Address, Listen};
///
/// let listen: Listen = "web=127.0.0.1:8080".parse()?;
/// assert_eq!((listen.name.as_str(), listen.address), ("web", Address::Tcp("127.0.0.1:8080".into())));
/// let listen: Listen = "/run/echo/socket".parse()?;
/// assert_eq!((listen.name.as_str(), listen.to_string().as_str()), ("listen", "listen=/run/echo/socket"));
/// # Ok::<(), heirloom_run::ListenError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Its name in `LISTEN_FDNAMES`.
    pub name: String,
    /// Where.
    pub address: Address,
}

/// Where a socket listens.
///
/// ```
/// assert_eq!("udp:[::1]:53".parse::<heirloom_run::Listen>()?.address, heirloom_run::Address::Udp("[::1]:53".into()));
/// # Ok::<(), heirloom_run::ListenError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP listener at `HOST:PORT`.
    Tcp(String),
    /// A UDP socket at `HOST:PORT`.
    Udp(String),
    /// A UNIX stream listener at an absolute path.
    Unix(PathBuf),
}

/// Why a socket cannot be had.
///
/// ```
/// let error = "a:b=127.0.0.1:80".parse::<heirloom_run::Listen>().unwrap_err();
/// assert!(error.to_string().contains("a:b"), "{error}");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Its name cannot be in `LISTEN_FDNAMES`.
    #[error("{name:?} cannot be a socket's name: it {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is no address.
    #[error("{0:?} is no address to listen at: give HOST:PORT, udp:HOST:PORT or an absolute path")]
    Address(String),
    /// The system says no.
    #[error("cannot listen at {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Listen, ListenError> {
        // A path may have an equals sign in it.
        let (name, address) = match text.split_once('=') {
            Some((name, address)) if !name.starts_with('/') => (name, address),
            _ => (DEFAULT_NAME, text),
        };
        if let Err(why) = crate::store::check_name(name) {
            return Err(ListenError::Name { name: name.into(), why });
        }
        let port = |address: &str| {
            address
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        let address = match address.strip_prefix("udp:") {
            Some(udp) if port(udp) => Address::Udp(udp.into()),
            None if address.starts_with('/') => Address::Unix(address.into()),
            None if port(address) => Address::Tcp(address.into()),
            _ => return Err(ListenError::Address(text.into())),
        };
        Ok(Listen { name: name.into(), address })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => f.write_str(address),
            Address::Udp(address) => write!(f, "udp:{address}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Listen {
    /// Binds the socket.
    pub(crate) fn bind(&self) -> Result<OwnedFd, ListenError> {
        let bound = match &self.address {
            Address::Tcp(address) => tcp(address),
            Address::Udp(address) => first(address, |address| UdpSocket::bind(address).map(OwnedFd::from)),
            Address::Unix(path) => unix(path),
        };
        bound.map_err(|source| ListenError::Bind { address: self.address.to_string(), source })
    }

    /// Whether a socket that was bound for this before still is where it says.
    pub(crate) fn is_there(&self) -> bool {
        match &self.address {
            Address::Unix(path) => fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()),
            Address::Tcp(_) | Address::Udp(_) => true,
        }
    }

    /// Removes what binding has left in the file system.
    pub(crate) fn clean_up(&self) {
        if let Address::Unix(path) = &self.address {
            let _ = fs::remove_file(path);
        }
    }
}

fn tcp(address: &str) -> io::Result<OwnedFd> {
    first(address, |address| {
        let listener = TcpListener::bind(address)?;
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(listener.into())
    })
}

/// The first of a name's addresses at which it can be done.
fn first<T>(address: &str, bind: impl Fn(std::net::SocketAddr) -> io::Result<T>) -> io::Result<T> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match bind(address) {
            Ok(bound) => return Ok(bound),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn unix(path: &Path) -> io::Result<OwnedFd> {
    // One that nobody listens at is left over.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_socket_is_refused() {
        for text in [
            "",
            "80",
            ":80",
            "host",
            "host:port",
            "host:70000",
            "udp:/path",
            "relative/path",
            "=:80",
            "a\nb=x:1",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
        assert_eq!("/a=b".parse::<Listen>().unwrap().address, Address::Unix("/a=b".into()));
        assert_eq!("localhost:0".parse::<Listen>().unwrap().address, Address::Tcp("localhost:0".into()));
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let listen = Listen { name: "x".into(), address: Address::Unix(directory.path().join("s")) };
        drop(listen.bind().unwrap());
        let bound = listen.bind().unwrap();
        assert!(listen.bind().is_err());
        drop(bound);
        listen.clean_up();
        assert!(!directory.path().join("s").exists());
    }
}
