//! The command `heirloom run`: keeps a program running, and its descriptors.

use std::ffi::OsString;
use std::time::Duration;

use clap::ValueEnum;
use heirloom_run::{Command, Listen, Options, Restart, StoreAbove};

use crate::control::{RUNTIME_DIRECTORY, Target};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;

/// The options of `heirloom run`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Listen at HOST:PORT, udp:HOST:PORT or an absolute path, and give the socket to the command
    #[arg(long, value_name = "[NAME=]ADDR")]
    listen: Vec<Listen>,
    /// How many descriptors the command may store [default: what the limit on open files allows]
    #[arg(long, value_name = "N")]
    store_max: Option<u64>,
    #[command(flatten)]
    target: Target,
    /// When a command that has ended is started again
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = RestartArg::OnFailure)]
    restart: RestartArg,
    /// Give up after so many failures in quick succession; 0: never
    #[arg(long, value_name = "N", default_value_t = 10)]
    tries: u32,
    /// Wait so long after a failure, and twice as long after each more in quick succession
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = humantime::parse_duration)]
    restart_delay: Duration,
    /// Kill the command if it has not ended by then
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    stop_timeout: Duration,
    /// How long the command has to say that it is ready, if it is one that does
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    start_timeout: Duration,
    /// How often the command has to say that it is alive
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    watchdog: Option<Duration>,
    /// Whether a supervisor above keeps what is held as well: systemd, or another of these
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = StoreAboveArg::Auto)]
    store_above: StoreAboveArg,
    /// The command says when it is ready, from its first start on; otherwise that is learned when it first does
    #[arg(long)]
    expect_ready: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Runs a command, keeps it running, and keeps its descriptors, as systemd does: for containers, shells, and wherever there is \
no systemd. The command gets the sockets of --listen (LISTEN_FDS, see sd_listen_fds(3)). What it stores by sd_notify(3) \
(FDSTORE=1) survives its death: the next process gets it in LISTEN_FDS after the sockets, or fetches it. It is \
started again when it fails, after --restart-delay, and twice as long after each failure in quick succession, up to 10 s. \
When heirloom run gives up or ends, what is stored is closed, and so it is when heirloom run itself is killed. Under a \
supervisor that keeps descriptors, systemd with FileDescriptorStoreMax= or another one of these, that keeps what is held as well, packed into few: it comes back \
after heirloom run was killed, restarted or has failed. The supervisor is told READY, STATUS, RELOADING, STOPPING and WATCHDOG.

The command may say that it is ready, what it does, that it is alive, and which is its main process (READY, STATUS, WATCHDOG, \
MAINPID). All processes that descend from heirloom run may speak for it, and nobody else.

heirloom-upgrade(1) upgrades the command: one that knows takeovers is taken over from, any other is stopped and started anew \
with what is stored; if the new one is not well in time, the previous command serves. With --self it \
upgrades heirloom run in place, with all that it holds. heirloom-status(1) shows what is held and by whom.

The status is the command's own, or 128 and the number of the signal that has ended it; 125 if heirloom run itself fails, 126 if \
the command cannot be executed, 127 if there is none, and 2 for wrong usage.

It may be PID 1 of a container: it waits for orphans, and at the end they are told to end, too. There is a small binary \
of its own with the same options, heirloom-run.",
    signals: &[
        (
            "SIGTERM, SIGINT",
            "Are passed on, and end it all: the command has the time of --stop-timeout to end, and is killed then.",
        ),
        (
            "all others",
            "Are passed on to the main process, but for SIGCHLD, SIGPIPE, and those by which a terminal stops a job.",
        ),
    ],
    files: &[
        (
            "$XDG_RUNTIME_DIR/heirloom/NAME.sock",
            "The control socket. Without --name, NAME is run- and the name of the command's file.",
        ),
        (
            "$XDG_RUNTIME_DIR/heirloom/NAME.sock.notify",
            "The socket at which the command speaks (NOTIFY_SOCKET).",
        ),
        crate::control::LOCK,
    ],
    environment: &[
        RUNTIME_DIRECTORY,
        (
            "LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID",
            "Are set for the command: the sockets, and what is stored.",
        ),
        (
            "NOTIFY_SOCKET, FDSTORE, HEIRLOOM_STORE",
            "Are set for the command: where it speaks, how much it may store, and where it can fetch that.",
        ),
        (
            "WATCHDOG_USEC, WATCHDOG_PID",
            "Are set for the command if there is a watchdog.",
        ),
        (
            "NOTIFY_SOCKET, WATCHDOG_USEC, FDSTORE, LISTEN_FDS",
            "Where they are set for heirloom run itself, there is a supervisor above, which is told what goes on and keeps what is held.",
        ),
    ],
    examples: &[
        (
            "heirloom run --listen 127.0.0.1:8080 -- ./server",
            "Runs a server that takes its listening socket from LISTEN_FDS.",
        ),
        (
            "heirloom run --name mine --watchdog 10s --restart always -- ./worker --verbose",
            "Keeps a worker running that has to say WATCHDOG=1 every ten seconds.",
        ),
    ],
    see_also: &["heirloom-status(1)", "heirloom-upgrade(1)", "heirloom-quit(1)", "sd_notify(3)", "sd_listen_fds(3)"],
    ..Page::EMPTY
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RestartArg {
    OnFailure,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StoreAboveArg {
    Auto,
    Never,
}

/// Runs until there is nothing more to run, and ends the program with the command's code.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    let mut command = args.command.into_iter();
    let program = command.next().unwrap_or_default();
    let options = Options {
        listen: args.listen,
        store_max: args.store_max,
        control: args.target.path_if_said()?,
        restart: match args.restart {
            RestartArg::OnFailure => Restart::OnFailure,
            RestartArg::Always => Restart::Always,
            RestartArg::Never => Restart::Never,
        },
        tries: args.tries,
        restart_delay: args.restart_delay,
        stop_timeout: args.stop_timeout,
        start_timeout: args.start_timeout,
        watchdog: args.watchdog.filter(|every| !every.is_zero()),
        store_above: match args.store_above {
            StoreAboveArg::Auto => StoreAbove::Auto,
            StoreAboveArg::Never => StoreAbove::Never,
        },
        expect_ready: args.expect_ready,
        ..Options::new(Command::new(program, command))
    };
    let code = heirloom_run::run(options).unwrap_or_else(|error| {
        tracing::error!("{error}");
        error.code()
    });
    // The command's codes are any, not only those of this program.
    std::process::exit(code.into())
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;

    #[test]
    fn the_small_binary_has_the_same_options() {
        let source = include_str!("../../heirloom-run/src/arguments.rs");
        let (_, reading) = source.split_once("pub(crate) fn read").expect("the function");
        let theirs = reading.split("Long(\"").skip(1).map(|rest| rest.split('"').next().unwrap_or_default());
        let mut theirs: Vec<&str> = theirs.filter(|option| !["help", "version"].contains(option)).collect();
        let command = Args::augment_args(clap::Command::new("run"));
        let mut ours: Vec<&str> = command.get_arguments().filter_map(|option| option.get_long()).collect();
        theirs.sort_unstable();
        ours.sort_unstable();
        assert_eq!(ours, theirs);
    }
}
