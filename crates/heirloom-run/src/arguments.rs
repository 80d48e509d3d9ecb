//! The command line of the small binary: the options of `heirloom run`, read by hand.

use std::ffi::OsString;

use heirloom_run::{Command, Options, parse_duration};
use lexopt::prelude::*;

/// The code for a command line that makes no sense.
pub(crate) const USAGE: u8 = 2;

const HELP: &str = "\
Keeps a program running, and its descriptors: socket activation and an fd store for any program

Usage: heirloom-run [OPTIONS] -- COMMAND [ARGUMENT]...

Options:
      --listen [NAME=]ADDR       Listen at HOST:PORT, udp:HOST:PORT or /PATH, and give the socket to the command
      --store-max N              How many descriptors the command may store
      --control PATH             The path of the control socket
      --name NAME                The name of the control socket in the runtime directory [default: run-COMMAND]
      --restart WHEN             on-failure, always or never [default: on-failure]
      --tries N                  Give up after so many failures in quick succession; 0: never [default: 10]
      --restart-delay DURATION   Wait so long after a failure, and twice as long after each more [default: 100ms]
      --stop-timeout DURATION    Kill the command if it has not ended by then [default: 10s]
      --start-timeout DURATION   How long it has to say that it is ready, if it is one that does [default: 30s]
      --watchdog DURATION        How often it has to say that it is alive
      --store-above WHEN         Whether a supervisor above keeps what is held as well: auto or never [default: auto]
      --expect-ready             It says when it is ready, from its first start on
  -h, --help                     Print this
  -V, --version                  Print the version

HEIRLOOM_LOG sets the level of the log on stderr: error, warn, info, debug or trace.
";

/// What a command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    Run(Box<Options>),
    /// To be printed on stdout.
    Print(String),
}

/// Reads a command line; the first word is the program's name.
pub(crate) fn read(words: impl IntoIterator<Item = OsString>) -> Result<Asked, lexopt::Error> {
    let mut parser = lexopt::Parser::from_iter(words);
    let mut options = Options::new(Command::new("", [""; 0]));
    let mut name: Option<String> = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Long("listen") => options.listen.push(parser.value()?.parse()?),
            Long("store-max") => options.store_max = Some(parser.value()?.parse()?),
            Long("control") => options.control = Some(parser.value()?.into()),
            Long("name") => name = Some(parser.value()?.string()?),
            Long("restart") => options.restart = parser.value()?.parse_with(str::parse)?,
            Long("tries") => options.tries = parser.value()?.parse()?,
            Long("restart-delay") => options.restart_delay = parser.value()?.parse_with(parse_duration)?,
            Long("stop-timeout") => options.stop_timeout = parser.value()?.parse_with(parse_duration)?,
            Long("start-timeout") => options.start_timeout = parser.value()?.parse_with(parse_duration)?,
            Long("watchdog") => {
                options.watchdog =
                    Some(parser.value()?.parse_with(parse_duration)?).filter(|every| !every.is_zero());
            }
            Long("store-above") => options.store_above = parser.value()?.parse_with(str::parse)?,
            Long("expect-ready") => options.expect_ready = true,
            Short('h') | Long("help") => return Ok(Asked::Print(HELP.into())),
            Short('V') | Long("version") => {
                return Ok(Asked::Print(format!("heirloom-run {}\n", env!("CARGO_PKG_VERSION"))));
            }
            Value(program) => {
                options.command = Command::new(program, parser.raw_args()?);
                break;
            }
            other => return Err(other.unexpected()),
        }
    }
    if options.command.program.is_empty() {
        return Err("no command is given".into());
    }
    if let Some(name) = name {
        if options.control.is_some() {
            return Err("--name and --control exclude each other".into());
        }
        let path = heirloom::control::path::default_path(&name).map_err(|error| error.to_string())?;
        options.control = Some(path);
    }
    Ok(Asked::Run(Box::new(options)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn options(words: &[&str]) -> Result<Options, String> {
        let words = ["heirloom-run"].iter().chain(words).map(OsString::from);
        match read(words).map_err(|error| error.to_string())? {
            Asked::Run(options) => Ok(*options),
            Asked::Print(text) => Err(text),
        }
    }

    #[test]
    fn options_are_read_up_to_the_command() {
        let read = options(&[
            "--listen",
            "a=127.0.0.1:0",
            "--listen=/run/x",
            "--watchdog",
            "2s",
            "--tries=3",
            "--",
            "echod",
            "--name",
            "x",
        ])
        .unwrap();
        assert_eq!(read.command, Command::new("echod", ["--name", "x"]));
        assert_eq!((read.listen.len(), read.tries, read.watchdog), (2, 3, Some(Duration::from_secs(2))));
        assert_eq!(options(&["echod", "-v"]).unwrap().command, Command::new("echod", ["-v"]));
        assert_eq!(options(&["echod"]).unwrap(), Options::new(Command::new("echod", [""; 0])));
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        for wrong in [
            &["--listen", "nowhere", "x"][..],
            &["--restart", "sometimes", "x"],
            &["--store-max", "-1", "x"],
            &["--no-such-option", "x"],
            &["--name", "a", "--control", "/b", "x"],
            &["--"],
            &[],
        ] {
            assert!(options(wrong).is_err(), "{wrong:?}");
        }
        assert!(options(&["--help"]).unwrap_err().contains("--start-timeout"));
    }
}
