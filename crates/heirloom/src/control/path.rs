//! Where the control socket is, and how it is bound so that only its owner gets in.
//!
//! The socket has mode 0600 and lies in a directory that nobody else can write to. It is bound under
//! the [`ServiceLock`], once: during a takeover the listener itself is handed over and the path stays.

use std::env;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::geteuid;

use crate::lock::{ServiceLock, lock_path};

/// The longest path of a UNIX socket in bytes: `sun_path` has 108, with a NUL (`unix(7)`).
pub const MAX_PATH: usize = 107;

/// How many clients may wait to be accepted (`listen(2)`; the kernel lowers it to `net.core.somaxconn`).
const BACKLOG: i32 = 128;
/// How many symbolic links may lead to the control socket's directory, one to the next.
const LINKS: u32 = 8;

/// Why a path cannot be used for the control socket.
///
/// ```
/// use heirloom::control::path::default_path;
///
/// let error = default_path("../elsewhere").unwrap_err();
/// println!("{error}");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// A name that cannot be a file's.
    #[error("{name:?} cannot be the name of a control socket: it {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is no directory for the sockets of this user.
    #[error(
        "there is no directory for control sockets: XDG_RUNTIME_DIR is not set and /run/user/{uid} \
         does not exist; set XDG_RUNTIME_DIR, or give the path with --control"
    )]
    NoRuntimeDirectory {
        /// Our effective uid.
        uid: u32,
    },
    /// Longer than the kernel's address of a UNIX socket.
    #[error(
        "the path {} has {length} bytes, and a UNIX socket's path has at most {MAX_PATH}: choose a \
         shorter one with --control or --name",
        path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The directory above the socket's is missing.
    #[error(
        "the directory {} cannot be made, because the one above it does not exist: run \
         `mkdir -p -m 700 {}`, or choose another path",
        directory.display(), directory.display()
    )]
    NoParent {
        /// The socket's directory.
        directory: PathBuf,
    },
    /// Something else is where the directory should be.
    #[error("{} is not a directory: choose another path", directory.display())]
    NotADirectory {
        /// The socket's directory.
        directory: PathBuf,
    },
    /// The directory belongs to somebody who could replace the socket by his own.
    #[error(
        "the directory {} belongs to uid {owner}, not to us (uid {us}) or root: choose a path in a \
         directory of your own, made with `mkdir -m 700`",
        directory.display()
    )]
    NotOurs {
        /// The socket's directory.
        directory: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Our effective uid.
        us: u32,
    },
    /// Others can write to the directory, sticky or not.
    #[error(
        "others can write to the directory {} (mode {mode:04o}): run `chmod go-w` on it if it is \
         yours alone, or choose a path in a directory made with `mkdir -m 700`",
        directory.display()
    )]
    Writable {
        /// The socket's directory.
        directory: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// There is something at the path that we did not make, and do not delete.
    #[error(
        "{} exists and is not a stream socket: move it away, or choose another path",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A process listens there.
    #[error(
        "another process listens at {}: take over from it, stop it, or choose another path",
        path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The lock held is not this path's, and so proves nothing.
    #[error("the lock {} does not belong to the socket {}", lock.display(), path.display())]
    WrongLock {
        /// The lock file.
        lock: PathBuf,
        /// The path.
        path: PathBuf,
    },
    /// Another error of the system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// The path of the control socket with this name: `NAME.sock` in `$XDG_RUNTIME_DIR/heirloom`; without
/// that variable, in `/run/heirloom` for root, and for others in `/run/user/UID/heirloom` if
/// `/run/user/UID` exists.
///
/// Nothing is made or checked there: see [`prepare_directory`].
///
/// # Errors
///
/// When the name is empty, `.`, `..`, or has a slash or a NUL in it; when there is no such directory;
/// when the path is too long.
///
/// ```
/// use heirloom::control::path::default_path;
///
/// assert!(default_path("../etc/passwd").is_err());
/// match default_path("chat-127.0.0.1:31337") {
///     Ok(path) => assert!(path.ends_with("heirloom/chat-127.0.0.1:31337.sock")),
///     Err(error) => eprintln!("{error}"), // says what to set
/// }
/// ```
pub fn default_path(file_name: &str) -> Result<PathBuf, PathError> {
    // An empty or relative value counts as not set (XDG Base Directory Specification).
    let runtime =
        env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|directory| directory.is_absolute());
    path_in(file_name, runtime, geteuid().as_raw(), Path::new("/run"))
}

fn path_in(file_name: &str, runtime: Option<PathBuf>, uid: u32, run: &Path) -> Result<PathBuf, PathError> {
    let why = match file_name {
        "" => Some("is empty"),
        "." | ".." => Some("is a directory"),
        name if name.contains('/') => Some("has a slash in it"),
        name if name.contains('\0') => Some("has a NUL in it"),
        _ => None,
    };
    if let Some(why) = why {
        return Err(PathError::Name { name: file_name.to_owned(), why });
    }
    let base = match runtime {
        Some(runtime) => runtime,
        None if uid == 0 => run.to_owned(),
        None => {
            let user = run.join("user").join(uid.to_string());
            if !user.is_dir() {
                return Err(PathError::NoRuntimeDirectory { uid });
            }
            user
        }
    };
    let path = base.join("heirloom").join(format!("{file_name}.sock"));
    check_length(&path)?;
    Ok(path)
}

/// Sees to it that the directory of a control socket exists and that nobody else can write to it.
///
/// A missing directory is made with mode 0700, but none above it. An existing one must belong to us or
/// to root, and must not be writable by its group or by others; `/tmp` is therefore refused, sticky as
/// it is. A symbolic link to a directory, as systemd makes for `DynamicUser=`, has to belong to us or
/// to root as well: whoever owns it can point it elsewhere.
///
/// ```
/// use heirloom::control::path::prepare_directory;
///
/// let home = tempfile::tempdir()?;
/// prepare_directory(&home.path().join("heirloom/chat.sock"))?;
/// assert!(home.path().join("heirloom").is_dir());
/// assert!(prepare_directory("/tmp/chat.sock".as_ref()).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn prepare_directory(path: &Path) -> Result<(), PathError> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => {
            return Err(PathError::NotASocket { path: path.to_owned() });
        }
    };
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(PathError::NoParent { directory: directory.to_owned() });
        }
        // An existing directory is as good on a file system that is read-only or not ours.
        Err(_) if directory.is_dir() => {}
        Err(error) => return Err(io_error("make the directory", directory, error)),
    }
    check_directory(directory)
}

fn check_directory(directory: &Path) -> Result<(), PathError> {
    let failed = |error| io_error("look at the directory", directory, error);
    let us = geteuid().as_raw();
    let check_owner = |path: &Path, owner| match owner {
        owner if owner == us || owner == 0 => Ok(()),
        owner => Err(PathError::NotOurs { directory: path.to_owned(), owner, us }),
    };
    let (mut at, mut links) = (directory.to_owned(), 0);
    let metadata = loop {
        let metadata = fs::symlink_metadata(&at).map_err(failed)?;
        check_owner(&at, metadata.uid())?;
        if !metadata.is_symlink() || links == LINKS {
            break metadata;
        }
        links += 1;
        let to = fs::read_link(&at).map_err(failed)?;
        at = at.parent().unwrap_or(Path::new("")).join(to);
    };
    let directory = directory.to_owned();
    if !metadata.is_dir() {
        return Err(PathError::NotADirectory { directory });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(PathError::Writable { directory, mode });
    }
    Ok(())
}

/// Binds the control socket and listens, non-blocking and close-on-exec.
///
/// The socket gets mode 0600 before it listens, so that nobody else can connect at any instant. What a
/// process left behind that no longer runs is replaced; a path at which somebody listens, or which is
/// no socket, is an error and stays as it is. To tell, it is connected to once: whoever listens there
/// sees a client that asks nothing.
///
/// The lock must be that of [`lock_path`] for this path: it proves that nobody else is just doing the
/// same.
///
/// ```
/// use heirloom::control::path::{PathError, bind};
/// use heirloom::lock::{LockFile, lock_path};
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("chat.sock");
/// let Ok(lock) = LockFile::open(lock_path(&path))?.try_lock() else { panic!("somebody serves") };
///
/// let listener = bind(&path, &lock)?;
/// assert!(matches!(bind(&path, &lock), Err(PathError::InUse { .. })));
/// drop(listener); // as if killed: the path stays behind
/// assert!(bind(&path, &lock).is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn bind(path: &Path, lock: &ServiceLock) -> Result<UnixListener, PathError> {
    if lock.path() != lock_path(path) {
        return Err(PathError::WrongLock { lock: lock.path().to_owned(), path: path.to_owned() });
    }
    let address = address(path)?;
    remove_stale(path, &address)?;

    let socket = stream_socket().map_err(|error| io_error("make a socket for", path, error))?;
    rustix::net::bind(&socket, &address).map_err(|error| io_error("bind the socket", path, error.into()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|error| io_error("set the mode of", path, error))?;
    rustix::net::listen(&socket, BACKLOG).map_err(|error| io_error("listen at", path, error.into()))?;
    Ok(UnixListener::from(socket))
}

/// Listens again on a listener that was handed over, so that connecting clients are told our
/// credentials rather than those of the process that bound it (`SO_PEERCRED`, `SO_PEERPIDFD`).
///
/// Waiting clients stay in the queue. Errors are those of `listen(2)`.
///
/// ```
/// use heirloom::control::path::relisten;
/// use std::os::unix::net::UnixListener;
///
/// let directory = tempfile::tempdir()?;
/// let listener = UnixListener::bind(directory.path().join("chat.sock"))?;
/// relisten(&listener)?;
/// # std::io::Result::Ok(())
/// ```
pub fn relisten(listener: &UnixListener) -> io::Result<()> {
    Ok(rustix::net::listen(listener, BACKLOG)?)
}

/// The address of a UNIX socket at this path.
pub(super) fn address(path: &Path) -> Result<SocketAddrUnix, PathError> {
    check_length(path)?;
    SocketAddrUnix::new(path).map_err(|error| io_error("use the path", path, error.into()))
}

/// A UNIX stream socket that never blocks.
pub(super) fn stream_socket() -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Whether a path is short enough to be a UNIX socket's.
///
/// # Errors
///
/// [`PathError::TooLong`].
///
/// ```
/// use heirloom::control::path::check_length;
///
/// assert!(check_length("/run/heirloom/chat.sock".as_ref()).is_ok());
/// assert!(check_length("x".repeat(108).as_ref()).is_err());
/// ```
pub fn check_length(path: &Path) -> Result<(), PathError> {
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_PATH {
        return Err(PathError::TooLong { path: path.to_owned(), length });
    }
    Ok(())
}

/// Removes the socket of a process that is gone; an error if it is anything else.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), PathError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("look at", path, error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(PathError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(|error| io_error("make a socket for", path, error))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // AGAIN: somebody listens, and more wait than the backlog has room for.
        Ok(()) | Err(Errno::AGAIN) => {
            return Err(PathError::InUse { path: path.to_owned() });
        }
        Err(Errno::PROTOTYPE) => {
            return Err(PathError::NotASocket { path: path.to_owned() });
        }
        Err(error) => return Err(io_error("connect to", path, error.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove the stale socket", path, error))
        }
        _ => Ok(()),
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> PathError {
    PathError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_directory_comes_first_then_run() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        let path = |runtime: Option<&str>, uid| path_in("a:1", runtime.map(PathBuf::from), uid, run);

        assert_eq!(path(Some("/x"), 7).unwrap(), Path::new("/x/heirloom/a:1.sock"));
        assert_eq!(path(None, 0).unwrap(), run.join("heirloom/a:1.sock"));
        let error = path(None, 7).unwrap_err().to_string();
        assert!(error.contains("XDG_RUNTIME_DIR") && error.contains("--control"));
        fs::create_dir_all(run.join("user/7")).unwrap();
        assert_eq!(path(None, 7).unwrap(), run.join("user/7/heirloom/a:1.sock"));
    }
}
