//! The command `heirloom inspect`: what a takeover would carry, without taking it.
//!
//! It reads the manifest itself, the very bytes that a successor would get; no descriptor comes along, and the process
//! serves on.

mod shown;

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use heirloom::control::{Client, ClientError, Reply, Request};
use heirloom::manifest::{Base, read_sealed};
use heirloom::{Limits, NoRequests};
use serde_json::{Value, json};

use crate::ask::print_line;
use crate::control::{RUNTIME_DIRECTORY, SOCKET, Target};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;

/// How long to ask again when the process that heard the question was just being replaced.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The options of `heirloom inspect`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Print a JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Asks the process at a control socket what it would hand over in a takeover, and prints it as a table: the service with its \
generation and version, the state, and each item with its name, kind, id and state. Nothing is handed over, and the \
process serves on. Without an option, the chat with the default address is asked.",
    exits: &[Exit::Done, Exit::Failed, Exit::Usage, Exit::NobodyThere, Exit::Refused],
    files: &[SOCKET],
    environment: &[RUNTIME_DIRECTORY],
    examples: &[("heirloom inspect --json | jq .manifest_bytes", "Prints how long the manifest is.")],
    see_also: &["heirloom-status(1)", "heirloom-upgrade(1)"],
    ..Page::EMPTY
};

/// Fetches the manifest and shows it.
pub(crate) fn run(args: &Args) -> Result<Exit, Failure> {
    let (base, bytes) = fetch(&args.target.path_of_chat()?)?;
    let shown = to_json(&base, bytes);
    if args.json {
        print_line(&serde_json::to_string_pretty(&shown).map_err(anyhow::Error::from)?)?;
    } else {
        print_line(table(&base, &shown).trim_end())?;
    }
    Ok(Exit::Done)
}

/// The manifest, and its length in bytes.
fn fetch(path: &Path) -> Result<(Base, usize), Failure> {
    let give_up = Instant::now() + ASK_AGAIN;
    loop {
        let mut client = Client::connect(path)?;
        let answer = client.send(&Request::<NoRequests>::Inspect).and_then(|()| client.receive());
        let (line, mut descriptors) = match answer {
            Ok(answer) => answer,
            Err(ClientError::Closed { .. }) if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        return match Reply::parse(&line).map_err(anyhow::Error::from)? {
            Reply::Manifest(_) => {
                let memfd = descriptors
                    .pop()
                    .context("the process sent no manifest with its answer; it may be of another version")?;
                let limits = Limits::default();
                let bytes = read_sealed(&memfd, limits.manifest_bytes).map_err(anyhow::Error::from)?;
                let base = Base::decode(&bytes, &limits).map_err(anyhow::Error::from)?;
                Ok((base, bytes.len()))
            }
            Reply::Error(refusal) => Err(refusal.into()),
            reply => {
                Err(anyhow!("the process answered something else: {reply:?}; it may be of another version")
                    .into())
            }
        };
    }
}

fn to_json(base: &Base, bytes: usize) -> Value {
    let items: Vec<Value> = base
        .items
        .iter()
        .map(|item| {
            json!({
                "id": item.id.0,
                "name": item.name,
                "kind": item.kind,
                "state_bytes": item.state.len(),
                "state": shown::state(&item.state),
            })
        })
        .collect();
    json!({
        "service": base.service,
        "manifest_bytes": bytes,
        "state_bytes": base.state.as_ref().map_or(0, Vec::len),
        "state": base.state.as_deref().map_or(Value::Null, shown::state),
        "items": items,
    })
}

fn table(base: &Base, shown: &Value) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<14} {value}");
    };
    row("service", base.service.name.clone());
    row("generation", base.service.generation.to_string());
    row("version", format!("{} {}", base.service.program, base.service.version));
    row("schema", base.service.schema.to_string());
    row("manifest", format!("{} bytes", shown["manifest_bytes"]));
    row("state", format!("{} bytes", shown["state_bytes"]));
    if let Value::Object(fields) = &shown["state"] {
        fields.iter().for_each(|(name, value)| row("", format!("{name}: {value}")));
    }
    row("items", base.items.len().to_string());
    for (item, value) in base.items.iter().zip(shown["items"].as_array().into_iter().flatten()) {
        let state = match item.state.len() {
            0 => String::new(),
            bytes => format!(", {bytes} bytes of state: {}", value["state"]),
        };
        row("", format!("{} ({}, id {}){state}", item.name, item.kind, item.id));
    }
    out
}
