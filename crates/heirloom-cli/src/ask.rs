//! The commands `heirloom ping`, `heirloom status` and `heirloom quit`: one question each at a control socket.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use clap::Args;
use heirloom::NoRequests;
use heirloom::control::{Client, ClientError, Reply, Request, Status};

use crate::control::{RUNTIME_DIRECTORY, SOCKET, Target};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;
use crate::proxy;

/// How long a process may take to end after it has said "Bye".
const QUIT_WITHIN: Duration = Duration::from_secs(10);
/// How long a question is asked again when the process that heard it was just being replaced.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// What the three have in common in `--help` and the man pages.
const PAGE: Page = Page {
    exits: &[Exit::Done, Exit::Failed, Exit::Usage, Exit::NobodyThere, Exit::Refused],
    files: &[SOCKET],
    environment: &[RUNTIME_DIRECTORY],
    ..Page::EMPTY
};

/// What `--help` and the man page say of `heirloom ping` beyond its options.
pub(crate) const PING_PAGE: Page = Page {
    description: "\
Asks the process at a control socket to answer, and prints Pong when it has. It is answered during a takeover, too. Without \
an option, the chat with the default address is asked.",
    examples: &[("heirloom ping --name mine", "Asks the process whose control socket is called mine.")],
    see_also: &["heirloom-status(1)"],
    ..PAGE
};

/// What `--help` and the man page say of `heirloom status` beyond its options.
pub(crate) const STATUS_PAGE: Page = Page {
    description: "\
Asks the process at a control socket what it serves, and prints it as a table: its name, pid and version, how many times \
the service was handed over (its generation), since when it serves, its items and counters, and how its last takeover \
went. It is answered during a takeover, too. Without an option, the chat with the default address is asked.",
    examples: &[(
        "heirloom status --json | jq .generation",
        "Prints how many times the service was handed over.",
    )],
    see_also: &["heirloom-chat(1)"],
    ..PAGE
};

/// What `--help` and the man page say of `heirloom quit` beyond its options.
pub(crate) const QUIT_PAGE: Page = Page {
    description: "\
Asks the process at a control socket to end, as SIGTERM does, and waits until it has ended, for 10 seconds at most. It is the end \
for good: nothing is left to a supervisor that keeps descriptors. Without an option, the chat with the default address is asked.",
    examples: &[("heirloom quit --control /run/mine/chat.sock", "Ends the process at this control socket.")],
    see_also: &["heirloom-chat(1)"],
    ..PAGE
};

/// The options of `heirloom status`.
#[derive(Args, Clone, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    target: Target,
    /// Print a JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// `heirloom ping`.
pub(crate) fn ping(target: &Target) -> Result<Exit, Failure> {
    match ask(&target.path_of_chat()?, &Request::Ping)?.0 {
        Reply::Pong => {
            print_line("Pong")?;
            Ok(Exit::Done)
        }
        reply => Err(unexpected(reply)),
    }
}

/// `heirloom status`.
pub(crate) fn status(args: &StatusArgs) -> Result<Exit, Failure> {
    match ask(&args.target.path_of_chat()?, &Request::Status)?.0 {
        Reply::Status(status) if args.json => {
            let json = serde_json::to_string_pretty(&status).map_err(anyhow::Error::from)?;
            print_line(&json)?;
            Ok(Exit::Done)
        }
        Reply::Status(status) => {
            print_line(table(&status, SystemTime::now()).trim_end())?;
            Ok(Exit::Done)
        }
        reply => Err(unexpected(reply)),
    }
}

/// `heirloom quit`.
pub(crate) fn quit(target: &Target) -> Result<Exit, Failure> {
    let path = target.path_of_chat()?;
    let (reply, mut client) = ask(&path, &Request::Quit)?;
    if reply != Reply::Bye {
        return Err(unexpected(reply));
    }
    client.set_timeout(QUIT_WITHIN);
    match client.receive() {
        Err(ClientError::Closed { .. }) => Ok(Exit::Done),
        Err(ClientError::Timeout { .. }) => Err(Failure::new(
            Exit::Failed,
            anyhow!(
                "the process at {} said Bye but has not ended within {QUIT_WITHIN:?}; it may be writing to a reader that does not read",
                path.display()
            ),
        )),
        Err(error) => Err(error.into()),
        Ok((line, _)) => Err(Failure::new(
            Exit::Failed,
            anyhow!("unexpected answer after Bye: {}", String::from_utf8_lossy(&line)),
        )),
    }
}

/// Asks one question. A process that is replaced before it answers closes the connection: then its successor is asked.
pub(crate) fn ask(path: &Path, request: &Request<NoRequests>) -> Result<(Reply, Client), Failure> {
    let give_up = Instant::now() + ASK_AGAIN;
    loop {
        let mut client = Client::connect(path)?;
        match client.request(request) {
            Ok(Reply::Error(refusal)) => return Err(refusal.into()),
            Ok(reply) => return Ok((reply, client)),
            Err(ClientError::Closed { .. }) if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn unexpected(reply: Reply) -> Failure {
    Failure::new(
        Exit::Failed,
        anyhow!("the process answered something else: {reply:?}; it may be of another version"),
    )
}

/// Writes to stdout; a reader that has gone is an error, not a panic.
pub(crate) fn print_line(text: &str) -> std::io::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{text}")
}

fn table(status: &Status, now: SystemTime) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<14} {value}");
    };
    row("name", status.name.clone());
    row("pid", status.pid.to_string());
    row("generation", status.generation.to_string());
    row("version", format!("{} {}", status.program, status.version));
    row("started", time(status.started_unix_ms, now));
    row("serving since", time(status.serving_since_unix_ms, now));
    if let Some(supervised) = &status.supervised {
        row("command", supervised.command.join(" "));
        let pid = supervised.pid.map_or(String::new(), |pid| format!(", pid {pid}"));
        row("state", format!("{}{pid}", supervised.state));
        if !supervised.text.is_empty() {
            row("says", supervised.text.clone());
        }
        if let Some(ended) = &supervised.ended {
            row("ended", ended.clone());
        }
        row("store", format!("at most {}", supervised.limit));
        if let Some(kept) = supervised.kept_above {
            row("vault", format!("{kept} of {}", status.items.len()));
        }
        for why in &supervised.refused {
            row("refused", why.clone());
        }
    }
    let proxy = proxy::report::of(status);
    if proxy.is_none() {
        row("items", status.items.len().to_string());
    }
    for item in &status.items {
        let by = item.put_by.map_or(String::new(), |pid| format!(", put by pid {pid}"));
        row("", format!("{} ({}, id {}{by})", item.name, item.kind, item.id));
    }
    for (name, value) in &status.counters {
        row(&name.replace('_', " "), value.to_string());
    }
    if status.takeover_running {
        row("takeover", "going on".into());
    }
    match &status.last_takeover {
        None => row("last takeover", "none".into()),
        Some(last) => {
            let peer = last.peer_pid.map_or(String::new(), |pid| format!(", with pid {pid}"));
            row("last takeover", format!("{}{peer}, {}", last.outcome, time(last.at_unix_ms, now)));
            if let Some(reason) = &last.reason {
                row("", reason.clone());
            }
            let pause = last.pause_us.map_or("no pause".into(), |pause| format!("pause {pause} µs"));
            row(
                "",
                format!("{} items, {} bytes, {pause}, {} µs in all", last.items, last.bytes, last.total_us),
            );
        }
    }
    if let Some(report) = proxy {
        out.push_str(&proxy::report::table(&report));
    }
    out
}

fn time(unix_ms: u64, now: SystemTime) -> String {
    // What is later cannot be written with four digits for the year; the incumbent says it, be it so or not.
    const LATEST: Duration = Duration::from_secs(253_402_300_799);
    let at = UNIX_EPOCH + Duration::from_millis(unix_ms).min(LATEST);
    let ago = now.duration_since(at).unwrap_or_default();
    let ago = Duration::from_secs(ago.as_secs());
    format!("{} ({} ago)", humantime::format_rfc3339_seconds(at), humantime::format_duration(ago))
}

#[cfg(test)]
mod tests {
    use super::*;
    use heirloom::control::{LastTakeover, Supervised};

    #[test]
    fn the_table_shows_what_the_json_has() {
        let status = Status {
            name: "chat 127.0.0.1:1".into(),
            pid: 7,
            generation: 3,
            program: "heirloom".into(),
            version: "0.1.0".into(),
            protocol: 1,
            started_unix_ms: 0,
            serving_since_unix_ms: 60_000,
            items: vec![heirloom::control::ItemStatus {
                id: 1,
                name: "client".into(),
                kind: "tcp-stream".into(),
                put_by: Some(44),
            }],
            counters: [("bytes_in".to_string(), 5)].into(),
            takeover_running: true,
            last_takeover: Some(LastTakeover {
                outcome: "resumed".into(),
                reason: Some("at step accept: the other process exited".into()),
                peer_pid: Some(9),
                items: 2,
                bytes: 100,
                pause_us: Some(350),
                total_us: 900,
                at_unix_ms: 90_000,
            }),
            supervised: Some(Supervised {
                command: vec!["/bin/echod".into(), "-v".into()],
                pid: Some(8),
                state: "ready".into(),
                refused: vec!["\"a:b\" is no name".into()],
                limit: 40,
                kept_above: Some(1),
                ..Supervised::default()
            }),
            application: None,
        };
        let text = table(&status, UNIX_EPOCH + Duration::from_secs(120));
        for part in [
            "chat 127.0.0.1:1",
            "1970-01-01T00:01:00Z (1m ago)",
            "bytes in       5",
            "going on",
            "resumed, with pid 9",
            "at step accept",
            "pause 350 µs",
            "/bin/echod -v",
            "ready, pid 8",
            "at most 40",
            "1 of 1",
            "put by pid 44",
            "\"a:b\" is no name",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }

        // Whatever an incumbent says is shown.
        let never = Status { started_unix_ms: u64::MAX, pid: u32::MAX, generation: u64::MAX, ..status };
        let text = table(&never, SystemTime::now());
        assert!(text.contains("9999-12-31T23:59:59Z (0s ago)"), "{text}");
    }
}
