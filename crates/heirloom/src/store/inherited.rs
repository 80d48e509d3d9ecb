//! The descriptors that a supervisor has started this process with: `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID`, see
//! sd_listen_fds(3).
//!
//! Each is owned once: whoever calls this a second time gets nothing.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;

use heirloom_sys::adopt;

/// The first of them (`SD_LISTEN_FDS_START`).
const FIRST: i32 = 3;

/// A descriptor that a supervisor has started this process with.
///
/// ```
/// // Not started with any.
/// assert!(heirloom::store::activated()?.is_empty());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Activated {
    /// What the supervisor calls it; names need not be unique.
    pub name: String,
    /// The descriptor, close-on-exec from now on.
    pub descriptor: OwnedFd,
}

/// Takes the descriptors that a supervisor has started this process with, in their order. What another part of the program
/// has taken before is left out.
///
/// # Errors
///
/// What fcntl(2) said, other than that such a descriptor is not open.
pub fn activated() -> io::Result<Vec<Activated>> {
    let variable = std::env::var_os;
    if !is_for_us(variable("LISTEN_PID").as_deref(), std::process::id()) {
        return Ok(Vec::new());
    }
    let count = variable("LISTEN_FDS").and_then(|count| count.to_str()?.parse::<u16>().ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default().to_string_lossy().into_owned();
    let mut names = names.split(':').map(str::to_owned);
    let mut all = Vec::with_capacity(count.into());
    for number in (FIRST..).take(count.into()) {
        let name = names.next().filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown".to_owned());
        match adopt(number) {
            Ok(descriptor) => all.push(Activated { name, descriptor }),
            // It has an owner already, or was closed.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BADF.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// They are for one process alone: its children inherit the variables.
fn is_for_us(listen_pid: Option<&OsStr>, pid: u32) -> bool {
    listen_pid.and_then(|listen_pid| listen_pid.to_str()?.parse().ok()) == Some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_of_another_process_do_not_count() {
        assert!(is_for_us(Some("7".as_ref()), 7));
        for other in [None, Some("8"), Some(""), Some("x")] {
            assert!(!is_for_us(other.map(OsStr::new), 7), "{other:?}");
        }
    }
}
