//! Where the program's log goes and how much of it there is.
//!
//! Lines go to stderr as text or JSON, or to the [journal], which is also where they go when stderr leads there, as under
//! systemd: then with their fields. Logging never harms the program: a stderr that is closed,
//! full or broken loses lines, and stalls the caller for a tenth of a second a line at most.

mod journal;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use journal::Journal;

/// The environment variable that sets the level where the command line does not.
const LEVEL_VARIABLE: &str = "HEIRLOOM_LOG";

/// What the log reads from the environment, for `--help` and the man pages.
pub(crate) const ENVIRONMENT: &[(&str, &str)] = &[
    (
        LEVEL_VARIABLE,
        "The level of the log where --log-level is not given: error, warn, info, debug or trace.",
    ),
    (
        journal::STREAM_VARIABLE,
        "Which file leads to the journal. If that is stderr, the log goes there with its fields, unless --log-format is given.",
    ),
    ("NO_COLOR", "If it is set and not empty, the log has no colours. It has them on terminals only."),
];

/// How long a line may wait for room.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The options for logging, the same in every command.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LogOptions {
    /// Log this level and what is graver [default: $HEIRLOOM_LOG, or info]
    #[arg(long, value_enum, value_name = "LEVEL", global = true)]
    log_level: Option<Level>,

    /// Log to stderr, and how a line looks there [default: text, or the journal if stderr leads to it]
    #[arg(long, value_enum, value_name = "FORMAT", global = true, conflicts_with = "journal")]
    log_format: Option<Format>,

    /// Log to the systemd journal instead of stderr
    #[arg(long, global = true)]
    journal: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Starts logging. To be called once, before anything is logged.
pub(crate) fn init(options: &LogOptions) -> anyhow::Result<()> {
    let level = level(options.log_level, env::var(LEVEL_VARIABLE).ok().as_deref())?;
    let layer = match journal(options)? {
        Some(journal) => journal.boxed(),
        None => lines(options.log_format.unwrap_or(Format::Text)),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(level))
        .try_init()
        .context("cannot start logging: it was started before")
}

/// The journal, if the log goes there: because it is asked for, or because stderr leads there anyway.
fn journal(options: &LogOptions) -> anyhow::Result<Option<Journal>> {
    if options.journal {
        let journal = Journal::connect().context(
            "cannot log to the journal: its socket /run/systemd/journal/socket does not answer; \
             leave --journal out to log to stderr, or start systemd-journald",
        )?;
        return Ok(Some(journal));
    }
    let stream = env::var(journal::STREAM_VARIABLE).ok();
    let leads_there = options.log_format.is_none() && journal::is_stream(stream.as_deref(), io::stderr());
    Ok(if leads_there { Journal::connect().ok() } else { None })
}

/// Lines on stderr.
fn lines<S>(format: Format) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // The layer reports a failed write with eprintln!, which panics when stderr is what failed.
    let lines = fmt::layer().with_writer(|| Stderr).log_internal_errors(false);
    match format {
        Format::Text => lines.with_target(false).with_ansi(colours()).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// The level from the command line, or else from the environment, or else `info`.
fn level(option: Option<Level>, variable: Option<&str>) -> anyhow::Result<LevelFilter> {
    let level = match (option, variable) {
        (Some(level), _) => level,
        (None, None | Some("")) => Level::Info,
        (None, Some(name)) => Level::from_str(name, true).map_err(|_| {
            anyhow!("{LEVEL_VARIABLE}={name} is no level: set it to error, warn, info, debug or trace, or unset it")
        })?,
    };
    Ok(match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    })
}

/// Colours are for people: a terminal, and nobody has set `NO_COLOR` (<https://no-color.org>).
fn colours() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Stderr as a log's sink: every write succeeds, whatever becomes of the bytes.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_patiently(io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what can be written without waiting for longer than a tenth of a second for room, and drops the rest.
fn write_patiently<F: AsFd>(file: F, mut bytes: &[u8]) {
    // A pipe that polls writable has room for PIPE_BUF bytes (pipe(7)), so that the write does not block.
    const CHUNK: usize = 4096;
    while !bytes.is_empty() {
        let mut fds = [PollFd::new(&file, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&PATIENCE)), Ok(1)) || !fds[0].revents().contains(PollFlags::OUT) {
            return;
        }
        match rustix::io::write(&file, &bytes[..bytes.len().min(CHUNK)]) {
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::{Duration, Instant};

    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        log: LogOptions,
    }

    fn parse(arguments: &[&str]) -> Result<LogOptions, clap::Error> {
        Program::try_parse_from([&["heirloom"], arguments].concat()).map(|program| program.log)
    }

    #[test]
    fn the_command_line_outranks_the_environment() {
        assert_eq!(level(None, None).unwrap(), LevelFilter::INFO);
        assert_eq!(level(None, Some("")).unwrap(), LevelFilter::INFO);
        assert_eq!(level(None, Some("DEBUG")).unwrap(), LevelFilter::DEBUG);
        assert_eq!(level(Some(Level::Error), Some("debug")).unwrap(), LevelFilter::ERROR);
        // Nonsense in a variable that is not consulted does no harm.
        assert_eq!(level(Some(Level::Trace), Some("loud")).unwrap(), LevelFilter::TRACE);
    }

    #[test]
    fn an_unknown_level_is_an_error_that_lists_the_known_ones() {
        let error = level(None, Some("loud")).unwrap_err().to_string();
        assert!(error.contains("HEIRLOOM_LOG=loud"), "{error}");
        assert!(error.contains("error, warn, info, debug or trace"), "{error}");
    }

    #[test]
    fn options_parse_and_conflict() {
        let options = parse(&["--log-level", "warn", "--log-format", "json"]).unwrap();
        assert_eq!(options.log_level, Some(Level::Warn));
        assert_eq!(options.log_format, Some(Format::Json));
        assert!(parse(&["--journal"]).unwrap().journal);
        assert!(parse(&["--journal", "--log-format", "text"]).is_err());
        assert!(parse(&["--log-level", "loud"]).is_err());
    }

    #[test]
    fn lines_arrive_whole() {
        let (mut reader, writer) = io::pipe().unwrap();
        let line = vec![b'x'; 10_000];
        write_patiently(&writer, &line);
        drop(writer);
        let mut arrived = Vec::new();
        reader.read_to_end(&mut arrived).unwrap();
        assert_eq!(arrived, line);
    }

    #[test]
    fn a_reader_that_has_gone_or_sleeps_costs_lines_and_little_time() {
        let (reader, writer) = io::pipe().unwrap();
        let started = Instant::now();
        // More than a pipe holds: the rest is dropped.
        write_patiently(&writer, &vec![b'x'; 200_000]);
        drop(reader);
        write_patiently(&writer, b"nobody reads this\n");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
