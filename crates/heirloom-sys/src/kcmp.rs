//! Whether two descriptors are the same open file description: `kcmp(2)`.

use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `KCMP_FILE` of `linux/kcmp.h`; `libc` lacks it.
const KCMP_FILE: libc::c_int = 0;

/// Compares the open file descriptions behind two descriptors of this process. Equal means that one is a duplicate of
/// the other. Otherwise there is an order, without meaning, that stays the same while both are open: good for a search.
///
/// Errors: `ENOSYS` or `EPERM` where the kernel has no `kcmp(2)` or does not allow it.
///
/// ```
/// use std::cmp::Ordering;
///
/// let null = std::fs::File::open("/dev/null")?;
/// let (duplicate, other) = (null.try_clone()?, std::fs::File::open("/dev/null")?);
/// if let Ok(order) = heirloom_sys::compare_files(&null, &duplicate) {
///     assert_eq!(order, Ordering::Equal);
///     assert_ne!(heirloom_sys::compare_files(&null, &other)?, Ordering::Equal);
/// }
/// # std::io::Result::Ok(())
/// ```
pub fn compare_files(a: impl AsFd, b: impl AsFd) -> io::Result<Ordering> {
    let this = std::process::id() as libc::c_ulong;
    let (a, b) = (a.as_fd().as_raw_fd() as libc::c_ulong, b.as_fd().as_raw_fd() as libc::c_ulong);
    // SAFETY: five integers; the call touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_kcmp, this, this, KCMP_FILE, a, b) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3 is "different, without an order", which no kernel says of files.
        3 => Err(io::Error::from(io::ErrorKind::Unsupported)),
        _ => Err(io::Error::last_os_error()),
    }
}
