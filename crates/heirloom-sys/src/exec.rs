//! `execve(2)` as it is: std's `CommandExt::exec` resets SIGPIPE and the signal mask before it tries, and leaves them
//! changed when it fails.

use std::ffi::{CStr, CString};
use std::io;
use std::ptr;

/// Becomes another program. Returns only when that fails, and changes nothing then.
///
/// What the new program keeps: the pid, the descriptors that are not close-on-exec, ignored signals, the signal mask
/// and pending signals (`execve(2)`). All other threads end. `arguments` begin with the program's own name;
/// `environment` holds `NAME=value`.
///
/// ```
/// let nowhere = heirloom_sys::execve(c"/nowhere/at all", &[c"nowhere".into()], &[]);
/// assert_eq!(nowhere.kind(), std::io::ErrorKind::NotFound);
/// ```
#[must_use = "that it returns at all is the error"]
pub fn execve(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let arguments = pointers(arguments);
    let environment = pointers(environment);
    // SAFETY: `program` is a C string; both arrays end with a null pointer, and what they point to is borrowed from the
    // caller until this returns. The kernel only reads them.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}
