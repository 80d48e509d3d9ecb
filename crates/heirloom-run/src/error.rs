//! Why run could not do its part.

use std::io;
use std::path::PathBuf;

use heirloom::StartError;
use heirloom::control::PathError;

use crate::exit;
use crate::listen::ListenError;

/// Why nothing was run, or no more.
///
/// ```
/// use heirloom_run::{RunError, exit};
///
/// let error = RunError::Io { what: "watch for signals", source: std::io::ErrorKind::OutOfMemory.into() };
/// assert_eq!(error.code(), exit::RUN_FAILED);
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// There is no path for the control socket.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The control socket cannot be served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A socket cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The socket for notifications cannot be had.
    #[error("cannot listen for notifications at {}: {source}; choose another path with --control", path.display())]
    Notify {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// More is to be stored than may be open.
    #[error(
        "{wanted} descriptors cannot be stored: the limit on open files is {limit} (`ulimit -Hn`), of which run needs some \
         itself; at most {possible} can be"
    )]
    StoreMax {
        /// What was asked for.
        wanted: u64,
        /// The limit.
        limit: u64,
        /// What there is room for.
        possible: u64,
    },
    /// The command cannot be started.
    #[error("{message}")]
    Command {
        /// The code to end with.
        code: u8,
        /// What is wrong with it.
        message: String,
    },
    /// What was carried over an upgrade in place does not make sense.
    #[error("was upgraded in place, and cannot go on with what was left: {0}")]
    Carried(String),
    /// What a run before has left with the supervisor above cannot be gone on with. It is left there.
    #[error("{0}; with --store-above never it begins without")]
    Vault(String),
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

impl RunError {
    /// The code to end with.
    pub fn code(&self) -> u8 {
        match self {
            RunError::Command { code, .. } => *code,
            _ => exit::RUN_FAILED,
        }
    }

    pub(crate) fn io(what: &'static str) -> impl Fn(io::Error) -> RunError {
        move |source| RunError::Io { what, source }
    }
}
