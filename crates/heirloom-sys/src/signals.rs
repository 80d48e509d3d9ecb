//! Signals as something to poll for and read: `signalfd(2)`.
//!
//! A signal is read only while it is blocked, so that no handler of this process ever runs for it.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::SignalMask;
use crate::mask::to_set;

/// A descriptor that is readable while one of its signals waits. Close-on-exec, and it never blocks.
///
/// ```
/// use heirloom_sys::{SignalFd, SignalMask};
///
/// let before = SignalMask::block_all()?;
/// let signals = SignalFd::new(SignalMask(u64::MAX))?;
/// assert!(signals.read()?.is_none(), "none waits");
/// before.set()?;
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

/// A signal that waited, and who sent it (`sigaction(2)`, `siginfo_t`).
///
/// ```
/// let from_the_kernel = |signal: heirloom_sys::Signal| signal.code == heirloom_sys::Signal::KERNEL;
/// # let _ = from_the_kernel;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub number: i32,
    /// How it came: [`Signal::KERNEL`], `SI_USER` (0), `SI_QUEUE` (-1), `CLD_EXITED` (1) …
    pub code: i32,
    /// The process that sent it; 0 when it has none here.
    pub pid: u32,
}

impl Signal {
    /// The code of a signal that the kernel sent, as it does for the keys of a terminal.
    pub const KERNEL: i32 = libc::SI_KERNEL;
}

impl SignalFd {
    /// Watches these signals. Block them as well: those that are not are delivered instead.
    ///
    /// Errors are those of `signalfd(2)`: no descriptor or no memory is left.
    pub fn new(signals: SignalMask) -> io::Result<SignalFd> {
        let set = to_set(signals);
        // SAFETY: `set` is an initialized set that lives until this returns; -1 asks for a new descriptor.
        let number = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if number == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else owns it.
        Ok(SignalFd { fd: unsafe { OwnedFd::from_raw_fd(number) } })
    }

    /// Takes the next signal that waits, if there is one.
    ///
    /// Errors are those of `read(2)`.
    pub fn read(&self) -> io::Result<Option<Signal>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = mem::size_of::<libc::signalfd_siginfo>();
        loop {
            // SAFETY: the buffer is as long as said, and the kernel only writes to it.
            let count = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
            if count == size as isize {
                // SAFETY: the kernel has written the whole structure, of which any bits are valid.
                let info = unsafe { info.assume_init() };
                return Ok(Some(Signal {
                    number: info.ssi_signo as i32,
                    code: info.ssi_code,
                    pid: info.ssi_pid,
                }));
            }
            if count >= 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends a signal, whatever its number, to a process (`kill(2)`).
///
/// Errors are those of `kill(2)`; `InvalidInput` for what would be more than one process.
///
/// ```
/// assert!(heirloom_sys::send_signal(std::process::id(), 0).is_ok(), "0 only asks whether it is there");
/// assert!(heirloom_sys::send_signal(0, 0).is_err());
/// ```
pub fn send_signal(pid: u32, signal: i32) -> io::Result<()> {
    match libc::pid_t::try_from(pid) {
        Ok(pid @ 1..) => kill(pid, signal),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is no process"))),
    }
}

/// Sends a signal to every process that this one sees and may signal, but for itself and PID 1: for the init of a pid
/// namespace, at its end.
///
/// Errors are those of `kill(2)`; `PermissionDenied` for anybody but PID 1.
///
/// ```
/// assert!(heirloom_sys::send_signal_to_all(0).is_err(), "this is not PID 1");
/// ```
pub fn send_signal_to_all(signal: i32) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    kill(-1, signal)
}

fn kill(pid: libc::pid_t, signal: i32) -> io::Result<()> {
    // SAFETY: two integers; no memory is touched.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_with_its_sender() {
        let before = SignalMask::block_all().unwrap();
        let signals = SignalFd::new(SignalMask(1 << (libc::SIGUSR1 - 1))).unwrap();
        assert_eq!(signals.read().unwrap(), None);
        // SAFETY: sends a blocked signal to this thread; no memory is involved.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1) };
        let signal = signals.read().unwrap().unwrap();
        assert_eq!((signal.number, signal.pid), (libc::SIGUSR1, std::process::id()));
        assert_ne!(signal.code, Signal::KERNEL);
        assert_eq!(signals.read().unwrap(), None);
        before.set().unwrap();
    }
}
