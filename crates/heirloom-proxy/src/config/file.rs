//! The configuration file: which keys there are, what is there by default, and what has to fit together.
//!
//! Whatever is wrong is said with line and column, and nothing is passed over: a key that is not known is an error.

use std::fs;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeValue;

use super::error::{ConfigError, Wrong};
use super::table::{self, Table, kind, list, nearest};
use super::{AccessLog, Backend, Config, Listener, Pool, defaults, unique, values};
use crate::address::{Address, Place};

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// When it cannot be read, and as [`Config::parse`].
    ///
    /// ```
    /// let error = heirloom_proxy::config::Config::read("/nowhere/web.toml").unwrap_err();
    /// assert!(error.to_string().starts_with("cannot read the configuration /nowhere/web.toml: "));
    /// ```
    pub fn read(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Config::parse(text, path),
            Err(error) => Err(Wrong::new(error.valid_up_to(), "this is no UTF-8").locate(&bytes, path)),
        }
    }

    /// Reads the text of a file, which errors call `path`. Names of hosts in it are looked up.
    ///
    /// # Errors
    ///
    /// When it is no TOML, has an unknown key, a value that makes no sense, or things that do not fit together.
    ///
    /// ```
    /// use heirloom_proxy::config::Config;
    ///
    /// let text = r#"
    ///     [[listener]]
    ///     name = "web"
    ///     listen = "127.0.0.1:8080"
    ///     pool = "app"
    ///
    ///     [pool.app]
    ///     backends = ["127.0.0.1:9001", { address = "unix:/run/app.sock", max_connections = 100 }]
    /// "#;
    /// let config = Config::parse(text, "web.toml")?;
    /// assert_eq!(config.pools[config.listeners[0].pool].backends.len(), 2);
    /// # Ok::<(), heirloom_proxy::config::ConfigError>(())
    /// ```
    pub fn parse(text: &str, path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        config(text).map_err(|wrong| wrong.locate(text.as_bytes(), path.as_ref()))
    }
}

fn config(text: &str) -> Result<Config, Wrong> {
    let mut top = Table::parse(text)?;
    let threads = top.take("threads", values::threads)?;
    let pin_threads = top.take("pin_threads", values::boolean)?.unwrap_or(defaults::PIN_THREADS);
    let max_connections = top.take("max_connections", values::limit)?;
    let drain = top.take("drain", values::duration)?;
    let access_log = top.take_table("access_log")?.map(access_log).transpose()?;
    let listener_tables = top.take_tables("listener")?;
    let pool_tables = top.take_named_tables("pool")?;
    top.finish()?;

    let mut pools = Vec::new();
    for (name, table) in pool_tables {
        pools.push(pool(name, table)?);
    }
    let shared = pools.len();
    let mut listeners = Vec::new();
    for table in listener_tables {
        let listener = listener(table, &listeners, &mut pools, shared)?;
        listeners.push(listener);
    }
    if listeners.is_empty() {
        return Err(Wrong::new(
            text.len(),
            "there is no listener: write [[listener]] with `listen` and `to`",
        ));
    }
    Ok(Config { threads, pin_threads, max_connections, drain, access_log, listeners, pools })
}

fn access_log(mut table: Table<'_>) -> Result<AccessLog, Wrong> {
    let path = table.take("path", |value| match values::string(value)? {
        path if path.is_empty() => Err("is empty: leave it out for stdout".to_owned()),
        path => Ok(PathBuf::from(path)),
    })?;
    // As in the option --access-log.
    let path = path.filter(|path| path != Path::new("-"));
    let format = table.take("format", values::format)?.unwrap_or_default();
    table.finish()?;
    Ok(AccessLog { path, format })
}

/// One `[[listener]]`; with `to` its own pool is added to the others, of which the first `shared` can be anybody's.
fn listener(
    mut table: Table<'_>,
    others: &[Listener],
    pools: &mut Vec<Pool>,
    shared: usize,
) -> Result<Listener, Wrong> {
    let name = table.take("name", values::name)?;
    let address = table.take("listen", |value| address(value, Address::to_listen))?;
    let to = table.take_list("to")?;
    let pool_name = table.take("pool", values::string)?;
    let balance = table.take("balance", values::balance)?;
    let connect_timeout = table.take("connect_timeout", values::timeout)?;
    let retries = table.take("retries", values::retries)?;
    let idle_timeout = table.take("idle_timeout", values::timeout)?;
    let max_connections = table.take("max_connections", values::limit)?;
    let keepalive = table.take("keepalive", values::keepalive)?.unwrap_or(Some(defaults::KEEPALIVE));
    let nodelay = table.take("nodelay", values::boolean)?.unwrap_or(defaults::NODELAY);
    let backlog = table.take("backlog", values::backlog)?.unwrap_or(defaults::BACKLOG);
    let mode = table.take("mode", values::mode)?;
    table.finish()?;

    let Some(address) = address else {
        return Err(table.wrong("listen", "this listener has no address: write listen = \"ADDRESS\""));
    };
    let named = name.is_some();
    let name = name.unwrap_or_else(|| address.text().to_owned());
    if mode.is_some() && matches!(address.place(), Place::Tcp(_)) {
        let why = format!("`mode` is for UNIX sockets, and {address} is none: leave it out");
        return Err(table.wrong("mode", why));
    }
    if let Some(why) = unique::listener_address(&address, others) {
        return Err(table.wrong("listen", why));
    }
    if others.iter().any(|other| other.name == name) {
        let why = format!("another listener is called {name:?}: give this one another name");
        return Err(table.wrong(if named { "name" } else { "listen" }, why));
    }
    let pool = match (to, pool_name) {
        (Some(list), None) => {
            if pools.iter().any(|pool| pool.name == name) {
                let why = format!(
                    "these backends are the pool {name:?}, as the listener is called, and there is another of that name: \
                     give the listener another name, or write pool = {name:?} for that one"
                );
                return Err(table.wrong("to", why));
            }
            let own = Pool {
                name: name.clone(),
                balance: balance.unwrap_or_default(),
                connect_timeout: connect_timeout.unwrap_or(defaults::CONNECT_TIMEOUT),
                retries: retries.unwrap_or(defaults::RETRIES),
                keepalive,
                nodelay,
                backends: backends("to", list)?,
            };
            pools.push(own.with_possible_retries());
            pools.len() - 1
        }
        (None, Some(pool)) => {
            if let Some(key) =
                ["balance", "connect_timeout", "retries"].into_iter().find(|key| table.had(key))
            {
                let why = format!("`{key}` is the pool's: write it in [pool.{pool}]");
                return Err(table.wrong(key, why));
            }
            find(&pool, &pools[..shared]).map_err(|why| table.wrong("pool", why))?
        }
        (Some(_), Some(_)) => {
            return Err(table.wrong("pool", "there is `to` as well: write either `to` or `pool`"));
        }
        (None, None) => {
            let why = format!(
                "the listener {name:?} has no backends: write to = [\"ADDRESS\"], or pool = \"NAME\""
            );
            return Err(table.wrong("", why));
        }
    };
    Ok(Listener { name, address, pool, max_connections, idle_timeout, keepalive, nodelay, backlog, mode })
}

/// The place of a pool with a table of its own.
fn find(name: &str, pools: &[Pool]) -> Result<usize, String> {
    if let Some(index) = pools.iter().position(|pool| pool.name == name) {
        return Ok(index);
    }
    let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
    Err(match nearest(name, &names) {
        Some(near) => format!("there is no pool {name:?}: is it {near:?}?"),
        None if names.is_empty() => format!("there is no pool {name:?}: write [pool.{name}] with `backends`"),
        None => format!("there is no pool {name:?}: there are {}", list(&names)),
    })
}

/// One `[pool.NAME]`.
fn pool(name: String, mut table: Table<'_>) -> Result<Pool, Wrong> {
    let balance = table.take("balance", values::balance)?.unwrap_or_default();
    let connect_timeout =
        table.take("connect_timeout", values::timeout)?.unwrap_or(defaults::CONNECT_TIMEOUT);
    let retries = table.take("retries", values::retries)?.unwrap_or(defaults::RETRIES);
    let keepalive = table.take("keepalive", values::keepalive)?.unwrap_or(Some(defaults::KEEPALIVE));
    let nodelay = table.take("nodelay", values::boolean)?.unwrap_or(defaults::NODELAY);
    let list = table.take_list("backends")?;
    table.finish()?;
    values::check_name(&name).map_err(|why| table.wrong("", format!("the pool's name {why}")))?;
    let Some(list) = list else {
        let why = format!("the pool {name:?} has no backends: write backends = [\"ADDRESS\"]");
        return Err(table.wrong("backends", why));
    };
    let backends = backends("backends", list)?;
    let pool = Pool { name, balance, connect_timeout, retries, keepalive, nodelay, backends };
    Ok(pool.with_possible_retries())
}

/// The list of backends that is the value of a key.
fn backends(key: &'static str, list: Vec<Spanned<DeValue<'_>>>) -> Result<Vec<Backend>, Wrong> {
    let mut backends = Vec::new();
    for value in list {
        let backend = backend(key, value, &backends)?;
        backends.push(backend);
    }
    Ok(backends)
}

/// A backend: an address, or a table with one.
fn backend(key: &'static str, value: Spanned<DeValue<'_>>, others: &[Backend]) -> Result<Backend, Wrong> {
    let start = value.span().start;
    let (backend, address_at, name_at) = match value.get_ref() {
        DeValue::String(_) => {
            let address = address(value.get_ref(), Address::to_connect)
                .map_err(|why| Wrong::new(start, format!("this backend {why}")))?;
            (Backend { name: address.text().to_owned(), address, max_connections: None }, start, start)
        }
        DeValue::Table(_) => {
            let mut table = table::table(key, value, "a table")?;
            let address = table.take("address", |value| address(value, Address::to_connect))?;
            let name = table.take("name", values::name)?;
            let max_connections = table.take("max_connections", values::limit)?;
            table.finish()?;
            let Some(address) = address else {
                return Err(
                    table.wrong("address", "this backend has no address: write address = \"ADDRESS\"")
                );
            };
            let (address_at, name_at) =
                (table.place("address"), table.place(if name.is_some() { "name" } else { "address" }));
            let name = name.unwrap_or_else(|| address.text().to_owned());
            (Backend { name, address, max_connections }, address_at, name_at)
        }
        other => {
            let why = format!(
                "`{key}` is to be a list of addresses, or of tables with an `address`, not of {}",
                kind(other)
            );
            return Err(Wrong::new(start, why));
        }
    };
    if let Some(why) = unique::backend_address(&backend.address, others) {
        return Err(Wrong::new(address_at, why));
    }
    if others.iter().any(|other| other.name == backend.name) {
        let why =
            format!("another backend of this pool is called {:?}: give this one another name", backend.name);
        return Err(Wrong::new(name_at, why));
    }
    Ok(backend)
}

fn address(
    value: &DeValue<'_>,
    read: impl FnOnce(&str) -> Result<Address, crate::address::AddressError>,
) -> Result<Address, String> {
    let text = values::string(value)?;
    read(&text).map_err(|error| format!("is no address: {error}"))
}

#[cfg(test)]
mod tests;
