//! Why a proxy cannot begin.

use std::io;

use crate::access::AccessError;

/// Why an engine cannot be prepared. Nothing was taken over, and nothing is listened at.
///
/// ```
/// let error = heirloom_proxy::EngineError::Descriptors { connections: 9000, needed: 18_200, limit: 1024 };
/// assert!(error.to_string().contains("1024"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// An address that is configured cannot be had.
    #[error("cannot listen at {address} ({name}): {source}; free it, or give another address")]
    Bind {
        /// The listener's name.
        name: String,
        /// Its address.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// There may be more connections than descriptors.
    #[error(
        "{connections} connections need {needed} descriptors, and the limit on open files is {limit}: raise it (ulimit -n, LimitNOFILE=), or set max_connections lower"
    )]
    Descriptors {
        /// How many connections there may be.
        connections: usize,
        /// The descriptors for that.
        needed: usize,
        /// The limit.
        limit: usize,
    },
    /// What is handed over cannot be used.
    #[error("cannot go on with what is handed over: {0}")]
    State(String),
    /// The access log cannot be opened.
    #[error(transparent)]
    AccessLog(#[from] AccessError),
    /// A system call failed.
    #[error("cannot prepare an event loop: {0}")]
    Io(#[from] io::Error),
}
