//! What a TCP connection has still to send.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// How many bytes were written to a TCP connection and have not been sent even once: `SIOCOUTQNSD`
/// (`linux/sockios.h`, Linux 2.6.38).
///
/// Changes nothing, and neither waits for the socket nor locks it. Only TCP (and what stands for it, MPTCP and SMC) has
/// an answer: errors are `EINVAL` for a socket that listens, and `ENOTTY` for any other descriptor, so that success also
/// tells what a descriptor is.
///
/// ```
/// use std::net::{TcpListener, TcpStream};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let connection = TcpStream::connect(listener.local_addr()?)?;
/// assert_eq!(heirloom_sys::never_sent(&connection)?, 0);
/// assert!(heirloom_sys::never_sent(&listener).is_err());
/// # std::io::Result::Ok(())
/// ```
pub fn never_sent(connection: impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int, to a live local.
    let result = unsafe {
        libc::ioctl(connection.as_fd().as_raw_fd(), libc::SIOCOUTQNSD as libc::Ioctl, &raw mut bytes)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}
