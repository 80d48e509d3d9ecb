//! Telling the supervisor: the client's side of `sd_notify(3)`, for systemd and for `heirloom run`.
//!
//! A [`Message`] is one datagram of assignments, with which descriptors may travel. What this module promises: sending never
//! blocks (a supervisor that does not read makes it [`NotifyError::Full`]), no descriptor is given away (the receiver gets
//! duplicates), and what was sent is delivered though this process dies at once.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::clock;
use crate::descriptors::{Wait, send_with};

/// The variable that names the supervisor's socket: a path, or `@` and an abstract name.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The longest name in an fd store (sd_pid_notify_with_fds(3)).
pub const MAX_NAME: usize = 255;

/// A datagram's worth of assignments.
///
/// ```
/// use heirloom::notify::Message;
///
/// let message = Message::new().ready().status("12 clients");
/// assert_eq!(message.as_str(), "READY=1\nSTATUS=12 clients\n");
/// assert_eq!(Message::new().store("h7").as_str(), "FDSTORE=1\nFDNAME=h7\nFDPOLL=0\n");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    text: String,
}

impl Message {
    /// A message that says nothing yet.
    #[must_use]
    pub fn new() -> Message {
        Message::default()
    }

    /// The service has started, or has finished reloading.
    #[must_use]
    pub fn ready(self) -> Message {
        self.assign("READY", "1")
    }

    /// The service reloads its configuration from now on; it is to say [`ready`](Message::ready) afterwards. With the time, as
    /// `Type=notify-reload` wants it.
    #[must_use]
    pub fn reloading(self) -> Message {
        self.assign("RELOADING", "1").assign("MONOTONIC_USEC", clock::monotonic_ns() / 1000)
    }

    /// The service is about to end.
    #[must_use]
    pub fn stopping(self) -> Message {
        self.assign("STOPPING", "1")
    }

    /// What the service does, for people. A line break in it becomes a space.
    #[must_use]
    pub fn status(self, status: &str) -> Message {
        self.assign("STATUS", status.replace(['\n', '\r'], " "))
    }

    /// Another process is the main one of the service now.
    #[must_use]
    pub fn main_pid(self, pid: u32) -> Message {
        self.assign("MAINPID", pid)
    }

    /// The service is alive; to be said at least every [`watchdog_interval`].
    #[must_use]
    pub fn watchdog(self) -> Message {
        self.assign("WATCHDOG", "1")
    }

    /// Keep the descriptors that come along under this name, also when they hang up (`FDPOLL=0`).
    #[must_use]
    pub fn store(self, name: &str) -> Message {
        self.assign("FDSTORE", "1").assign("FDNAME", name).assign("FDPOLL", "0")
    }

    /// Close the descriptors that are kept under this name.
    #[must_use]
    pub fn remove(self, name: &str) -> Message {
        self.assign("FDSTOREREMOVE", "1").assign("FDNAME", name)
    }

    /// Any other assignment. Names and values are to hold no line break: whatever follows it would be one more assignment.
    #[must_use]
    pub fn assign(mut self, name: &str, value: impl std::fmt::Display) -> Message {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{name}={value}");
        self
    }

    /// The datagram's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Why the supervisor was not told.
///
/// ```
/// use heirloom::notify::{Notifier, NotifyError};
///
/// let error = Notifier::to("relative/path".as_ref()).unwrap_err();
/// assert!(matches!(error, NotifyError::Address { .. }));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// The address is none that a supervisor's socket has.
    #[error("{NOTIFY_SOCKET} is {address:?}, which is neither an absolute path nor an abstract name")]
    Address {
        /// The address.
        address: OsString,
    },
    /// Nobody can be reached there.
    #[error("cannot reach the supervisor at {}: {source}", address.display())]
    Unreachable {
        /// The address.
        address: OsString,
        /// What the system says.
        source: io::Error,
    },
    /// The supervisor has not read what was sent before: send again when the [`Notifier`] is writable.
    #[error("the supervisor does not read what it is told")]
    Full,
    /// The supervisor has not read everything within the time limit.
    #[error("the supervisor did not read what it was told within {0:?}")]
    Timeout(Duration),
    /// The message was not sent.
    #[error("cannot tell the supervisor: {0}")]
    Io(#[from] io::Error),
}

/// The way to the supervisor.
///
/// Its descriptor is writable when a message can be sent that was too many before.
///
/// ```
/// use heirloom::notify::{Message, Notifier};
///
/// if let Some(supervisor) = Notifier::from_environment()? {
///     supervisor.send(&Message::new().ready())?;
/// }
/// # Ok::<(), heirloom::notify::NotifyError>(())
/// ```
#[derive(Debug)]
pub struct Notifier {
    address: OsString,
    socket: OwnedFd,
}

impl Notifier {
    /// The supervisor of this process, if it has one that wants to be told: see [`NOTIFY_SOCKET`].
    ///
    /// # Errors
    ///
    /// There is one, and it cannot be reached.
    pub fn from_environment() -> Result<Option<Notifier>, NotifyError> {
        match std::env::var_os(NOTIFY_SOCKET) {
            Some(address) if !address.is_empty() => Notifier::to(&address).map(Some),
            _ => Ok(None),
        }
    }

    /// The supervisor at this address: an absolute path, or `@` and an abstract name.
    ///
    /// # Errors
    ///
    /// [`NotifyError::Address`] or [`NotifyError::Unreachable`].
    pub fn to(address: &OsStr) -> Result<Notifier, NotifyError> {
        let peer = match address.as_bytes() {
            [b'@', name @ ..] if !name.is_empty() => SocketAddrUnix::new_abstract_name(name),
            [b'/', ..] => SocketAddrUnix::new(address.as_bytes()),
            _ => return Err(NotifyError::Address { address: address.into() }),
        };
        let unreachable =
            |error: Errno| NotifyError::Unreachable { address: address.into(), source: error.into() };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(unreachable)?;
        peer.and_then(|peer| connect(&socket, &peer)).map_err(unreachable)?;
        Ok(Notifier { address: address.into(), socket })
    }

    /// Tells this supervisor from any other one, also from one at the same path in another mount namespace or before it.
    pub(crate) fn supervisor(&self) -> String {
        let address = self.address.to_string_lossy();
        match std::fs::metadata(&self.address) {
            Ok(file) => {
                format!("{address} {}:{} {}.{}", file.dev(), file.ino(), file.mtime(), file.mtime_nsec())
            }
            Err(_) => address.into_owned(),
        }
    }

    /// Tells something.
    ///
    /// # Errors
    ///
    /// [`NotifyError::Full`]: send it again when the notifier is writable. [`NotifyError::Io`]: the supervisor has gone.
    pub fn send(&self, message: &Message) -> Result<(), NotifyError> {
        self.send_with(message, &[])
    }

    /// Tells something, with duplicates of these descriptors: at most [`PER_MESSAGE`](crate::descriptors::PER_MESSAGE).
    ///
    /// # Errors
    ///
    /// As [`Notifier::send`]; also [`NotifyError::Full`] when too many descriptors are in flight (`ETOOMANYREFS`).
    pub fn send_with(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), NotifyError> {
        match send_with(&self.socket, message.text.as_bytes(), descriptors, Wait::DontWait) {
            Ok(_) => Ok(()),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::TOOMANYREFS | Errno::NOBUFS) => Err(NotifyError::Full),
                _ => Err(error.into()),
            },
        }
    }

    /// Waits until the supervisor has read and done everything that was sent before (`BARRIER=1`).
    ///
    /// # Errors
    ///
    /// As [`Notifier::send`], or [`NotifyError::Timeout`].
    pub fn barrier(&self, limit: Duration) -> Result<(), NotifyError> {
        let until = clock::monotonic_ns().saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX));
        let (ours, theirs) = io::pipe()?;
        loop {
            match self.send_with(&Message::new().assign("BARRIER", "1"), &[theirs.as_fd()]) {
                Err(NotifyError::Full) => wait(&self.socket, PollFlags::OUT, until, limit)?,
                sent => break sent?,
            }
        }
        drop(theirs);
        // The supervisor's is the last duplicate: when it closes that, the pipe hangs up.
        wait(&ours, PollFlags::empty(), until, limit)
    }

    /// Where the supervisor is.
    #[must_use]
    pub fn address(&self) -> &OsStr {
        &self.address
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How often a supervisor with a watchdog wants to hear [`Message::watchdog`] at the latest, if this process is the one that
/// it watches. To be on the safe side say it twice as often.
///
/// ```
/// // By WATCHDOG_USEC and WATCHDOG_PID, see sd_watchdog_enabled(3).
/// assert_eq!(heirloom::notify::watchdog_interval(), None);
/// ```
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    let number = |name| std::env::var(name).ok().map(|value| value.parse::<u64>());
    let ours = match number("WATCHDOG_PID") {
        Some(pid) => pid.is_ok_and(|pid| pid == u64::from(std::process::id())),
        None => true,
    };
    number("WATCHDOG_USEC")?.ok().filter(|&usec| ours && usec > 0).map(Duration::from_micros)
}

/// Whether this process has a supervisor that wants to be told: [`NOTIFY_SOCKET`] is set and not empty.
#[must_use]
pub fn is_supervised() -> bool {
    std::env::var_os(NOTIFY_SOCKET).is_some_and(|address| !address.is_empty())
}

/// Waits for a descriptor until a time of [`clock::monotonic_ns`].
fn wait(fd: impl AsFd, events: PollFlags, until: u64, limit: Duration) -> Result<(), NotifyError> {
    loop {
        let left = Duration::from_nanos(until.saturating_sub(clock::monotonic_ns()));
        let timeout = left.try_into().ok();
        match poll(&mut [PollFd::new(&fd, events)], timeout.as_ref()) {
            Ok(0) => return Err(NotifyError::Timeout(limit)),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::descriptors::receive_with;

    fn supervisor() -> (tempfile::TempDir, UnixDatagram, Notifier) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str()).unwrap();
        (directory, socket, notifier)
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (_directory, socket, notifier) = supervisor();
        let (reader, writer) = io::pipe().unwrap();
        notifier.send_with(&Message::new().store("h1"), &[reader.as_fd(), writer.as_fd()]).unwrap();
        let mut buffer = [0; 100];
        let received = receive_with(&socket, &mut buffer, Wait::DontWait).unwrap();
        assert_eq!(&buffer[..received.bytes], b"FDSTORE=1\nFDNAME=h1\nFDPOLL=0\n");
        assert_eq!(received.descriptors.len(), 2);
    }

    #[test]
    fn an_abstract_socket_does_too() {
        let name = format!("heirloom-notify-test-{}", std::process::id());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        let notifier = Notifier::to(format!("@{name}").as_ref()).unwrap();
        notifier.send(&Message::new().stopping().main_pid(7)).unwrap();
        let mut buffer = [0; 100];
        let received = receive_with(&socket, &mut buffer, Wait::DontWait).unwrap();
        assert_eq!(&buffer[..received.bytes], b"STOPPING=1\nMAINPID=7\n");
    }

    #[test]
    fn a_supervisor_that_does_not_read_blocks_nobody() {
        let (_directory, socket, notifier) = supervisor();
        let mut sent = 0;
        let error = loop {
            match notifier.send(&Message::new().watchdog()) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(sent > 0 && matches!(error, NotifyError::Full), "{sent}: {error}");
        let limit = Duration::from_millis(1);
        assert!(matches!(notifier.barrier(limit), Err(NotifyError::Timeout(_))));
        assert!(receive_with(&socket, &mut [0; 100], Wait::DontWait).is_ok());
        notifier.send(&Message::new().watchdog()).unwrap();
    }

    #[test]
    fn a_barrier_ends_when_the_supervisor_closes_its_end() {
        let (_directory, socket, notifier) = supervisor();
        let supervisor = std::thread::spawn(move || {
            let mut buffer = [0; 100];
            let received = receive_with(&socket, &mut buffer, Wait::Block).unwrap();
            assert_eq!((&buffer[..received.bytes], received.descriptors.len()), (&b"BARRIER=1\n"[..], 1));
        });
        notifier.barrier(Duration::from_secs(60)).unwrap();
        supervisor.join().unwrap();
    }

    #[test]
    fn nobody_at_the_address_is_an_error_that_names_it() {
        for (address, what) in
            [("/nowhere/at all", "/nowhere/at all"), ("@nobody at all", "@nobody"), ("", "neither")]
        {
            let error = Notifier::to(address.as_ref()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let one_line = Message::new().status("two\nlines");
        assert_eq!(one_line.as_str(), "STATUS=two lines\n");
        let reloading = Message::new().reloading();
        assert!(reloading.as_str().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    }
}
