//! The configuration that needs no file: some addresses to listen at, and one pool for them all.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::error::ConfigError;
use super::{AccessLog, Backend, Balance, Config, Listener, Pool, defaults, unique, values};
use crate::address::Address;

/// What can be said without a file; everything else is as it is by default.
///
/// ```
/// use heirloom_proxy::config::{Config, Simple};
///
/// let simple = Simple {
///     listen: vec!["127.0.0.1:8080".into()],
///     to: vec!["127.0.0.1:9001".into(), "127.0.0.1:9002".into()],
///     ..Simple::default()
/// };
/// let config = Config::simple(simple)?;
/// assert_eq!(config.listeners[0].name, "127.0.0.1:8080");
/// assert_eq!(config.pools[0].backends[1].name, "127.0.0.1:9002");
/// # Ok::<(), heirloom_proxy::config::ConfigError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Simple {
    /// Where to listen, as [`Address::to_listen`] reads it.
    pub listen: Vec<String>,
    /// The backends, as [`Address::to_connect`] reads them.
    pub to: Vec<String>,
    /// Which backend is next.
    pub balance: Balance,
    /// How long one backend may take to accept a connection.
    pub connect_timeout: Option<Duration>,
    /// How long a connection may be silent, both ways.
    pub idle_timeout: Option<Duration>,
    /// How many connections there may be at once.
    pub max_connections: Option<usize>,
    /// How many event loops.
    pub threads: Option<NonZeroUsize>,
    /// Whether each event loop stays on a processor.
    pub pin_threads: bool,
    /// How long a connection may go on whose backend is no longer there after a reload.
    pub drain: Option<Duration>,
    /// Where it is written down which connections there were.
    pub access_log: Option<AccessLog>,
}

/// What the pool is called, whatever the listeners are.
const POOL: &str = "backends";

impl Config {
    /// The configuration that is meant.
    ///
    /// # Errors
    ///
    /// When an address is none or is there twice, when there are none, or when a limit is zero.
    pub fn simple(simple: Simple) -> Result<Config, ConfigError> {
        config(simple).map_err(ConfigError::Simple)
    }
}

fn config(simple: Simple) -> Result<Config, String> {
    let about = |what: &'static str| move |why: String| format!("the {what} {why}");
    if let Some(timeout) = simple.connect_timeout {
        values::check_timeout(timeout).map_err(about("connect timeout"))?;
    }
    if let Some(timeout) = simple.idle_timeout {
        values::check_timeout(timeout).map_err(about("idle timeout"))?;
    }
    if let Some(drain) = simple.drain {
        values::check_duration(drain).map_err(about("drain time"))?;
    }
    if simple.max_connections == Some(0) {
        return Err("the limit on connections is zero, so that there could be none".to_owned());
    }

    let mut backends: Vec<Backend> = Vec::new();
    for text in &simple.to {
        let address = Address::to_connect(text).map_err(|error| error.to_string())?;
        if let Some(why) = unique::backend_address(&address, &backends) {
            return Err(why);
        }
        backends.push(Backend { name: text.clone(), address, max_connections: None });
    }
    if backends.is_empty() {
        return Err("there is no backend to connect to".to_owned());
    }

    let mut listeners: Vec<Listener> = Vec::new();
    for text in &simple.listen {
        let address = Address::to_listen(text).map_err(|error| error.to_string())?;
        if let Some(why) = unique::listener_address(&address, &listeners) {
            return Err(why);
        }
        listeners.push(Listener {
            name: text.clone(),
            address,
            pool: 0,
            max_connections: None,
            idle_timeout: simple.idle_timeout,
            keepalive: Some(defaults::KEEPALIVE),
            nodelay: defaults::NODELAY,
            backlog: defaults::BACKLOG,
            mode: None,
        });
    }
    if listeners.is_empty() {
        return Err("there is no address to listen at".to_owned());
    }

    let pool = Pool {
        name: POOL.to_owned(),
        balance: simple.balance,
        connect_timeout: simple.connect_timeout.unwrap_or(defaults::CONNECT_TIMEOUT),
        retries: defaults::RETRIES,
        keepalive: Some(defaults::KEEPALIVE),
        nodelay: defaults::NODELAY,
        backends,
    };
    Ok(Config {
        threads: simple.threads,
        pin_threads: simple.pin_threads,
        max_connections: simple.max_connections,
        drain: simple.drain,
        access_log: simple.access_log,
        listeners,
        pools: vec![pool.with_possible_retries()],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simple(listen: &[&str], to: &[&str]) -> Simple {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        Simple { listen: owned(listen), to: owned(to), ..Simple::default() }
    }

    #[test]
    fn it_is_what_a_file_would_say() {
        let file = r#"
            threads = 2
            pin_threads = true
            max_connections = 10
            drain = "1m"
            [[listener]]
            listen = ":80"
            pool = "backends"
            idle_timeout = "1h"
            [[listener]]
            listen = "unix:/run/a"
            pool = "backends"
            idle_timeout = "1h"
            [pool.backends]
            balance = "least-connections"
            connect_timeout = "1s"
            backends = ["127.0.0.1:1", "127.0.0.1:2"]
        "#;
        let simple = Simple {
            balance: Balance::LeastConnections,
            connect_timeout: Some(Duration::from_secs(1)),
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connections: Some(10),
            threads: NonZeroUsize::new(2),
            pin_threads: true,
            drain: Some(Duration::from_secs(60)),
            ..simple(&[":80", "unix:/run/a"], &["127.0.0.1:1", "127.0.0.1:2"])
        };
        let config = Config::simple(simple).unwrap();
        assert_eq!(config, Config::parse(file, "a.toml").unwrap());
        assert_eq!(config.pools[0].retries, 1, "there is one other backend");
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        let ok = || simple(&["127.0.0.1:0"], &["127.0.0.1:1"]);
        let zero = Some(Duration::ZERO);
        for (simple, says) in [
            (simple(&[], &["127.0.0.1:1"]), "no address to listen at"),
            (simple(&[":80"], &[]), "no backend"),
            (simple(&[":80", "[::]:80"], &["127.0.0.1:1"]), "listens at [::]:80 already"),
            (simple(&["127.0.0.1:0", "127.0.0.1:0"], &["127.0.0.1:1"]), "listens at 127.0.0.1:0 already"),
            (simple(&[":80"], &["127.0.0.1:1", "127.0.0.1:1"]), "is at 127.0.0.1:1 already"),
            (simple(&["80"], &["127.0.0.1:1"]), "\"80\" has no port"),
            (simple(&[":80"], &[":1"]), "\":1\" has no host"),
            (Simple { idle_timeout: zero, ..ok() }, "the idle timeout is zero"),
            (Simple { connect_timeout: zero, ..ok() }, "the connect timeout is zero"),
            (Simple { drain: Some(Duration::MAX), ..ok() }, "the drain time is more than a year"),
            (Simple { max_connections: Some(0), ..ok() }, "the limit on connections is zero"),
        ] {
            let error = Config::simple(simple.clone()).unwrap_err().to_string();
            assert!(error.contains(says), "{simple:?}: {error}");
        }
        assert!(Config::simple(Simple { drain: zero, ..ok() }).is_ok(), "at once");
        assert!(Config::simple(simple(&["127.0.0.1:0", "[::1]:0"], &["127.0.0.1:1"])).is_ok());
    }
}
