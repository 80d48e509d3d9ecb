//! `heirloom proxy --check`: says what a configuration means, for people.

use std::fmt::{self, Display, Formatter};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use heirloom_proxy::address::{Address, Place};
use heirloom_proxy::config::{AccessFormat, Backend, Balance, Config, Listener, Pool};

use crate::exit::Exit;
use crate::failure::Failure;

/// Prints to stdout what the file says, and to stderr what is wrong with it: `FILE:LINE:COLUMN: message`.
pub(super) fn run(file: &Path) -> Result<Exit, Failure> {
    let config = match Config::read(file) {
        Ok(config) => config,
        Err(error) => {
            writeln!(io::stderr(), "{error}")?;
            return Ok(Exit::Failed);
        }
    };
    for warning in config.warnings() {
        writeln!(io::stderr(), "{}: warning: {warning}", file.display())?;
    }
    // As a proxy does. A service may have another limit than this shell, so that this is no mistake in the file.
    let _ = heirloom::descriptors::raise_limit();
    if let Err(error) = config.fits(heirloom::descriptors::limit()) {
        writeln!(io::stderr(), "{}: warning: started from here it would end: {error}", file.display())?;
    }
    write!(io::stdout(), "{}", Summary(&config))?;
    Ok(Exit::Done)
}

/// A configuration as people read it: what each listener and pool does, defaults included.
struct Summary<'a>(&'a Config);

impl Display for Summary<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let config = self.0;
        for listener in &config.listeners {
            write_listener(f, listener, &config.pools[listener.pool])?;
        }
        for pool in &config.pools {
            write_pool(f, pool)?;
        }
        write_whole(f, config)
    }
}

fn write_listener(f: &mut Formatter<'_>, listener: &Listener, pool: &Pool) -> fmt::Result {
    write_named(f, "listener", &listener.name, &listener.address)?;
    writeln!(f, ", to the pool {}", pool.name)?;
    let limit = listener.max_connections.map(connections);
    let idle = listener.idle_timeout.map(|idle| format!("idle timeout {}", duration(idle)));
    let mode = listener.mode.map(|mode| format!("mode {mode:04o}"));
    let backlog = Some(format!("backlog {}", listener.backlog));
    let tcp = is_tcp(&listener.address).then(|| tcp(listener.keepalive, listener.nodelay));
    writeln!(f, "    {}", joined([limit, idle, tcp, backlog, mode]))
}

fn write_pool(f: &mut Formatter<'_>, pool: &Pool) -> fmt::Result {
    let balance = match pool.balance {
        Balance::RoundRobin => "round robin",
        Balance::LeastConnections => "least connections",
    };
    let connect = format!("connect timeout {}", duration(pool.connect_timeout));
    let retries = match pool.retries {
        0 => "no retries".to_owned(),
        1 => "1 retry".to_owned(),
        retries => format!("{retries} retries"),
    };
    let any_tcp = pool.backends.iter().any(|backend| is_tcp(&backend.address));
    let tcp = any_tcp.then(|| tcp(pool.keepalive, pool.nodelay));
    writeln!(f, "pool {}, {balance}", pool.name)?;
    writeln!(f, "    {}", joined([Some(connect), Some(retries), tcp]))?;
    pool.backends.iter().try_for_each(|backend| write_backend(f, backend))
}

fn write_backend(f: &mut Formatter<'_>, backend: &Backend) -> fmt::Result {
    write_named(f, "    backend", &backend.name, &backend.address)?;
    if let Some(limit) = backend.max_connections {
        write!(f, ", {}", connections(limit))?;
    }
    writeln!(f)
}

/// What is called so, and where it is; a name of a host is worth no more than what it means now.
fn write_named(f: &mut Formatter<'_>, what: &str, name: &str, address: &Address) -> fmt::Result {
    write!(f, "{what} {name}")?;
    if name != address.text() {
        write!(f, " at {address}")?;
    }
    let place = address.place().to_string();
    if place != address.text() {
        write!(f, ", which is {place}")?;
    }
    Ok(())
}

fn write_whole(f: &mut Formatter<'_>, config: &Config) -> fmt::Result {
    match config.threads {
        Some(threads) => write!(f, "threads: {threads}")?,
        None => write!(f, "threads: one for each processor")?,
    }
    writeln!(f, "{}", if config.pin_threads { ", pinned" } else { "" })?;
    match config.max_connections {
        Some(limit) => writeln!(f, "connections: at most {limit}")?,
        None => writeln!(f, "connections: as many as the limit on open files has room for")?,
    }
    match config.drain {
        Some(time) => {
            writeln!(f, "backends that a reload removes: connections end after {}", duration(time))?
        }
        None => writeln!(f, "backends that a reload removes: connections go on until they end")?,
    }
    let Some(log) = &config.access_log else {
        return writeln!(f, "access log: none");
    };
    let format = match log.format {
        AccessFormat::Text => "text",
        AccessFormat::Json => "JSON",
    };
    match &log.path {
        Some(path) => writeln!(f, "access log: {format} in {}", path.display()),
        None => writeln!(f, "access log: {format} to stdout"),
    }
}

fn connections(limit: usize) -> String {
    format!("at most {limit} {}", if limit == 1 { "connection" } else { "connections" })
}

fn is_tcp(address: &Address) -> bool {
    matches!(address.place(), Place::Tcp(_))
}

fn tcp(keepalive: Option<Duration>, nodelay: bool) -> String {
    let keepalive =
        keepalive.map_or("no keepalive".to_owned(), |time| format!("keepalive {}", duration(time)));
    format!("{keepalive}, {}", if nodelay { "nodelay" } else { "delay" })
}

fn duration(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(duration)
}

fn joined<const N: usize>(parts: [Option<String>; N]) -> String {
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
