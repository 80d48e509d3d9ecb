//! Passing descriptors over a UNIX socket, and how many more this process can hold.
//!
//! [`send_with`] and [`receive_with`] are `sendmsg(2)` and `recvmsg(2)` with `SCM_RIGHTS`, so that no
//! descriptor is ever leaked or inherited by accident: what is received is owned and close-on-exec,
//! and whatever does not fit is reported. The rest of the crate passes descriptors by these two alone.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most descriptors in one message: the kernel's `SCM_MAX_FD` (`unix(7)`).
pub const PER_MESSAGE: usize = 253;

/// Bytes of control buffer for [`PER_MESSAGE`] descriptors.
const CONTROL_SPACE: usize = rustix::cmsg_space!(ScmRights(PER_MESSAGE));

/// What to do when the socket is not ready.
///
/// ```
/// use heirloom::descriptors::{Wait, receive_with};
///
/// let (_ours, theirs) = std::os::unix::net::UnixStream::pair()?;
/// let error = receive_with(&theirs, &mut [0; 8], Wait::DontWait).unwrap_err();
/// assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Wait, unless the socket itself is non-blocking.
    Block,
    /// Return an error of kind `WouldBlock` at once, whatever the socket's own flags say.
    DontWait,
}

/// What one [`receive_with`] has got.
///
/// Dropping it closes the descriptors.
///
/// ```
/// use heirloom::descriptors::{Received, Wait, receive_with, send_with};
///
/// let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
/// send_with(&ours, b"hi", &[], Wait::Block)?;
/// let Received { bytes, descriptors, .. } = receive_with(&theirs, &mut [0; 8], Wait::Block)?;
/// assert_eq!((bytes, descriptors.len()), (2, 0));
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the front of the buffer. 0 is the end, or an empty message.
    pub bytes: usize,
    /// The descriptors that came along, in the order in which they were sent, all close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// The message was longer than the buffer and the rest is lost (never on a stream).
    pub data_truncated: bool,
    /// Not every descriptor could be taken, mostly for want of room under `RLIMIT_NOFILE`. The kernel
    /// has closed the others without telling how many they were.
    pub descriptors_truncated: bool,
}

/// Sends bytes and, with the first of them, duplicates of descriptors. Returns the bytes sent, which
/// on a stream may be fewer than given; the descriptors are then on their way all the same.
///
/// Never raises `SIGPIPE`, and is repeated when a signal interrupts it. Errors are those of
/// `sendmsg(2)` and `unix(7)`, and `InvalidInput` for more than [`PER_MESSAGE`] descriptors or for
/// descriptors without a byte (a stream loses them).
///
/// ```
/// use heirloom::descriptors::{Wait, receive_with, send_with};
/// use std::os::fd::AsFd;
///
/// let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
/// let null = std::fs::File::open("/dev/null")?;
/// send_with(&ours, b"here", &[null.as_fd()], Wait::Block)?;
///
/// let mut buffer = [0; 16];
/// let received = receive_with(&theirs, &mut buffer, Wait::Block)?;
/// assert_eq!(&buffer[..received.bytes], b"here");
/// assert_eq!(received.descriptors.len(), 1);
/// # std::io::Result::Ok(())
/// ```
pub fn send_with(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    wait: Wait,
) -> io::Result<usize> {
    if descriptors.len() > PER_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} descriptors do not fit in one message: send at most {PER_MESSAGE} at a time",
                descriptors.len()
            ),
        ));
    }
    if bytes.is_empty() && !descriptors.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "descriptors need at least one byte to travel with",
        ));
    }

    let mut flags = SendFlags::NOSIGNAL;
    if wait == Wait::DontWait {
        flags |= SendFlags::DONTWAIT;
    }
    let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("the control buffer is too small"));
    }
    let data = [IoSlice::new(bytes)];
    Ok(retry_on_intr(|| rustix::net::sendmsg(&socket, &data, &mut control, flags))?)
}

/// Receives bytes and the descriptors that come with them.
///
/// Takes every descriptor that arrives, whether expected or not, and is repeated when a signal
/// interrupts it. Errors are those of `recvmsg(2)`. See [`send_with`] for an example.
pub fn receive_with(socket: impl AsFd, buffer: &mut [u8], wait: Wait) -> io::Result<Received> {
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if wait == Wait::DontWait {
        flags |= RecvFlags::DONTWAIT;
    }
    let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = retry_on_intr(|| {
        let data = &mut [IoSliceMut::new(buffer)];
        rustix::net::recvmsg(&socket, data, &mut control, flags)
    })?;

    // To the end in any case: a drain that is abandoned half way leaks what it has not yielded.
    let mut descriptors = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
            descriptors.extend(rights);
        }
    }
    Ok(Received {
        bytes: message.bytes,
        descriptors,
        data_truncated: message.flags.contains(ReturnFlags::TRUNC),
        descriptors_truncated: message.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// How many descriptors this process has open, standard streams included.
///
/// Errors when `/proc` is not there.
///
/// ```
/// assert!(heirloom::descriptors::open_descriptors()? >= 3);
/// # std::io::Result::Ok(())
/// ```
pub fn open_descriptors() -> io::Result<u64> {
    // The size of this directory is the number, without a walk through it (Linux 6.2, proc_pid_fd(5)).
    let size = std::fs::metadata("/proc/self/fd")?.len();
    if size > 0 {
        return Ok(size);
    }
    let listed = std::fs::read_dir("/proc/self/fd")?.count() as u64;
    Ok(listed.saturating_sub(1)) // the one that lists is listed too
}

/// How many more descriptors fit under the soft limit on open files (`RLIMIT_NOFILE`).
///
/// [`u64::MAX`] when there is no limit. Other threads may use the room up at any time.
///
/// ```
/// assert!(heirloom::descriptors::room()? > 0);
/// # std::io::Result::Ok(())
/// ```
pub fn room() -> io::Result<u64> {
    match getrlimit(Resource::Nofile).current {
        Some(soft) => Ok(soft.saturating_sub(open_descriptors()?)),
        None => Ok(u64::MAX),
    }
}

/// The soft limit on open files (`RLIMIT_NOFILE`), [`u64::MAX`] when there is none.
///
/// ```
/// assert!(heirloom::descriptors::limit() > 0);
/// ```
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Raises the soft limit on open files to the hard one, and returns the soft limit of before and of
/// now ([`u64::MAX`] for none).
///
/// The limit belongs to the process and is inherited by its children. Programs that use `select(2)`
/// break above 1024, so give the old limit back to children that are not ours.
///
/// ```
/// let (before, now) = heirloom::descriptors::raise_limit()?;
/// assert!(before <= now);
/// # std::io::Result::Ok(())
/// ```
pub fn raise_limit() -> io::Result<(u64, u64)> {
    let limits = getrlimit(Resource::Nofile);
    let before = limits.current.unwrap_or(u64::MAX);
    let hard = limits.maximum.unwrap_or(u64::MAX);
    if before < hard {
        setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum })?;
    }
    Ok((before, hard))
}
