//! The program `heirloom`: thin commands over the library, one module each.
#![forbid(unsafe_code)]

mod ask;
mod chat;
mod control;
mod demo;
mod exit;
mod failure;
mod inspect;
mod log;
mod signals;
mod upgrade;

use std::io::Write;

use clap::{Parser, Subcommand};

use exit::Exit;

/// Hands live connections to the process that replaces this one.
#[derive(Parser)]
#[command(name = "heirloom", version, about, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: log::LogOptions,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, or replaced by a successor; 1 failed; 2 wrong usage; 3 nobody answers at the control socket;
4 refused, or busy with another takeover; 5 the takeover was rolled back and the incumbent still serves.";

#[derive(Subcommand)]
enum Command {
    /// Copy a TCP server's bytes to stdout and stdin's bytes to the server, and hand over to the next one started
    Chat(chat::Args),
    /// Ask whether somebody serves at a control socket
    Ping(control::Target),
    /// Show what the process at a control socket serves, and how its last takeover went
    Status(ask::StatusArgs),
    /// Show what the process at a control socket would hand over in a takeover
    Inspect(inspect::Args),
    /// Let the process at a control socket be replaced by a new program, with all its connections
    Upgrade(upgrade::Args),
    /// End the process at a control socket
    Quit(control::Target),
    /// Show it all: a client that is replaced under load, and loses nothing
    Demo(demo::Args),
    #[command(hide = true)]
    DemoServer(demo::server::Args),
    #[command(hide = true)]
    DemoSuccessor(demo::successor::Args),
}

fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            let _ = answer.print();
            return if answer.use_stderr() { Exit::Usage } else { Exit::Done };
        }
    };
    if let Err(error) = log::init(&cli.log) {
        // There is no log to say it in. A stderr that is closed cannot be helped.
        let _ = writeln!(std::io::stderr(), "heirloom: {error:#}");
        return Exit::Failed;
    }
    let result = match cli.command {
        Command::Chat(args) => chat::run(args),
        Command::Ping(target) => ask::ping(&target),
        Command::Status(args) => ask::status(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Upgrade(args) => upgrade::run(args),
        Command::Quit(target) => ask::quit(&target),
        Command::Demo(args) => demo::run(&args),
        Command::DemoServer(args) => demo::server::run(&args),
        Command::DemoSuccessor(args) => demo::successor::run(args),
    };
    result.unwrap_or_else(|failure| {
        tracing::error!("{failure}");
        failure.exit
    })
}
