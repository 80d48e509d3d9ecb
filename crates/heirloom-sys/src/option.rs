//! `getsockopt(2)` for one option of fixed size: what every module here that asks a socket uses.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A value for which every bit pattern is valid, so that the kernel may write whatever it likes.
///
/// # Safety
///
/// The type is plain old data without padding, and every bit pattern of it is a valid value.
pub(crate) unsafe trait Plain: Copy + Default {}

// SAFETY: every bit pattern is an integer.
unsafe impl Plain for libc::c_int {}

/// The value of a socket option.
///
/// An answer of another size than `T` is an error of kind `InvalidData`.
pub(crate) fn get<T: Plain>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: both pointers are to live locals, and `length` is the size of `value`, so that the
    // kernel writes within it; whatever it writes is a valid `T` (see `Plain`).
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if length as usize != mem::size_of::<T>() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("socket option {name} is {length} bytes long, expected {}", mem::size_of::<T>()),
        ));
    }
    Ok(value)
}
