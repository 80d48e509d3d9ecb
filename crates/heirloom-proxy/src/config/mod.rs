//! What a proxy is to do: its listeners, and the backends that it passes connections on to.
//!
//! A [`Config`] comes from a [file](Config::read) or, without one, from a [`Simple`] one. Either way it is whole: every address is
//! known, every listener has a pool, no name or address is there twice, and no limit is zero.

mod defaults;
mod error;
mod file;
mod simple;
mod table;
mod unique;
mod values;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::Address;

pub use error::ConfigError;
pub use simple::Simple;

/// A whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// How many event loops; by default as many as there are processors for this process.
    pub threads: Option<NonZeroUsize>,
    /// How many connections there may be at once; by default as many as the limit on descriptors has room for.
    pub max_connections: Option<usize>,
    /// How long a connection may go on whose backend is no longer configured; by default until it ends.
    pub drain: Option<Duration>,
    /// Where a line is written for each connection that has ended.
    pub access_log: Option<AccessLog>,
    /// Where connections are accepted.
    pub listeners: Vec<Listener>,
    /// Groups of backends.
    pub pools: Vec<Pool>,
}

impl Config {
    /// What makes sense, but is probably not meant.
    ///
    /// ```
    /// let text = "
    ///     [[listener]]
    ///     listen = '127.0.0.1:80'
    ///     to = ['127.0.0.1:81']
    ///     [pool.spare]
    ///     backends = ['127.0.0.1:82']
    /// ";
    /// let config = heirloom_proxy::config::Config::parse(text, "web.toml")?;
    /// assert_eq!(config.warnings(), ["no listener uses the pool \"spare\""]);
    /// # Ok::<(), heirloom_proxy::config::ConfigError>(())
    /// ```
    pub fn warnings(&self) -> Vec<String> {
        let used = |index| self.listeners.iter().any(|listener| listener.pool == index);
        let unused = self.pools.iter().enumerate().filter(|(index, _)| !used(*index));
        let unused = unused.map(|(_, pool)| format!("no listener uses the pool {:?}", pool.name));
        let to_itself = self.listeners.iter().filter(|listener| {
            let backends = &self.pools[listener.pool].backends;
            backends.iter().any(|backend| backend.address.place() == listener.address.place())
        });
        let to_itself = to_itself.map(|listener| {
            format!(
                "the listener {:?} is a backend of its own: connections would go round without end",
                listener.name
            )
        });
        unused.chain(to_itself).collect()
    }
}

/// Where connections are accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// What it is called in status and logs; unique.
    pub name: String,
    /// Where it listens.
    pub address: Address,
    /// Which of [`Config::pools`] its connections go to.
    pub pool: usize,
    /// How many connections it may have at once; more wait in the kernel's queue.
    pub max_connections: Option<usize>,
    /// How long a connection may be silent, both ways.
    pub idle_timeout: Option<Duration>,
    /// After how long a silence clients are probed, with TCP's keepalive; `None`: never.
    pub keepalive: Option<Duration>,
    /// Whether small segments are sent to clients at once (TCP_NODELAY).
    pub nodelay: bool,
    /// How many connections wait to be accepted at most.
    pub backlog: u32,
    /// The permissions of a UNIX socket's file.
    pub mode: Option<u32>,
}

/// Backends among which a listener's connections are spread.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// What it is called in status and logs; unique.
    pub name: String,
    /// Which backend is next.
    pub balance: Balance,
    /// How long one backend may take to accept a connection.
    pub connect_timeout: Duration,
    /// How many further backends are tried when one fails; never more than there are.
    pub retries: u32,
    /// After how long a silence backends are probed, with TCP's keepalive; `None`: never.
    pub keepalive: Option<Duration>,
    /// Whether small segments are sent to backends at once (TCP_NODELAY).
    pub nodelay: bool,
    /// The backends; at least one.
    pub backends: Vec<Backend>,
}

impl Pool {
    /// With no more retries than there are other backends.
    fn with_possible_retries(mut self) -> Pool {
        let others = u32::try_from(self.backends.len().saturating_sub(1)).unwrap_or(u32::MAX);
        self.retries = self.retries.min(others);
        self
    }
}

/// Where connections are passed on to.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// What it is called in status and logs; unique in its pool.
    pub name: String,
    /// Where it listens.
    pub address: Address,
    /// How many connections it may be given at once.
    pub max_connections: Option<usize>,
}

/// Which backend gets the next connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn.
    #[default]
    RoundRobin,
    /// That with the fewest connections.
    LeastConnections,
}

/// Where and how it is written down which connections there were.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// The file, to which is appended; `None`: stdout.
    pub path: Option<PathBuf>,
    /// How.
    pub format: AccessFormat,
}

/// How a line of the access log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}
