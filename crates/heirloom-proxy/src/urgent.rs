//! TCP's urgent byte (telnet's interrupt, for example; `tcp(7)`, RFC 9293 section 3.8.5): `splice(2)` does not go past it, and says
//! that there is nothing, or that it is the end. It is passed on by itself, in its place and as an urgent one, to which a UNIX socket
//! that takes it has no mark.
//!
//! Sources have it in line (`SO_OOBINLINE`), where it is a byte as any other when a later one is urgent.

use heirloom_sys::is_at_mark;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};

use crate::socket::Socket;

/// Passes on the next byte if it is an urgent one, and says whether it was. The error is the sink's, and the source has the byte
/// still.
pub(crate) fn pass_on(source: &Socket, sink: &Socket) -> Result<bool, Errno> {
    if !is_at_mark(source).unwrap_or(false) {
        return Ok(false);
    }
    // One that an older version has accepted may not have it in line.
    let _ = sockopt::set_socket_oobinline(source, true);
    let mut byte = [0];
    // Until the sink has it, it is with the source.
    if !matches!(recv(source, &mut byte, RecvFlags::DONTWAIT | RecvFlags::PEEK), Ok((1, _))) {
        return Ok(false);
    }
    let urgent = if sink.is_tcp() { SendFlags::OOB } else { SendFlags::empty() };
    send(sink, &byte, urgent | SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    let _ = recv(source, &mut byte, RecvFlags::DONTWAIT);
    Ok(true)
}
