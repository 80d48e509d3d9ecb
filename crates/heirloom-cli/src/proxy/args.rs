//! The options of `heirloom proxy`, and the configuration that they mean.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, ValueEnum, ValueHint};
use heirloom::Replace;
use heirloom_proxy::config::{AccessFormat, AccessLog, Balance, Config, ConfigError, Simple};

use crate::control::Target;
use crate::failure::Failure;
use crate::replace::ReplaceArg;

/// The options of which a file says the values.
const SIMPLE: [&str; 8] = [
    "to",
    "balance",
    "connect_timeout",
    "idle_timeout",
    "max_connections",
    "drain",
    "access_log",
    "access_log_format",
];
/// The options of a proxy that serves, wherever its configuration comes from.
const SERVING: [&str; 6] = ["threads", "pin_threads", "control", "name", "replace", "force"];

/// The options of `heirloom proxy`.
#[derive(clap::Args, Clone, Debug)]
#[command(group = ArgGroup::new("form").args(["listen", "config", "check"]).required(true))]
pub(crate) struct Args {
    /// Listen at these addresses
    #[arg(long, value_name = "ADDR,...", value_delimiter = ',', requires = "to")]
    listen: Vec<String>,
    /// Pass connections on to these backends
    #[arg(
        long,
        value_name = "ADDR,...",
        value_delimiter = ',',
        requires = "listen",
        conflicts_with = "config"
    )]
    to: Vec<String>,
    /// Do what this file says
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = SIMPLE)]
    config: Option<PathBuf>,
    /// Print what this file says, or what is wrong with it, and do nothing
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
          conflicts_with_all = [&SIMPLE[..], &SERVING[..]].concat())]
    check: Option<PathBuf>,
    /// Which backend gets the next connection: each in turn, or that with the fewest
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = BalanceArg::RoundRobin)]
    balance: BalanceArg,
    /// How long one backend may take to accept a connection before the next is tried [default: 5s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    connect_timeout: Option<Duration>,
    /// End a connection on which nothing was sent for so long, either way
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    idle_timeout: Option<Duration>,
    /// How many connections there may be at once [default: what the limit on open files has room for]
    #[arg(long, value_name = "N")]
    max_connections: Option<usize>,
    /// How many event loops there are [default: as the configuration says, or one for each processor]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Keep each event loop on a processor of its own, for a machine that does little else
    #[arg(long)]
    pin_threads: bool,
    /// After a reload, how long connections may go on with a backend that is not configured any more [default: until they end]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    drain: Option<Duration>,
    /// Append a line to this file for each connection that has ended; -: to stdout
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    access_log: Option<PathBuf>,
    /// How a line of the access log is written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FormatArg::Text, requires = "access_log")]
    access_log_format: FormatArg,
    #[command(flatten)]
    target: Target,
    /// Whether to take over from a proxy that already runs there: never is an error if there is one, must if there is none
    #[arg(long, value_enum, default_value_t = ReplaceArg::Try)]
    replace: ReplaceArg,
    /// Take over from a proxy in a unit (systemd's service or scope) that this process is no part of; its supervisor may then start another
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BalanceArg {
    RoundRobin,
    LeastConnections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Text,
    Json,
}

impl Args {
    /// The file of which only is said what it means.
    pub(super) fn check(&self) -> Option<&Path> {
        self.check.as_deref()
    }

    /// The configuration: what the file says now, or what the options say.
    pub(super) fn config(&self) -> Result<Config, ConfigError> {
        match &self.config {
            Some(file) => {
                let config = Config::read(file)?;
                Ok(Config {
                    threads: self.threads.or(config.threads),
                    pin_threads: self.pin_threads || config.pin_threads,
                    ..config
                })
            }
            None => Config::simple(self.simple()),
        }
    }

    fn simple(&self) -> Simple {
        let format = match self.access_log_format {
            FormatArg::Text => AccessFormat::Text,
            FormatArg::Json => AccessFormat::Json,
        };
        let path = |path: &PathBuf| Some(path.clone()).filter(|path| path != Path::new("-"));
        Simple {
            listen: self.listen.clone(),
            to: self.to.clone(),
            balance: match self.balance {
                BalanceArg::RoundRobin => Balance::RoundRobin,
                BalanceArg::LeastConnections => Balance::LeastConnections,
            },
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
            max_connections: self.max_connections,
            threads: self.threads,
            pin_threads: self.pin_threads,
            drain: self.drain,
            access_log: self.access_log.as_ref().map(|file| AccessLog { path: path(file), format }),
        }
    }

    /// Where the control socket is.
    pub(super) fn control(&self) -> Result<PathBuf, Failure> {
        self.target.path("proxy", &self.called())
    }

    /// What a proxy is called by default: by its file, or by where it listens first.
    fn called(&self) -> String {
        let stem = self.config.as_deref().and_then(Path::file_stem);
        let text = stem.map(|stem| stem.to_string_lossy().into_owned());
        // A path is a part of a file's name here.
        text.or_else(|| self.listen.first().cloned()).unwrap_or_default().replace('/', "-")
    }

    /// What to do about a proxy that is there already.
    pub(super) fn replace(&self) -> Replace {
        self.replace.into()
    }

    /// Whether to take over from a unit that this process is no part of.
    pub(super) fn force(&self) -> bool {
        self.force
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parse(options: &str) -> Result<Args, clap::Error> {
        let words = ["proxy"].into_iter().chain(options.split_whitespace());
        Program::try_parse_from(words).map(|program| program.args)
    }

    #[test]
    fn there_is_one_form_at_a_time() {
        for wrong in [
            "",
            "--listen :80",
            "--to 127.0.0.1:81",
            "--config a --listen :80 --to 127.0.0.1:81",
            "--config a --to 127.0.0.1:81",
            "--config a --check a",
            "--check a --listen :80 --to 127.0.0.1:81",
            "--config a --balance round-robin",
            "--config a --connect-timeout 1s",
            "--config a --idle-timeout 1s",
            "--config a --max-connections 1",
            "--config a --drain 1s",
            "--config a --access-log -",
            "--listen :80 --to 127.0.0.1:81 --access-log-format json",
            "--listen :80 --to 127.0.0.1:81 --threads 0",
            "--listen :80 --to 127.0.0.1:81 --name a --control /a",
            "--check a --threads 1",
            "--check a --pin-threads",
            "--check a --name b",
            "--check a --control /b",
            "--check a --replace must",
            "--check a --force",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for right in [
            "--listen :80 --to 127.0.0.1:81 --threads 2 --drain 0s --access-log x --access-log-format json --force",
            "--config a --threads 2 --pin-threads --name b --replace must --force",
            "--config a --control /b",
            "--check a",
        ] {
            assert!(parse(right).is_ok(), "{right}");
        }
    }

    #[test]
    fn options_say_what_a_simple_configuration_is() {
        let args = parse(
            "--listen 127.0.0.1:0,unix:/run/a --to 127.0.0.1:1,127.0.0.1:2 --to 127.0.0.1:3 --balance least-connections \
             --connect-timeout 2s --idle-timeout 1h --max-connections 100 --threads 3 --drain 10m --access-log - \
             --access-log-format json",
        );
        let args = args.unwrap();
        assert_eq!(args.replace(), Replace::Try);
        let config = args.config().unwrap();
        assert_eq!((config.listeners.len(), config.pools[0].backends.len()), (2, 3));
        assert_eq!(config.pools[0].balance, Balance::LeastConnections);
        assert_eq!(config.pools[0].connect_timeout, Duration::from_secs(2));
        assert_eq!(config.listeners[1].idle_timeout, Some(Duration::from_secs(3600)));
        assert_eq!((config.max_connections, config.threads), (Some(100), NonZeroUsize::new(3)));
        assert_eq!(config.drain, Some(Duration::from_secs(600)));
        assert_eq!(config.access_log, Some(AccessLog { path: None, format: AccessFormat::Json }));

        let log =
            parse("--listen :80 --to 127.0.0.1:81 --access-log a.log").unwrap().config().unwrap().access_log;
        assert_eq!(log, Some(AccessLog { path: Some("a.log".into()), format: AccessFormat::Text }));
        assert_eq!(parse("--listen :80 --to 127.0.0.1:81").unwrap().config().unwrap().access_log, None);
    }

    #[test]
    fn what_is_said_of_the_loops_outranks_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.toml");
        std::fs::write(&file, "threads = 2\n[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:81']\n").unwrap();
        let threads = |more: &str| {
            let config = parse(&format!("--config {} {more}", file.display())).unwrap().config().unwrap();
            (config.threads, config.pin_threads)
        };
        assert_eq!(threads(""), (NonZeroUsize::new(2), false));
        assert_eq!(threads("--threads 5"), (NonZeroUsize::new(5), false));
        assert_eq!(threads("--pin-threads"), (NonZeroUsize::new(2), true));
    }

    #[test]
    fn a_proxy_is_called_by_its_file_or_its_first_address() {
        for (options, name) in [
            ("--listen 127.0.0.1:80,127.0.0.1:81 --to 127.0.0.1:82", "127.0.0.1:80"),
            ("--listen unix:/run/a.sock --to 127.0.0.1:82", "unix:-run-a.sock"),
            ("--config /etc/heirloom/web.toml", "web"),
            ("--config web", "web"),
        ] {
            assert_eq!(parse(options).unwrap().called(), name, "{options}");
        }
        assert_eq!(parse("--config web --control /a/b").unwrap().control().unwrap(), Path::new("/a/b"));
    }
}
