//! How the calling thread shares the processors with others (`sched_setattr(2)`): the time slice, beside the nice value.

use std::io;
use std::mem;
use std::time::Duration;

/// How an ordinary thread is scheduled: one of the policy `SCHED_OTHER` or `SCHED_BATCH`. Threads and processes that it starts
/// begin with the same.
///
/// ```
/// use heirloom_sys::Scheduling;
/// use std::time::Duration;
///
/// if let Some(before) = Scheduling::current()? {
///     Scheduling { slice: Duration::from_millis(100), ..before }.set()?;
///     // … what nobody waits for …
///     before.set()?;
/// }
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduling {
    /// Its share of the processors: from −20, the most, to 19, the least. Everybody may make it larger; to make it smaller again
    /// takes `CAP_SYS_NICE`, or a limit on it (`RLIMIT_NICE`) that lets one.
    pub nice: i32,
    /// For how long it has a processor before others have their turn: from 0.1 to 100 ms. Zero sets what the system has for all, a
    /// few milliseconds, which is then what is read. What becomes ready to run goes before a thread that has a longer slice. Before
    /// Linux 6.12 there is no such thing: it is ignored, and what is read is zero.
    pub slice: Duration,
}

impl Scheduling {
    /// That of the calling thread; `None` for one of another policy.
    pub fn current() -> io::Result<Option<Scheduling>> {
        let attributes = attributes()?;
        Ok(is_ordinary(&attributes).then(|| Scheduling {
            nice: attributes.sched_nice,
            slice: Duration::from_nanos(attributes.sched_runtime),
        }))
    }

    /// Has the calling thread scheduled like this. One of another policy stays as it is.
    ///
    /// # Errors
    ///
    /// `EPERM`: it may not have a smaller nice value than it has, or a filter of system calls denies this one.
    pub fn set(self) -> io::Result<()> {
        let mut attributes = attributes()?;
        if !is_ordinary(&attributes) {
            return Ok(());
        }
        attributes.sched_nice = self.nice;
        attributes.sched_runtime = u64::try_from(self.slice.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: the kernel reads a structure as long as its first field says, which is initialized.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
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
    fn a_thread_and_those_that_it_starts_are_scheduled_as_it_says() {
        std::thread::spawn(|| {
            let before = Scheduling::current().unwrap().expect("tests are of no special policy");
            let slice = Duration::from_millis(20);
            let wanted = Scheduling { nice: (before.nice + 1).min(19), slice };
            wanted.set().unwrap();
            let here = Scheduling::current().unwrap().unwrap();
            assert_eq!(here.nice, wanted.nice);
            // Before Linux 6.12 it stays zero.
            assert!([Duration::ZERO, slice].contains(&here.slice), "{:?}", here.slice);
            let there = std::thread::spawn(|| Scheduling::current().unwrap()).join().unwrap();
            assert_eq!(there, Some(here));
            Scheduling { slice: Duration::ZERO, ..wanted }.set().unwrap();
            let after = Scheduling::current().unwrap().unwrap();
            assert_eq!(after, Scheduling { nice: wanted.nice, slice: before.slice });
        })
        .join()
        .unwrap();
    }
}
