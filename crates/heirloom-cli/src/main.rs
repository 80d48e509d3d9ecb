//! The program `heirloom`: thin commands over the library, one module each.
#![forbid(unsafe_code)]

mod ask;
mod chat;
mod control;
mod deferred;
mod demo;
mod exit;
mod failure;
mod inspect;
mod log;
mod page;
mod proxy;
mod reloads;
mod replace;
mod run;
mod setup;
mod signals;
mod upgrade;

use std::io::Write;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use deferred::Deferred;
use exit::Exit;
use heirloom::courtesy;
use page::Page;

/// Hands live connections to the process that replaces this one.
#[derive(Parser)]
#[command(name = "heirloom", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: log::LogOptions,
}

#[derive(Subcommand)]
enum Command {
    /// Copy a TCP server's bytes to stdout and stdin's bytes to the server, and hand over to the next one started
    Chat(Deferred<chat::Args>),
    /// Pass TCP and UNIX connections on to backends, and hand them over to the next one started, or to a new configuration
    Proxy(Deferred<proxy::Args>),
    /// Ask whether somebody serves at a control socket
    Ping(Deferred<control::Target>),
    /// Show what the process at a control socket serves, and how its last takeover went
    Status(Deferred<ask::StatusArgs>),
    /// Show what the process at a control socket would hand over in a takeover
    Inspect(Deferred<inspect::Args>),
    /// Let the process at a control socket be replaced by a new program, with all its connections
    Upgrade(Deferred<upgrade::Args>),
    /// End the process at a control socket
    Quit(Deferred<control::Target>),
    /// Keep a program running, and its descriptors: socket activation and an fd store for any program
    Run(Deferred<run::Args>),
    /// Show it all: a client that is replaced under load, and loses nothing
    Demo(Deferred<demo::Args>),
    /// Install man pages, and completions for bash, zsh and fish
    Setup(Deferred<setup::Args>),
    #[command(hide = true)]
    DemoSuccessor(Deferred<demo::successor::Args>),
}

/// What `heirloom --help` and the man page say beyond commands and options.
const PAGE: Page = Page {
    description: "\
Hands a running program's live connections and state to the process that replaces it: on a restart, an upgrade, a new \
configuration. The people on the other end of the connections notice nothing, and no byte is lost, repeated or reordered.

The process that serves answers at its control socket. Its successor asks for everything there, and either the \
successor serves it all or the other goes on as if nothing had happened.",
    exits: Exit::ALL,
    files: &[control::SOCKET, control::LOCK],
    environment: &[control::RUNTIME_DIRECTORY],
    examples: &[
        ("heirloom demo", "Shows it all, with nothing else installed."),
        ("heirloom setup", "Installs the man pages and completions."),
    ],
    ..Page::EMPTY
};

/// The page of a command.
fn page_of(command: &str) -> &'static Page {
    match command {
        "chat" => &chat::PAGE,
        "proxy" => &proxy::PAGE,
        "ping" => &ask::PING_PAGE,
        "status" => &ask::STATUS_PAGE,
        "inspect" => &inspect::PAGE,
        "upgrade" => &upgrade::PAGE,
        "quit" => &ask::QUIT_PAGE,
        "run" => &run::PAGE,
        "demo" => &demo::PAGE,
        "setup" => &setup::PAGE,
        _ => &Page::EMPTY,
    }
}

/// The command line, with its pages.
fn command() -> clap::Command {
    PAGE.attach(Cli::command()).mut_subcommands(|command| page_of(command.get_name()).attach(command))
}

/// The command line as it was given. The pages are made only where there is something to show.
fn parse() -> Result<Cli, clap::Error> {
    match Cli::command().try_get_matches() {
        Ok(matches) => Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command())),
        Err(version) if version.kind() == ErrorKind::DisplayVersion => Err(version),
        Err(other) => Err(command().try_get_matches().err().unwrap_or(other)),
    }
}

/// As [`parse`], which takes a while: if an incumbent has started this process, it goes first before and after.
fn parse_courteously() -> Result<Cli, clap::Error> {
    if heirloom::upgrade::is_asked() {
        courtesy::give_way();
    }
    courtesy::next_step();
    let parsed = parse();
    courtesy::next_step();
    courtesy::take_turns();
    parsed
}

fn main() -> Exit {
    let cli = match parse_courteously() {
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
        Command::Chat(Deferred(args)) => chat::run(args),
        Command::Proxy(Deferred(args)) => proxy::run(args),
        Command::Ping(Deferred(target)) => ask::ping(&target),
        Command::Status(Deferred(args)) => ask::status(&args),
        Command::Inspect(Deferred(args)) => inspect::run(&args),
        Command::Upgrade(Deferred(args)) => upgrade::run(args),
        Command::Quit(Deferred(target)) => ask::quit(&target),
        Command::Run(Deferred(args)) => run::run(args),
        Command::Demo(Deferred(args)) => demo::run(&args),
        Command::Setup(Deferred(args)) => setup::run(&args),
        Command::DemoSuccessor(Deferred(args)) => demo::successor::run(args),
    };
    result.unwrap_or_else(|failure| {
        tracing::error!(
            step = failure.reason().map(|reason| tracing::field::display(reason.step)),
            "{failure}"
        );
        failure.exit
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_can_be_run() {
        let commands = command();
        let pages = commands.get_subcommands().map(|command| page_of(command.get_name()));
        for (example, _) in pages.chain([&PAGE]).flat_map(|page| page.examples) {
            // As far as the program sees it, not what the shell does.
            let words = example.split_whitespace().take_while(|word| !word.starts_with(['|', '<', '>', '&']));
            assert!(example.starts_with("heirloom "), "{example}");
            command().try_get_matches_from(words).unwrap_or_else(|error| panic!("{example}: {error}"));
        }
    }
}
