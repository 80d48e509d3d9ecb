//! Descriptors that were left open across an `execve(2)`: from their numbers to owners.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// One adoption at a time, so that none of two can see a descriptor that the other is about to own.
static ADOPTION: Mutex<()> = Mutex::new(());

/// Owns a descriptor that this process was started with, and makes it close-on-exec.
///
/// Only a descriptor that is *not* close-on-exec is adopted: those that Rust code has opened here all are, and those
/// that were adopted before as well. Standard input, output and error belong to `std::io` and are refused.
///
/// Errors: `EBADF` when nothing is open under this number, `InvalidInput` when it is one of those that are refused.
///
/// ```
/// use std::os::fd::AsRawFd;
///
/// let ours = std::fs::File::open("/dev/null")?;
/// assert!(heirloom_sys::adopt(ours.as_raw_fd()).is_err(), "it has an owner");
/// # std::io::Result::Ok(())
/// ```
pub fn adopt(number: i32) -> io::Result<OwnedFd> {
    if (0..=2).contains(&number) {
        return Err(refused(format!("descriptor {number} is a standard stream")));
    }
    let _one_at_a_time = ADOPTION.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: F_GETFD takes no further argument and touches no memory; any number may be asked about.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags == -1 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(refused(format!("descriptor {number} was opened by this process, not inherited")));
    }
    // SAFETY: F_SETFD takes an integer and touches no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody in this process owns it: owners here set close-on-exec, which it did
    // not have, and the lock keeps a second adoption from having seen it so.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn refused(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
