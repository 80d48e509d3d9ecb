//! What can be said on the command line, however it is read.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::listen::Listen;

/// What to run, and how.
///
/// ```
/// use heirloom_run::{Command, Options};
/// use std::time::Duration;
///
/// let mut options = Options::new(Command::new("/usr/sbin/echod", ["--verbose"]));
/// options.listen.push("http=127.0.0.1:8080".parse()?);
/// options.stop_timeout = Duration::from_secs(30);
/// # Ok::<(), heirloom_run::ListenError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is run.
    pub command: Command,
    /// The sockets that it gets.
    pub listen: Vec<Listen>,
    /// How many descriptors it may store; as many as the limit on open files allows if nothing is said.
    pub store_max: Option<u64>,
    /// The path of the control socket; one that is named after the command if nothing is said.
    pub control: Option<PathBuf>,
    /// When it is started again.
    pub restart: Restart,
    /// How many failures in quick succession end it all; 0: none do.
    pub tries: u32,
    /// How long to wait before it is started again after a failure; twice as long after each further one in quick succession,
    /// at most 10 s.
    pub restart_delay: Duration,
    /// How long it has to end before it is killed.
    pub stop_timeout: Duration,
    /// How long it has to say that it is ready, if it is one that does.
    pub start_timeout: Duration,
    /// How often it has to say that it is alive.
    pub watchdog: Option<Duration>,
    /// Whether what is held is kept by the supervisor above as well.
    pub store_above: StoreAbove,
    /// It says when it is ready. What is not known from the beginning is learned when it first does.
    pub expect_ready: bool,
}

impl Options {
    /// The defaults, for this command.
    pub fn new(command: Command) -> Options {
        Options {
            command,
            listen: Vec::new(),
            store_max: None,
            control: None,
            restart: Restart::default(),
            tries: 10,
            restart_delay: Duration::from_millis(100),
            stop_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(30),
            watchdog: None,
            store_above: StoreAbove::default(),
            expect_ready: false,
        }
    }
}

/// A program and its arguments.
///
/// ```
/// let command = heirloom_run::Command::new("echod", ["-v"]);
/// assert_eq!(command.words(), ["echod", "-v"]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The program: a path, or a name that is looked for along `PATH`.
    pub program: OsString,
    /// Its arguments, without its own name.
    pub arguments: Vec<OsString>,
}

impl Command {
    /// A program with these arguments.
    pub fn new<A: Into<OsString>>(
        program: impl Into<OsString>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        Command { program: program.into(), arguments: arguments.into_iter().map(Into::into).collect() }
    }

    /// Program and arguments, for people.
    pub fn words(&self) -> Vec<String> {
        [&self.program].into_iter().chain(&self.arguments).map(|word| word.to_string_lossy().into()).collect()
    }
}

/// Reads a duration: a number with a unit, `ms`, `s`, `m` or `h`; seconds without one.
///
/// # Errors
///
/// A sentence that says what it should be.
///
/// ```
/// use std::time::Duration;
///
/// assert_eq!(heirloom_run::parse_duration("500ms"), Ok(Duration::from_millis(500)));
/// assert_eq!(heirloom_run::parse_duration("2m"), Ok(Duration::from_secs(120)));
/// assert!(heirloom_run::parse_duration("soon").is_err());
/// ```
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(milliseconds)) {
        Some(total) if milliseconds > 0 => Ok(Duration::from_millis(total)),
        _ => Err(format!("{text:?} is no duration: give a number and ms, s, m or h, such as 10s")),
    }
}

/// When a command that has ended is started again.
///
/// ```
/// use heirloom_run::Restart;
///
/// assert_eq!(Restart::default(), Restart::OnFailure);
/// assert_eq!("always".parse(), Ok(Restart::Always));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// Unless it has ended with code 0.
    #[default]
    OnFailure,
    /// In any case.
    Always,
    /// Never.
    Never,
}

/// Whether what is held is kept by the supervisor above as well, so that it survives a SIGKILL of run.
///
/// ```
/// use heirloom_run::StoreAbove;
///
/// assert_eq!("never".parse(), Ok(StoreAbove::Never));
/// assert_eq!(StoreAbove::default(), StoreAbove::Auto);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreAbove {
    /// If there is one that keeps descriptors.
    #[default]
    Auto,
    /// Never.
    Never,
}

impl std::str::FromStr for StoreAbove {
    type Err = String;

    fn from_str(text: &str) -> Result<StoreAbove, String> {
        match text {
            "auto" => Ok(StoreAbove::Auto),
            "never" => Ok(StoreAbove::Never),
            _ => Err(format!("{text:?} is none of auto, never")),
        }
    }
}

impl std::str::FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Restart, String> {
        match text {
            "on-failure" => Ok(Restart::OnFailure),
            "always" => Ok(Restart::Always),
            "never" => Ok(Restart::Never),
            _ => Err(format!("{text:?} is none of on-failure, always, never")),
        }
    }
}
