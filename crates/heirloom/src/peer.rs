//! Who is at the other end of a UNIX socket, whether it still runs, and whether it may ask.
//!
//! A [`Peer`] is found from the socket by the kernel's word, never from what the other side says. It
//! names the process that called `connect` (on an accepted connection), `socketpair` (on a channel) or
//! `listen` (on a connecting socket: after a takeover that is a dead ancestor, unless the new owner
//! has called [`relisten`](crate::control::path::relisten)). Processes are killed and watched by pidfd
//! only, because a number may be somebody else's by the time that it is used.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

/// The process at the other end of a connected UNIX socket.
///
/// ```
/// use heirloom::peer::Peer;
///
/// let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
/// let peer = Peer::of(&ours)?;
/// assert_eq!(peer.pid, Some(std::process::id()));
/// assert_ne!(peer.exited()?, Some(true));
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Peer {
    /// Its process id, for messages; `None` when it runs in a pid namespace that we cannot see into.
    pub pid: Option<u32>,
    /// Its effective user id when the connection was made, as seen in our user namespace.
    pub uid: u32,
    /// Its effective group id when the connection was made.
    pub gid: u32,
    handle: Handle,
}

/// How the process can be watched.
#[derive(Debug)]
enum Handle {
    Pidfd(OwnedFd),
    /// It had exited and been reaped before a pidfd could be had.
    Exited,
    /// This kernel has no pidfds.
    Unknown,
}

impl Peer {
    /// The peer of a connected UNIX socket, by `SO_PEERCRED` and `SO_PEERPIDFD` (`unix(7)`).
    ///
    /// Before Linux 6.5, which lacks the latter, the pidfd is opened by number: should the peer have
    /// exited and its number been given to another process already, it is that one's. Before Linux 5.3
    /// there is none. Errors are those of `getsockopt(2)` and `pidfd_open(2)`.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        let socket = socket.as_fd();
        let credentials = heirloom_sys::peer_credentials(socket)?;
        let pid = (credentials.pid != 0).then_some(credentials.pid);
        let handle = match heirloom_sys::peer_pidfd(socket) {
            Ok(pidfd) => Handle::Pidfd(pidfd),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOPROTOOPT) => open_by_number(pid)?,
                // ENODATA: the kernel knows of no process, as for a socket without a peer.
                Some(Errno::NODATA) => Handle::Unknown,
                Some(Errno::SRCH | Errno::INVAL) => Handle::Exited,
                _ => return Err(error),
            },
        };
        Ok(Peer { pid, uid: credentials.uid, gid: credentials.gid, handle })
    }

    /// A pidfd of the process: readable once it has exited, so that a loop can wait for that.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.handle {
            Handle::Pidfd(pidfd) => Some(pidfd.as_fd()),
            Handle::Exited | Handle::Unknown => None,
        }
    }

    /// Whether the process has exited, all its threads included; `None` when this kernel cannot tell.
    ///
    /// True also of a zombie: its descriptors are closed by then.
    pub fn exited(&self) -> io::Result<Option<bool>> {
        match &self.handle {
            Handle::Pidfd(pidfd) => {
                let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
                let ready = retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))?;
                Ok(Some(ready > 0))
            }
            Handle::Exited => Ok(Some(true)),
            Handle::Unknown => Ok(None),
        }
    }

    /// Sends it `SIGKILL`. Succeeds as well when it has exited already; does not wait for the exit.
    ///
    /// Errors: `Unsupported` without a pidfd; `PermissionDenied` when the process is not ours to kill;
    /// `InvalidInput` when it is in a pid namespace that we cannot see into (`pidfd_send_signal(2)`).
    pub fn kill(&self) -> io::Result<()> {
        match &self.handle {
            Handle::Pidfd(pidfd) => match pidfd_send_signal(pidfd, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => Ok(()),
                Err(error) => Err(error.into()),
            },
            Handle::Exited => Ok(()),
            Handle::Unknown => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{self} cannot be killed safely: this kernel gives no pidfd of it"),
            )),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "pid {pid} (uid {})", self.uid),
            None => write!(f, "a process of another pid namespace (uid {})", self.uid),
        }
    }
}

/// Which users and groups may ask: by default our own effective user and root.
///
/// What counts is the peer's effective uid and gid at the time of its `connect`, as the kernel tells them (`SO_PEERCRED`);
/// supplementary groups do not. Whoever is let in also has to reach the socket, which is made with mode 0600 in a private
/// directory: opening these two to the user or the group is left to whoever configures it.
///
/// The overflow uid, which stands for every user that our user namespace does not know, is refused
/// even when it is listed (`/proc/sys/kernel/overflowuid`, 65534 unless set otherwise), whatever the gid. The overflow gid
/// lets nobody in either (`/proc/sys/kernel/overflowgid`).
///
/// ```
/// use heirloom::peer::{Peer, PeerPolicy};
///
/// let policy = PeerPolicy::default().allow_uid(1000).allow_gid(27);
/// let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
/// assert!(policy.check(&Peer::of(&ours)?).is_ok());
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct PeerPolicy {
    uids: BTreeSet<u32>,
    gids: BTreeSet<u32>,
    overflow_uid: u32,
    overflow_gid: u32,
}

/// A peer that may not ask.
///
/// ```
/// use heirloom::peer::{Peer, PeerPolicy, Refused};
///
/// fn may_ask(policy: &PeerPolicy, peer: &Peer) -> bool {
///     match policy.check(peer) {
///         Ok(()) => true,
///         Err(refused @ Refused { .. }) => {
///             println!("{refused}");
///             false
///         }
///     }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{peer} may not ask here: {reason}")]
pub struct Refused {
    peer: String,
    reason: String,
}

impl PeerPolicy {
    /// Lets another user ask too.
    #[must_use]
    pub fn allow_uid(mut self, uid: u32) -> PeerPolicy {
        self.uids.insert(uid);
        self
    }

    /// Lets every process ask whose effective group this is, of whatever user.
    #[must_use]
    pub fn allow_gid(mut self, gid: u32) -> PeerPolicy {
        self.gids.insert(gid);
        self
    }

    /// Whether this peer may ask.
    ///
    /// # Errors
    ///
    /// [`Refused`] says who asked, who may, and what to do.
    pub fn check(&self, peer: &Peer) -> Result<(), Refused> {
        self.check_ids(peer.uid, peer.gid).map_err(|reason| Refused { peer: peer.to_string(), reason })
    }

    fn check_ids(&self, uid: u32, gid: u32) -> Result<(), String> {
        if uid == self.overflow_uid {
            return Err(format!(
                "uid {uid} stands for every user unknown in this user namespace; run both programs \
                 in the same user namespace"
            ));
        }
        if uid == NOBODY_AT_ALL {
            return Err("the socket has no peer".to_owned());
        }
        let group_may = gid != self.overflow_gid && gid != NOBODY_AT_ALL && self.gids.contains(&gid);
        if !group_may && !self.uids.contains(&uid) {
            let list = |ids: &BTreeSet<u32>| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            let mut allowed = format!("the uids {}", list(&self.uids));
            if !self.gids.is_empty() {
                allowed += &format!(" and the gids {} (this is gid {gid})", list(&self.gids));
            }
            return Err(format!(
                "allowed are {allowed}; run it as one of these users, or allow uid {uid} in the \
                 configuration of the program that serves"
            ));
        }
        Ok(())
    }
}

impl Default for PeerPolicy {
    fn default() -> PeerPolicy {
        PeerPolicy {
            uids: BTreeSet::from([0, geteuid().as_raw()]),
            gids: BTreeSet::new(),
            overflow_uid: overflow("/proc/sys/kernel/overflowuid"),
            overflow_gid: overflow("/proc/sys/kernel/overflowgid"),
        }
    }
}

/// The uid and gid of a socket without a peer: the kernel's "no id", −1.
const NOBODY_AT_ALL: u32 = u32::MAX;

fn overflow(file: &str) -> u32 {
    std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65534)
}

fn open_by_number(pid: Option<u32>) -> io::Result<Handle> {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok());
    let Some(pid) = pid.and_then(Pid::from_raw) else {
        return Ok(Handle::Unknown);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Handle::Pidfd(pidfd)),
        Err(Errno::SRCH) => Ok(Handle::Exited),
        Err(Errno::NOSYS) => Ok(Handle::Unknown),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn child() -> std::process::Child {
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_process_found_by_number_is_watched_and_killed() {
        let mut child = child();
        let peer =
            Peer { pid: Some(child.id()), uid: 0, gid: 0, handle: open_by_number(Some(child.id())).unwrap() };
        assert_eq!(peer.exited().unwrap(), Some(false));
        peer.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(peer.exited().unwrap(), Some(true));
        peer.kill().unwrap(); // nothing left to do
        assert!(matches!(open_by_number(Some(child.id())).unwrap(), Handle::Exited));
    }

    #[test]
    fn a_process_without_a_pidfd_is_not_killed() {
        let peer = Peer { pid: None, uid: 7, gid: 7, handle: open_by_number(None).unwrap() };
        assert_eq!(peer.exited().unwrap(), None);
        assert_eq!(peer.kill().unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(peer.to_string(), "a process of another pid namespace (uid 7)");
    }

    fn policy() -> PeerPolicy {
        let uids = BTreeSet::from([0, 1000]);
        PeerPolicy { uids, gids: BTreeSet::new(), overflow_uid: 65534, overflow_gid: 65533 }
    }

    #[test]
    fn by_user() {
        let policy = policy();
        assert!(policy.check_ids(0, 5).is_ok());
        assert!(policy.check_ids(1000, 65533).is_ok(), "its group does not matter");
        let reason = policy.check_ids(4321, 0).unwrap_err();
        assert!(reason.contains("4321") && reason.contains("the uids 0, 1000;"), "{reason}");
        assert!(policy.clone().allow_uid(4321).check_ids(4321, 5).is_ok());
        assert!(policy.clone().allow_uid(65534).check_ids(65534, 5).is_err());
        assert!(policy.allow_uid(u32::MAX).check_ids(u32::MAX, 5).is_err());
    }

    #[test]
    fn by_group() {
        let policy = policy().allow_gid(27);
        assert!(policy.check_ids(4321, 27).is_ok());
        assert!(policy.check_ids(1000, 5).is_ok(), "its user may ask");
        let reason = policy.check_ids(4321, 28).unwrap_err();
        for part in ["uid 4321", "the uids 0, 1000 and the gids 27", "gid 28"] {
            assert!(reason.contains(part), "{part:?} is not in: {reason}");
        }
        assert!(policy.check_ids(65534, 27).is_err(), "nobody knows whose it is");
        assert!(policy.check_ids(u32::MAX, 27).is_err(), "there is nobody");
        let policy = policy.allow_gid(65533).allow_gid(u32::MAX);
        assert!(policy.check_ids(4321, 65533).is_err());
        assert!(policy.check_ids(4321, u32::MAX).is_err());
    }
}
