//! Where one listens or connects: a TCP address, or the path of a UNIX socket.
//!
//! An address is read once, with the configuration: a host name in it is looked up then, and not again until the next
//! configuration.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

/// The longest path of a UNIX socket in bytes: `sun_path` has 108, with a NUL (`unix(7)`).
const MAX_PATH: usize = 107;

/// An address as it was written, and the place that it means.
///
/// Two configurations speak of the same address when they write it alike, whatever a host name in it means by now: that is
/// how a listener is found again after a reload, or else by the place that is meant. Addresses are equal if their texts are.
///
/// ```
/// use heirloom_proxy::address::{Address, Place};
///
/// let address = Address::to_listen(":8080")?;
/// assert_eq!(address.text(), ":8080");
/// assert_eq!(address.place(), &Place::Tcp("[::]:8080".parse()?));
/// assert!(Address::to_connect(":8080").unwrap_err().to_string().contains("no host"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Address {
    text: String,
    place: Place,
}

/// What an [`Address`] means.
///
/// ```
/// use heirloom_proxy::address::{Address, Place};
///
/// let address = Address::to_connect("unix:/run/app.sock")?;
/// assert_eq!(address.place(), &Place::Unix("/run/app.sock".into()));
/// # Ok::<(), heirloom_proxy::address::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// TCP, over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A UNIX stream socket in the file system.
    Unix(PathBuf),
}

/// Why a text is no address.
///
/// ```
/// use heirloom_proxy::address::Address;
///
/// let error = Address::to_connect("127.0.0.1").unwrap_err();
/// assert_eq!(error.to_string(), r#""127.0.0.1" has no port: write HOST:PORT, or unix:/PATH"#);
/// ```
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// It is not written as one.
    #[error("{text:?} {why}")]
    Form {
        /// The text.
        text: String,
        /// What is wrong with it, and what would be right.
        why: &'static str,
    },
    /// The path of a UNIX socket does not fit into its address.
    #[error("the path {path:?} has {} bytes, and a UNIX socket's path has at most {MAX_PATH}: choose a shorter one", path.len())]
    TooLong {
        /// The path.
        path: String,
    },
    /// The host is not known.
    #[error("cannot find the host of {text:?}: {source}; write its address, or mend its name")]
    Host {
        /// The text.
        text: String,
        /// What the system says.
        source: io::Error,
    },
}

impl Address {
    /// Reads where to listen: `127.0.0.1:80`, `[::1]:80`, `localhost:80`, `unix:/PATH`, or `:80` for all addresses of
    /// this machine, IPv4 and IPv6. Port 0 is any that is free.
    ///
    /// # Errors
    ///
    /// When it is none of these, or a name that nobody knows.
    pub fn to_listen(text: &str) -> Result<Address, AddressError> {
        let place = match lone_port(text) {
            Some(port) => Place::Tcp(SocketAddr::from((Ipv6Addr::UNSPECIFIED, read_port(text, port)?))),
            None => read(text)?,
        };
        Ok(Address { text: text.to_owned(), place })
    }

    /// Reads where to connect: as where to [listen](Address::to_listen), but with a host and a port.
    ///
    /// # Errors
    ///
    /// When it is none of these, or a name that nobody knows.
    pub fn to_connect(text: &str) -> Result<Address, AddressError> {
        if lone_port(text).is_some() {
            return Err(wrong(
                text,
                "has no host: to connect to this machine write 127.0.0.1:PORT or [::1]:PORT",
            ));
        }
        let place = read(text)?;
        if matches!(place, Place::Tcp(address) if address.port() == 0) {
            return Err(wrong(
                text,
                "has port 0, to which nobody can connect: write that at which the backend listens",
            ));
        }
        Ok(Address { text: text.to_owned(), place })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it means.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Place {
    /// Whether who listens here, at all addresses of this machine, is also reached at that place, which is not this one: the same port.
    /// (All addresses of IPv6 are those of IPv4 as well.)
    pub(crate) fn takes_in(&self, other: &Place) -> bool {
        let (Place::Tcp(all), Place::Tcp(one)) = (self, other) else { return false };
        let is_same = all.port() == one.port() && all.port() != 0;
        is_same && all.ip().is_unspecified() && (all.is_ipv6() || one.is_ipv4()) && all != one
    }
}

impl PartialEq for Address {
    fn eq(&self, other: &Address) -> bool {
        self.text == other.text
    }
}

impl Eq for Address {}

impl Hash for Address {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
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

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The `80` of `:80`.
fn lone_port(text: &str) -> Option<&str> {
    text.strip_prefix(':').filter(|port| !port.contains(':'))
}

fn wrong(text: &str, why: &'static str) -> AddressError {
    AddressError::Form { text: text.to_owned(), why }
}

/// What is written the same way for both purposes.
fn read(text: &str) -> Result<Place, AddressError> {
    match text.strip_prefix("unix:") {
        Some(path) => read_path(text, path).map(Place::Unix),
        None => read_host_and_port(text).map(Place::Tcp),
    }
}

fn read_path(text: &str, path: &str) -> Result<PathBuf, AddressError> {
    if !Path::new(path).is_absolute() {
        return Err(wrong(text, "has no absolute path: write unix:/PATH"));
    }
    if path.contains(char::is_control) {
        return Err(wrong(text, "has a control character in its path: choose another path"));
    }
    if path.len() > MAX_PATH {
        return Err(AddressError::TooLong { path: path.to_owned() });
    }
    Ok(path.into())
}

fn read_host_and_port(text: &str) -> Result<SocketAddr, AddressError> {
    if text.starts_with('/') {
        return Err(wrong(text, "is a path: for a UNIX socket write unix:/PATH"));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(wrong(text, "has no port: write HOST:PORT, or unix:/PATH"));
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bare.is_none() && host.contains(':') {
        return Err(wrong(text, "is ambiguous: write an IPv6 address in brackets, [::1]:80 for instance"));
    }
    let port = read_port(text, port)?;
    let host = bare.unwrap_or(host);
    if host.is_empty() || host.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
        return Err(wrong(text, "has no host: write HOST:PORT, or unix:/PATH"));
    }
    let unknown = |source| AddressError::Host { text: text.to_owned(), source };
    let mut addresses = (host, port).to_socket_addrs().map_err(unknown)?;
    // In the order of the system's configuration, /etc/gai.conf.
    addresses.next().ok_or_else(|| unknown(io::Error::from(io::ErrorKind::NotFound)))
}

fn read_port(text: &str, port: &str) -> Result<u16, AddressError> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| wrong(text, "has no port from 0 to 65535 after its last colon"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_meant() {
        for (text, place) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::1]:65535", "[::1]:65535"),
            ("[fe80::1%1]:80", "[fe80::1%1]:80"),
            (":80", "[::]:80"),
        ] {
            let address = Address::to_listen(text).unwrap();
            assert_eq!(address.place(), &Place::Tcp(place.parse().unwrap()), "{text}");
            assert_eq!((address.text(), address.to_string().as_str()), (text, text));
        }
        let address = Address::to_connect("unix:/run/a b.sock").unwrap();
        assert_eq!(address.place(), &Place::Unix("/run/a b.sock".into()));
        assert_eq!(address.place().to_string(), address.text());
        let longest = format!("unix:/{}", "x".repeat(MAX_PATH - 1));
        assert!(Address::to_listen(&longest).is_ok());
    }

    #[test]
    fn a_host_is_looked_up() {
        let address = Address::to_connect("localhost:80").unwrap();
        assert!(
            matches!(address.place(), Place::Tcp(place) if place.ip().is_loopback() && place.port() == 80)
        );
        assert_eq!(address.text(), "localhost:80");
        // A name with an empty label is none anywhere, so that nobody is asked for it.
        let error = Address::to_connect("no..such:80").unwrap_err().to_string();
        assert!(error.contains("cannot find the host of \"no..such:80\""), "{error}");
    }

    #[test]
    fn what_is_no_address_is_an_error_that_says_what_would_be_one() {
        for (text, says) in [
            ("", "HOST:PORT"),
            ("80", "no port"),
            ("127.0.0.1", "no port"),
            ("127.0.0.1:", "0 to 65535"),
            ("127.0.0.1:65536", "0 to 65535"),
            ("127.0.0.1:+80", "0 to 65535"),
            ("127.0.0.1:http", "0 to 65535"),
            ("::1:80", "brackets"),
            ("[]:80", "no host"),
            (" :80", "no host"),
            ("/run/app.sock", "unix:/PATH"),
            ("unix:", "absolute"),
            ("unix:run/app.sock", "absolute"),
            ("unix:/run/\0", "control character"),
        ] {
            for error in [Address::to_listen(text), Address::to_connect(text)] {
                let error = error.unwrap_err().to_string();
                assert!(error.contains(says), "{text}: {error}");
            }
        }
        for (text, says) in [(":80", "no host"), ("127.0.0.1:0", "port 0"), ("[::1]:0", "port 0")] {
            let error = Address::to_connect(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let long = format!("unix:/{}", "x".repeat(MAX_PATH));
        let error = Address::to_listen(&long).unwrap_err().to_string();
        assert!(error.contains("108 bytes"), "{error}");
    }

    #[test]
    fn addresses_are_the_same_if_they_are_written_alike() {
        let plain = Address::from("127.0.0.1:80".parse::<SocketAddr>().unwrap());
        assert_eq!(plain, Address::to_listen("127.0.0.1:80").unwrap());
        assert_ne!(plain, Address::to_listen("127.0.0.1:080").unwrap());
    }
}
