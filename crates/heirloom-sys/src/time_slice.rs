//! For how long the calling thread has a processor before others have their turn (`sched_setattr(2)`).

use std::io;
use std::mem;
use std::time::Duration;

/// The time slice of the calling thread; `None` if it is of another policy than `SCHED_OTHER` or `SCHED_BATCH`. Zero before Linux
/// 6.12.
///
/// ```
/// assert!(heirloom_sys::time_slice()?.is_some());
/// # std::io::Result::Ok(())
/// ```
pub fn time_slice() -> io::Result<Option<Duration>> {
    let attributes = attributes()?;
    Ok(is_ordinary(&attributes).then(|| Duration::from_nanos(attributes.sched_runtime)))
}

/// Sets the time slice of the calling thread, with which the threads and processes that it starts begin, too: from 0.1 to 100 ms, or
/// zero for what the system has for all, a few milliseconds.
///
/// It does not change a thread's share of the processors, but when it has it: what becomes ready to run may go before a thread that
/// has a longer slice. Anybody may set it, to and fro. Before Linux 6.12, and for a thread of another policy than `SCHED_OTHER` or
/// `SCHED_BATCH`, nothing happens.
///
/// ```
/// use std::time::Duration;
///
/// heirloom_sys::set_time_slice(Duration::from_millis(100))?;
/// // … what nobody waits for …
/// heirloom_sys::set_time_slice(Duration::ZERO)?;
/// # std::io::Result::Ok(())
/// ```
///
/// # Errors
///
/// Among others `EPERM` where a filter of system calls denies it.
pub fn set_time_slice(slice: Duration) -> io::Result<()> {
    let mut attributes = attributes()?;
    if !is_ordinary(&attributes) {
        return Ok(());
    }
    attributes.sched_runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the kernel reads a structure as long as its first field says, which is initialized.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_ordinary(attributes: &libc::sched_attr) -> bool {
    [libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&(attributes.sched_policy as libc::c_int))
}

/// Everything that the kernel says of how the calling thread is scheduled.
fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: all fields are numbers, and may be zero.
    let mut attributes: libc::sched_attr = unsafe { mem::zeroed() };
    let size = mem::size_of_val(&attributes);
    // SAFETY: the kernel writes at most `size` bytes to the structure, which is as long.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(attributes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_set_for_a_thread_and_those_that_it_starts_and_taken_back() {
        std::thread::spawn(|| {
            let now = || time_slice().unwrap().expect("tests are of no special policy");
            let (before, nice) = (now(), attributes().unwrap().sched_nice);
            let slice = Duration::from_millis(20);
            set_time_slice(slice).unwrap();
            let here = now();
            // Before Linux 6.12 it stays zero.
            assert!([Duration::ZERO, slice].contains(&here), "{here:?}");
            let there = std::thread::spawn(now).join().unwrap();
            assert_eq!(there, here);
            set_time_slice(Duration::ZERO).unwrap();
            assert_eq!(now(), before);
            assert_eq!(attributes().unwrap().sched_nice, nice, "nothing else has changed");
        })
        .join()
        .unwrap();
    }
}
