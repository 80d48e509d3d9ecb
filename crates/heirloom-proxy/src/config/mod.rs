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
///
/// ```
/// # use heirloom_proxy::config::Config;
/// let text = "max_connections = 100\n[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:8080']";
/// let config = Config::parse(text, "web.toml")?;
/// assert_eq!(config.max_connections, Some(100));
/// assert_eq!(config.threads, None);
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// How many event loops; by default as many as there are processors for this process.
    pub threads: Option<NonZeroUsize>,
    /// Whether each event loop stays on one of the processors for this process, in turn.
    pub pin_threads: bool,
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
            let backends =
                self.pools.get(listener.pool).map(|pool| pool.backends.as_slice()).unwrap_or_default();
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
///
/// ```
/// # use heirloom_proxy::config::Config;
/// let text = "[[listener]]\nlisten = 'unix:/run/front.sock'\nmode = '0660'\nto = ['127.0.0.1:8080']";
/// let config = Config::parse(text, "web.toml")?;
/// let listener = &config.listeners[0];
/// assert_eq!((listener.name.as_str(), listener.mode), ("unix:/run/front.sock", Some(0o660)));
/// assert_eq!(config.pools[listener.pool].name, listener.name);
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
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
///
/// ```
/// # use heirloom_proxy::config::{Balance, Config};
/// let text = "
///     [[listener]]
///     listen = ':80'
///     pool = 'app'
///     [pool.app]
///     balance = 'least-connections'
///     backends = ['127.0.0.1:8080', '127.0.0.1:8081']
/// ";
/// let pool = &Config::parse(text, "web.toml")?.pools[0];
/// assert_eq!((pool.name.as_str(), pool.balance), ("app", Balance::LeastConnections));
/// assert_eq!(pool.retries, 1); // there is one other backend
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
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
///
/// ```
/// # use heirloom_proxy::config::Config;
/// let text = "[[listener]]\nlisten = ':80'\nto = [{ address = '127.0.0.1:8080', name = 'small', max_connections = 10 }]";
/// let backend = &Config::parse(text, "web.toml")?.pools[0].backends[0];
/// assert_eq!((backend.name.as_str(), backend.max_connections), ("small", Some(10)));
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
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
///
/// ```
/// use heirloom_proxy::config::Balance;
///
/// assert_eq!(Balance::default(), Balance::RoundRobin);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn.
    #[default]
    RoundRobin,
    /// That with the fewest connections.
    LeastConnections,
}

/// Where and how it is written down which connections there were.
///
/// ```
/// # use heirloom_proxy::config::{AccessFormat, AccessLog, Config};
/// let text = "[access_log]\nformat = 'json'\n[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:8080']";
/// let log = Config::parse(text, "web.toml")?.access_log;
/// assert_eq!(log, Some(AccessLog { path: None, format: AccessFormat::Json }));
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// The file, to which is appended; `None`: stdout.
    pub path: Option<PathBuf>,
    /// How.
    pub format: AccessFormat,
}

/// How a line of the access log is written.
///
/// ```
/// use heirloom_proxy::config::AccessFormat;
///
/// assert_eq!(AccessFormat::default(), AccessFormat::Text);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}
