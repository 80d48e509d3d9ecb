//! The calling thread's signal mask: which signals wait instead of being delivered (`pthread_sigmask(3)`).
//!
//! It persists over an `execve(2)`, with the signals that wait: so signals can be held back until a program that became
//! another one has its handlers again.

use std::io;
use std::mem::MaybeUninit;

/// A set of signals. Bit `n - 1` stands for signal `n`, as in `/proc/PID/status`.
///
/// ```
/// use heirloom_sys::SignalMask;
///
/// let before = SignalMask::block_all()?;
/// // … nothing is delivered to this thread here …
/// before.set()?;
/// assert_eq!(SignalMask::current()?, before);
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalMask(pub u64);

impl SignalMask {
    /// The mask as it is.
    pub fn current() -> io::Result<SignalMask> {
        change(libc::SIG_BLOCK, SignalMask(0))
    }

    /// Blocks every signal that can be blocked, and returns the mask as it was before.
    pub fn block_all() -> io::Result<SignalMask> {
        change(libc::SIG_BLOCK, SignalMask(u64::MAX))
    }

    /// Makes this the mask. What waited and is no longer in it is delivered before this returns.
    pub fn set(self) -> io::Result<()> {
        change(libc::SIG_SETMASK, self).map(drop)
    }
}

/// Changes the mask, and returns the one before.
fn change(how: libc::c_int, mask: SignalMask) -> io::Result<SignalMask> {
    let set = to_set(mask);
    let mut before = empty();
    // SAFETY: both pointers are to initialized sets that live until this returns.
    let error = unsafe { libc::pthread_sigmask(how, &raw const set, &raw mut before) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `before` is an initialized set.
    let held = signals().filter(|&signal| unsafe { libc::sigismember(&raw const before, signal) } == 1);
    Ok(SignalMask(held.fold(0, |bits, signal| bits | 1 << (signal - 1))))
}

/// The mask as the C library has it.
pub(crate) fn to_set(mask: SignalMask) -> libc::sigset_t {
    let mut set = empty();
    for signal in signals().filter(|signal| mask.0 >> (signal - 1) & 1 == 1) {
        // SAFETY: `set` was initialized; a number that the C library keeps for itself is refused, which does no harm.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

fn empty() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes what it is given, and cannot fail for a valid pointer.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn signals() -> std::ops::RangeInclusive<libc::c_int> {
    // As many as Linux has (signal(7)); MIPS alone has more.
    1..=64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_waits_and_is_delivered_later() {
        let before = SignalMask::block_all().unwrap();
        let all = SignalMask::current().unwrap();
        let usr2 = 1 << (libc::SIGUSR2 - 1);
        assert_eq!(all.0 & usr2, usr2);
        // SAFETY: raise has no memory to get wrong; the signal waits, and is ignored from here on.
        unsafe {
            libc::signal(libc::SIGUSR2, libc::SIG_IGN);
            libc::raise(libc::SIGUSR2);
        }
        before.set().unwrap();
        assert_eq!(SignalMask::current().unwrap(), before);
    }
}
