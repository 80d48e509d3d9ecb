//! Who is at the other end of a connected UNIX socket: its credentials and its pidfd.
//!
//! `rustix` has `SO_PEERCRED` too, but as a process id that cannot be zero, and zero is what the
//! kernel says of a peer in another pid namespace.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use crate::option::{self, Plain};

/// What `SO_PEERCRED` says about a peer (`unix(7)`): as of its `connect`, `listen` or `socketpair`.
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// let (ours, _theirs) = UnixStream::pair()?;
/// let credentials: heirloom_sys::Credentials = heirloom_sys::peer_credentials(&ours)?;
/// assert_eq!(credentials.pid, std::process::id());
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// The process id, in our pid namespace; 0 when the peer has none there.
    pub pid: u32,
    /// The effective user id, in our user namespace; the overflow uid when it has none there.
    pub uid: u32,
    /// The effective group id, likewise.
    pub gid: u32,
}

/// `struct ucred` as the kernel lays it out; `libc::ucred` has no `Default`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Ucred {
    pid: libc::pid_t,
    uid: libc::uid_t,
    gid: libc::gid_t,
}

// SAFETY: three integers of the same size, hence no padding, and any bits are valid.
unsafe impl Plain for Ucred {}

/// The credentials of the peer of a UNIX socket.
///
/// A socket that is not connected reads pid 0 and uid and gid 4294967295. Errors are those of
/// `getsockopt(2)`.
///
/// ```
/// let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
/// assert_eq!(heirloom_sys::peer_credentials(&ours)?.pid, std::process::id());
/// # std::io::Result::Ok(())
/// ```
pub fn peer_credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let ucred: Ucred = option::get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    Ok(Credentials { pid: u32::try_from(ucred.pid).unwrap_or(0), uid: ucred.uid, gid: ucred.gid })
}

/// A pidfd of the process at the other end of a UNIX socket, close-on-exec (`SO_PEERPIDFD`).
///
/// It names the process that called `connect`, `listen` or `socketpair`, and never another one that
/// got the same number later. It is readable once that process has exited (`pidfd_open(2)`).
///
/// Errors: `ENOPROTOOPT` before Linux 6.5; `ENODATA` when the socket has no peer; `ESRCH` or `EINVAL`
/// when the peer is already gone and reaped (up to Linux 6.15; newer kernels still give a pidfd).
///
/// ```
/// let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
/// match heirloom_sys::peer_pidfd(&ours) {
///     Ok(_pidfd) => {} // of this process itself: it made both ends
///     Err(error) => eprintln!("a kernel before Linux 6.5? {error}"),
/// }
/// # std::io::Result::Ok(())
/// ```
pub fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let number: libc::c_int = option::get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PEERPIDFD)?;
    // SAFETY: on success the kernel has installed this new descriptor for the caller alone, with
    // close-on-exec set, so that nobody else owns or closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
