//! One datagram of a UNIX socket with all that came along: descriptors, and who sent it.
//!
//! `rustix` receives credentials too, but with a process id that cannot be zero, and zero is what the kernel says of a
//! sender in another pid namespace.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::Credentials;

/// The most descriptors in one message: the kernel's `SCM_MAX_FD` (`unix(7)`).
const MOST: usize = 253;

/// What [`receive_datagram`] has got. Dropping it closes the descriptors.
///
/// ```
/// use std::os::unix::net::UnixDatagram;
///
/// let (ours, theirs) = UnixDatagram::pair()?;
/// ours.send(b"READY=1")?;
/// let datagram = heirloom_sys::receive_datagram(&theirs, &mut [0; 64])?;
/// assert_eq!((datagram.bytes, datagram.descriptors.len()), (7, 0));
/// assert!(datagram.sender.is_none(), "nobody has asked for credentials");
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Datagram {
    /// How many bytes of the buffer it fills.
    pub bytes: usize,
    /// It was longer than the buffer, and its rest is lost.
    pub truncated: bool,
    /// The descriptors that came along, in their order, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// There were more, which the kernel has closed: for want of room under `RLIMIT_NOFILE`, mostly.
    pub descriptors_truncated: bool,
    /// Who sent it, if the socket has `SO_PASSCRED`.
    pub sender: Option<Credentials>,
}

/// Space for control messages, aligned as they need it.
#[repr(align(8))]
struct Space([MaybeUninit<u8>; 2048]);

/// Receives one datagram, without waiting.
///
/// Errors are those of `recvmsg(2)`; of kind `WouldBlock` when there is none.
pub fn receive_datagram(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Datagram> {
    receive(socket, buffer, 0)
}

/// Looks at one datagram, without waiting, and leaves it where it is: what comes along are duplicates. Which one is told by
/// [`set_peek_offset`].
///
/// Errors are those of `recvmsg(2)`; of kind `WouldBlock` when there is none.
///
/// ```
/// use std::os::unix::net::UnixDatagram;
///
/// let (ours, theirs) = UnixDatagram::pair()?;
/// ours.send(b"first")?;
/// ours.send(b"second")?;
/// heirloom_sys::set_peek_offset(&theirs, Some(0))?;
/// let mut buffer = [0; 64];
/// assert_eq!(heirloom_sys::peek_datagram(&theirs, &mut buffer)?.bytes, 5);
/// assert_eq!(heirloom_sys::peek_datagram(&theirs, &mut buffer)?.bytes, 6);
/// assert!(heirloom_sys::peek_datagram(&theirs, &mut buffer).is_err(), "that was the last");
/// assert_eq!(theirs.recv(&mut buffer)?, 5);
/// # std::io::Result::Ok(())
/// ```
pub fn peek_datagram(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Datagram> {
    receive(socket, buffer, libc::MSG_PEEK)
}

/// From which byte of the queue on is looked, and goes on with each look (`SO_PEEK_OFF`, socket(7)). None: always at the
/// first message, as is usual.
///
/// Errors are those of `setsockopt(2)`.
pub fn set_peek_offset(socket: impl AsFd, offset: Option<u32>) -> io::Result<()> {
    let value: libc::c_int = offset.map_or(-1, |offset| offset.try_into().unwrap_or(libc::c_int::MAX));
    // SAFETY: the pointer is to a live integer of the length that is said, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast(),
            mem::size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn receive(socket: impl AsFd, buffer: &mut [u8], more: libc::c_int) -> io::Result<Datagram> {
    // SAFETY: these take a length and compute with it.
    let needed = unsafe {
        libc::CMSG_SPACE((MOST * mem::size_of::<libc::c_int>()) as u32)
            + libc::CMSG_SPACE(mem::size_of::<libc::ucred>() as u32)
    };
    let mut space = Space([MaybeUninit::uninit(); 2048]);
    debug_assert!(needed as usize <= space.0.len());
    let mut data = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a msghdr is integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut data;
    header.msg_iovlen = 1;
    header.msg_control = space.0.as_mut_ptr().cast();
    header.msg_controllen = space.0.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | more;
    let bytes = loop {
        // SAFETY: the header points to live buffers of the lengths that it says, and the kernel writes within them.
        let bytes = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags) };
        if bytes >= 0 {
            break bytes as usize;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let mut datagram = Datagram {
        bytes,
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        descriptors: Vec::new(),
        descriptors_truncated: header.msg_flags & libc::MSG_CTRUNC != 0,
        sender: None,
    };
    // SAFETY: the kernel has filled in the header, whose control buffer is live and aligned; each control message lies
    // within it, with its data behind it, of the length that its own header says.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            let length = (*message).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let contents = libc::CMSG_DATA(message);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for index in 0..length / mem::size_of::<libc::c_int>() {
                        let number = contents.cast::<libc::c_int>().add(index).read_unaligned();
                        // The kernel has just installed it for this process, and nobody else knows of it.
                        datagram.descriptors.push(OwnedFd::from_raw_fd(number));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= mem::size_of::<libc::ucred>() => {
                    let ucred = contents.cast::<libc::ucred>().read_unaligned();
                    datagram.sender = Some(Credentials {
                        pid: u32::try_from(ucred.pid).unwrap_or(0),
                        uid: ucred.uid,
                        gid: ucred.gid,
                    });
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Ok(datagram)
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixDatagram;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};

    use super::*;

    fn send(socket: &UnixDatagram, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn as_many_descriptors_as_can_be_come_with_the_sender() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        sockopt::set_socket_passcred(&theirs, true).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&ours, b"x", &[null.as_fd(); MOST]);
        let mut buffer = [0; 8];
        let datagram = receive_datagram(&theirs, &mut buffer).unwrap();
        assert_eq!((datagram.bytes, buffer[0], datagram.descriptors.len()), (1, b'x', MOST));
        assert!(!datagram.truncated && !datagram.descriptors_truncated);
        let sender = datagram.sender.unwrap();
        assert_eq!(sender.pid, std::process::id());
        for descriptor in &datagram.descriptors {
            let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn what_is_too_long_says_so_and_nothing_there_is_would_block() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let nothing = receive_datagram(&theirs, &mut [0; 8]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        ours.send(b"123456789").unwrap();
        let datagram = receive_datagram(&theirs, &mut [0; 8]).unwrap();
        assert!(datagram.truncated);
        assert_eq!(datagram.bytes, 8);
        ours.send(b"").unwrap();
        assert_eq!(receive_datagram(&theirs, &mut [0; 8]).unwrap().bytes, 0);
    }
}
