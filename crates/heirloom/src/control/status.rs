//! What an incumbent tells about itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The answer to [`Request::Status`](super::Request::Status).
///
/// Fields that are missing read as their defaults and unknown ones are ignored, so that different
/// versions understand each other. Times are milliseconds since 1970 (UTC).
///
/// ```
/// use heirloom::control::Status;
///
/// let status: Status = serde_json::from_str(r#"{"name": "chat", "pid": 12, "mood": "fine"}"#)?;
/// assert_eq!((status.name.as_str(), status.generation), ("chat", 0));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The service's name.
    pub name: String,
    /// The process that serves, as it sees itself.
    pub pid: u32,
    /// How many times the service has been handed over since it first started.
    pub generation: u64,
    /// The program's name.
    pub program: String,
    /// The program's version.
    pub version: String,
    /// The newest version of the takeover protocol that it speaks.
    pub protocol: u32,
    /// When this process started.
    pub started_unix_ms: u64,
    /// When this process began to serve.
    pub serving_since_unix_ms: u64,
    /// What a takeover would hand over.
    pub items: Vec<ItemStatus>,
    /// Counters, which go on over takeovers.
    pub counters: BTreeMap<String, u64>,
    /// Whether a takeover is going on.
    pub takeover_running: bool,
    /// How the last takeover went, if there was any.
    pub last_takeover: Option<LastTakeover>,
    /// What a supervisor supervises.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub supervised: Option<Supervised>,
    /// What the application has to say of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application: Option<serde_json::Value>,
}

/// The program that a supervisor keeps running.
///
/// ```
/// let supervised: heirloom::control::Supervised =
///     serde_json::from_str(r#"{"command": ["/bin/echod"], "state": "ready", "pid": 12}"#)?;
/// assert_eq!(supervised.refused, [""; 0]);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Supervised {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Its main process, if there is one at the moment.
    pub pid: Option<u32>,
    /// In one word what it does: `starting`, `ready`, `reloading`, `stopping`, `waiting` (to be started again) …
    pub state: String,
    /// What it says of itself (`STATUS=` of `sd_notify(3)`).
    pub text: String,
    /// How it ended the last time, if it has.
    pub ended: Option<String>,
    /// How many descriptors may be stored at most.
    pub limit: u64,
    /// How many of the items are kept by the supervisor's own supervisor as well; none where there is nobody who keeps any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_above: Option<u64>,
    /// What was refused last, the newest at the end.
    pub refused: Vec<String>,
}

/// One item of the bundle.
///
/// ```
/// let item = heirloom::control::ItemStatus {
///     id: 3,
///     name: "listener".to_owned(),
///     kind: "tcp-listener".to_owned(),
///     put_by: None,
/// };
/// assert_eq!(serde_json::to_string(&item)?, r#"{"id":3,"name":"listener","kind":"tcp-listener"}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ItemStatus {
    /// Its id, which it keeps for life.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The name of its kind.
    pub kind: String,
    /// The process that put it into an fd store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub put_by: Option<u32>,
}

/// How a takeover went, as told by the one who serves now.
///
/// ```
/// let last: heirloom::control::LastTakeover =
///     serde_json::from_str(r#"{"outcome": "resumed", "reason": "the successor died"}"#)?;
/// assert_eq!(last.pause_us, None);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LastTakeover {
    /// `taken` (the successor serves), `resumed` (rolled back) or `refused`.
    pub outcome: String,
    /// Why, unless it was taken.
    pub reason: Option<String>,
    /// The other process.
    pub peer_pid: Option<u32>,
    /// How many items were handed over.
    pub items: u64,
    /// Length of the manifest in bytes.
    pub bytes: u64,
    /// How long nobody served, in microseconds; `None` when there was no freeze.
    pub pause_us: Option<u64>,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
    /// When it ended.
    pub at_unix_ms: u64,
}
