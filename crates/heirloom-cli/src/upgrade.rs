//! The command `heirloom upgrade`: lets the process at a control socket be replaced by a new program.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use heirloom::control::Status;
use heirloom::upgrade::{Checked, Upgrade, Upgraded, ask};

use crate::ask::print_line;
use crate::control::{RUNTIME_DIRECTORY, SOCKET, Target};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;

/// The options of `heirloom upgrade`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// The file to run [default: the path by which the process was started, as it is now]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Become the new program in place, with the same pid; always so when stdin is a terminal, or for PID 1
    #[arg(long)]
    in_place: bool,
    /// Upgrade heirloom run itself, in place with all that it holds, and not the command that it runs
    #[arg(long = "self")]
    itself: bool,
    /// Only find out whether the new program could take over
    #[arg(long)]
    dry_run: bool,
    /// Print nothing on success
    #[arg(long, short)]
    quiet: bool,
    /// How long to wait for the outcome
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// The arguments of the new program, its command first [default: the same as before]
    #[arg(last = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Asks the process at a control socket to be replaced by a new program, and prints which generation became which. The new \
program is by default the file that the process was started from, as it is now, with the same arguments. Without an \
option, the chat with the default address is asked.

The process first starts the new program as a child, which finds out whether it could read all that would be handed over; \
a dry run ends there. Then the new program takes over, or the process becomes the new program in place, by execve(2). \
As long as the new program does not have everything, a failure leaves the process serving, and the status is 5.

Of heirloom-run(1) what is upgraded is the command that it runs, unless --self is given.

Only the user whose process it is and root may say which program it becomes, and with which arguments. An upgrade that \
takes longer than --timeout goes on; the status is then 1.",
    exits: Exit::ALL,
    files: &[SOCKET],
    environment: &[RUNTIME_DIRECTORY],
    examples: &[
        ("heirloom upgrade --dry-run", "Finds out whether the program as it is installed now could take over."),
        ("heirloom upgrade --name mine --program ./heirloom", "Replaces the process whose control socket is called mine."),
        (
            "heirloom upgrade --quiet --control /run/mine/control.sock",
            "Says nothing unless it fails: for ExecReload= of a unit, the standard output of which it has.",
        ),
    ],
    see_also: &["heirloom-chat(1)", "heirloom-inspect(1)", "heirloom-status(1)"],
    ..Page::EMPTY
};

/// Asks, waits, and says what happened.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    let path = args.target.path_of_chat()?;
    // The other process may be in another directory.
    let program =
        args.program.map(std::path::absolute).transpose().context("cannot tell where --program is")?;
    let request = Upgrade {
        program,
        arguments: (!args.arguments.is_empty()).then_some(args.arguments),
        in_place: args.in_place,
        itself: args.itself,
        dry_run: args.dry_run,
        generation: None,
    };
    let outcome = match ask(&path, request, args.timeout)? {
        Upgraded::Replaced { before, now } => replaced(&before, &now),
        Upgraded::Checked(checked) => could_be(&checked),
        Upgraded::Supervised { before, now } => supervised(&before, &now),
    };
    if !args.quiet {
        print_line(&outcome)?;
    }
    Ok(Exit::Done)
}

fn replaced(before: &Status, now: &Status) -> String {
    let process = |status: &Status| {
        format!(
            "generation {} ({} {}, pid {})",
            status.generation, status.program, status.version, status.pid
        )
    };
    let last = now.last_takeover.as_ref();
    let pause =
        last.and_then(|last| last.pause_us).map_or(String::new(), |pause| format!(", pause {pause} µs"));
    let items = last.map_or(0, |last| last.items);
    let place = if before.pid == now.pid { " in place" } else { "" };
    format!("upgraded{place}: {} became {}; {items} items{pause}", process(before), process(now))
}

fn supervised(before: &Status, now: &Status) -> String {
    let pid = |status: &Status| {
        let pid = status.supervised.as_ref().and_then(|supervised| supervised.pid);
        pid.map_or("nothing".into(), |pid| format!("pid {pid}"))
    };
    let command = now.supervised.as_ref().map_or(String::new(), |supervised| supervised.command.join(" "));
    format!("upgraded: {} became {} ({command})", pid(before), pid(now))
}

fn could_be(checked: &Checked) -> String {
    let Checked { program, version, in_place, items, bytes } = checked;
    let place = if *in_place { " in place" } else { "" };
    format!("could be upgraded{place} to {program} {version}: {items} items, {bytes} bytes of manifest")
}
