//! What the servers of a measurement serve.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Sends back what has arrived, until nothing is left: the next arrival is an edge again.
pub(crate) fn echo(connection: BorrowedFd<'_>) -> anyhow::Result<()> {
    let mut buffer = [0; 64];
    loop {
        match recv(connection, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::AGAIN) => return Ok(()),
            // A client that waits for each answer always leaves room for it.
            Ok((_, read)) => drop(send(connection, &buffer[..read], SendFlags::DONTWAIT)?),
            Err(error) => return Err(error.into()),
        }
    }
}
