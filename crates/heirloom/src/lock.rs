//! The service lock: whoever serves holds it, so that a crash restart and a takeover never both serve.
//!
//! It is an exclusive `flock(2)` on a file next to the control socket. The lock belongs to the *open
//! file description*: it is free once the last descriptor of that description is closed or one of them
//! is unlocked. So a stopped process holds it, a process that inherited the descriptor holds it too, it
//! survives an exec that keeps the descriptor open, and it is free as soon as every holder is dead.
//!
//! The file is never unlinked, because two processes could then hold locks on two files of one name.
//! Whoever removes it by hand while a program serves takes this protection away. On NFS a `flock` is a
//! `fcntl` byte-range lock (Linux 2.6.12), bound to the process and not kept across a fork: use a local
//! directory.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock, fstat, open, stat};
use rustix::io::{Errno, FdFlags, fcntl_setfd, retry_on_intr};
use rustix::process::geteuid;

/// How often [`LockFile::lock_until`] tries: `flock(2)` knows no timeout.
const TRY_EVERY: Duration = Duration::from_millis(2);

/// The lock file of a control socket: its path with `.lock` added.
///
/// ```
/// use heirloom::lock::lock_path;
/// use std::path::Path;
///
/// let path = lock_path(Path::new("/run/heirloom/chat.sock"));
/// assert_eq!(path, Path::new("/run/heirloom/chat.sock.lock"));
/// ```
pub fn lock_path(control: &Path) -> PathBuf {
    let mut name = OsString::from(control);
    name.push(".lock");
    PathBuf::from(name)
}

/// The lock file, open but not locked.
///
/// ```
/// use heirloom::lock::{LockError, LockFile};
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("service.lock");
///
/// let Ok(held) = LockFile::open(&path)?.try_lock() else { panic!("nobody else is there") };
/// let Err((file, why)) = LockFile::open(&path)?.try_lock() else { panic!("two at once") };
/// assert!(matches!(why, LockError::Held { .. }));
///
/// held.release();
/// assert!(file.try_lock().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LockFile {
    file: OwnedFd,
    path: PathBuf,
}

/// The proof that this process holds the service lock. Dropping it releases the lock, unless another
/// process shares the descriptor.
///
/// ```
/// use heirloom::lock::{LockFile, ServiceLock};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("echo.sock.lock");
/// let lock: ServiceLock = LockFile::open(&path)?.try_lock().map_err(|(_, error)| error)?;
/// assert!(LockFile::open(&path)?.try_lock().is_err(), "one at a time");
/// let file: LockFile = lock.release();
/// assert!(file.try_lock().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it releases the lock"]
pub struct ServiceLock {
    file: LockFile,
}

/// Why there is no lock.
///
/// ```
/// use heirloom::lock::{LockError, LockFile};
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("echo.sock.lock");
/// let _lock = LockFile::open(&path)?.try_lock();
/// let Err((_, error)) = LockFile::open(&path)?.try_lock() else { panic!() };
/// assert!(matches!(error, LockError::Held { .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else holds it, or still held it at the deadline.
    #[error(
        "another process serves, or is about to: it holds the lock {}; take over from it, or stop \
         it first",
        path.display()
    )]
    Held {
        /// The lock file.
        path: PathBuf,
    },
    /// There is something else in its place, such as a directory or a symbolic link.
    #[error("{} is not a regular file: move it away, or choose another path", path.display())]
    NotAFile {
        /// The lock file.
        path: PathBuf,
    },
    /// The file is another user's, who could hold the lock for ever.
    #[error(
        "the lock file {} belongs to uid {owner}, not to us (uid {us}) or root: choose another path, \
         or run as that user",
        path.display()
    )]
    NotOurs {
        /// The lock file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Our effective uid.
        us: u32,
    },
    /// An inherited descriptor is of another file than the one at the path.
    #[error("the descriptor given is not of the lock file {}", path.display())]
    AnotherFile {
        /// The lock file.
        path: PathBuf,
    },
    /// Another error of `open(2)` or `flock(2)`.
    #[error("cannot use the lock file {}: {source}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl LockFile {
    /// Opens the file, and makes it with mode 0600 when it is missing. Does not lock it.
    ///
    /// # Errors
    ///
    /// It must be a regular file, not reached through a symbolic link, that belongs to us or to root.
    pub fn open(path: impl Into<PathBuf>) -> Result<LockFile, LockError> {
        let path = path.into();
        // NONBLOCK: should it be a FIFO or a device, we still come back to refuse it.
        let flags = OFlags::RDWR
            | OFlags::CREATE
            | OFlags::CLOEXEC
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::NOCTTY;
        let file = match open(&path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => file,
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                return Err(LockError::NotAFile { path });
            }
            Err(error) => return Err(io_error(path, error)),
        };
        LockFile { file, path }.checked()
    }

    /// Takes a descriptor of the lock file that this process inherited, and makes it close-on-exec.
    ///
    /// If the lock was held by its open file description, as after an exec, it still is, and
    /// [`LockFile::try_lock`] succeeds.
    ///
    /// # Errors
    ///
    /// As [`LockFile::open`], and [`LockError::AnotherFile`] unless it is the file at the path.
    pub fn adopt(path: impl Into<PathBuf>, file: OwnedFd) -> Result<LockFile, LockError> {
        let path = path.into();
        let lock = LockFile { file, path }.checked()?;
        let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let ours = fstat(&lock.file).map(identity);
        match (ours, stat(&lock.path).map(identity)) {
            (Ok(ours), Ok(there)) if ours == there => {}
            (Err(error), _) => return Err(io_error(lock.path, error)),
            _ => return Err(LockError::AnotherFile { path: lock.path }),
        }
        match fcntl_setfd(&lock.file, FdFlags::CLOEXEC) {
            Ok(()) => Ok(lock),
            Err(error) => Err(io_error(lock.path, error)),
        }
    }

    /// Locks the file if nobody else holds it, without waiting.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] when somebody else does; the file comes back for another try.
    pub fn try_lock(self) -> Result<ServiceLock, (LockFile, LockError)> {
        let operation = FlockOperation::NonBlockingLockExclusive;
        match retry_on_intr(|| flock(&self.file, operation)) {
            Ok(()) => Ok(ServiceLock { file: self }),
            Err(error) => {
                let path = self.path.clone();
                let error = match error {
                    Errno::WOULDBLOCK => LockError::Held { path },
                    other => io_error(path, other),
                };
                Err((self, error))
            }
        }
    }

    /// Locks the file as soon as it is free, trying every 2 ms until the deadline, and at least once.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] at the deadline; any other error at once.
    pub fn lock_until(self, deadline: Instant) -> Result<ServiceLock, (LockFile, LockError)> {
        let mut file = self;
        loop {
            match file.try_lock() {
                Err((back, LockError::Held { path })) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err((back, LockError::Held { path }));
                    }
                    thread::sleep(left.min(TRY_EVERY));
                    file = back;
                }
                result => return result,
            }
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn checked(self) -> Result<LockFile, LockError> {
        let stat = match fstat(&self.file) {
            Ok(stat) => stat,
            Err(error) => return Err(io_error(self.path, error)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(LockError::NotAFile { path: self.path });
        }
        let us = geteuid().as_raw();
        if stat.st_uid != us && stat.st_uid != 0 {
            return Err(LockError::NotOurs { path: self.path, owner: stat.st_uid, us });
        }
        Ok(self)
    }
}

impl ServiceLock {
    /// Unlocks the file, for every process that shares the descriptor, and keeps it open to lock it
    /// again.
    pub fn release(self) -> LockFile {
        // Unlocking a good descriptor does not fail on a local file system. Where it does, the lock
        // stays ours: the other side waits in vain and gives up, and locking it again succeeds.
        let _ = flock(&self.file.file, FlockOperation::Unlock);
        self.file
    }

    /// Where the lock file is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }
}

impl AsFd for LockFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsFd for ServiceLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn io_error(path: PathBuf, error: Errno) -> LockError {
    LockError::Io { path, source: error.into() }
}
/// The service lock as one side of a takeover has it.
#[derive(Debug)]
pub(crate) enum Holding {
    /// We hold it.
    Held(ServiceLock),
    /// We do not.
    Free(LockFile),
    /// Only for the moment between the two.
    Moving,
}

impl Holding {
    /// The locked file, if we hold it.
    pub(crate) fn held(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Holding::Held(lock) => Some(lock.as_fd()),
            _ => None,
        }
    }

    /// Unlocks, if we hold it.
    pub(crate) fn release(&mut self) {
        *self = match std::mem::replace(self, Holding::Moving) {
            Holding::Held(lock) => Holding::Free(lock.release()),
            other => other,
        };
    }

    /// Locks without waiting; true if we hold it then.
    pub(crate) fn try_take(&mut self) -> bool {
        *self = match std::mem::replace(self, Holding::Moving) {
            Holding::Free(file) => match file.try_lock() {
                Ok(lock) => Holding::Held(lock),
                Err((file, _)) => Holding::Free(file),
            },
            other => other,
        };
        matches!(self, Holding::Held(_))
    }
}
