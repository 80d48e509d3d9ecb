//! What a proxy says of itself when it is asked for its status.

use serde::{Deserialize, Serialize};

/// The state of a proxy. Totals count since the service began, over all handovers.
///
/// ```
/// let report = heirloom_proxy::Report::default();
/// assert_eq!(report.connections, 0);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// How many event loops.
    pub threads: usize,
    /// Connections now.
    pub connections: usize,
    /// Connections now of each loop.
    pub connections_of_loops: Vec<usize>,
    /// How many there may be.
    pub max_connections: usize,
    /// Pipes now, in use or kept.
    pub pipes: usize,
    /// Pipes that hold bytes now.
    pub pipes_in_use: usize,
    /// How many pipes there may be.
    pub max_pipes: usize,
    /// New connections a second, over the last 5 to 15 seconds.
    pub connections_per_second: f64,
    /// Bytes a second from clients to backends.
    pub up_bytes_per_second: f64,
    /// Bytes a second from backends to clients.
    pub down_bytes_per_second: f64,
    /// All listeners, and those that are no longer configured and still have connections.
    pub listeners: Vec<ListenerReport>,
    /// All backends, and those that are no longer configured and still have connections.
    pub backends: Vec<BackendReport>,
}

/// A listener.
///
/// ```
/// let listener = heirloom_proxy::ListenerReport { name: "web".into(), ..Default::default() };
/// assert!(listener.pool.is_none());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerReport {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Where its connections go to. `None`: it is no longer configured.
    pub pool: Option<String>,
    /// Connections now.
    pub connections: usize,
    /// How many there may be, if that is limited.
    pub max_connections: Option<usize>,
    /// Connections accepted.
    pub total_connections: u64,
    /// Connections for which no backend could be had.
    pub refused: u64,
    /// Bytes from clients to backends.
    pub up_bytes: u64,
    /// Bytes from backends to clients.
    pub down_bytes: u64,
}

/// A backend.
///
/// ```
/// let backend = heirloom_proxy::BackendReport { address: "127.0.0.1:80".into(), ..Default::default() };
/// assert!(!backend.configured);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendReport {
    /// Its pool's name.
    pub pool: String,
    /// Its name.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// Whether it gets new connections.
    pub configured: bool,
    /// Connections now.
    pub connections: usize,
    /// How many there may be, if that is limited.
    pub max_connections: Option<usize>,
    /// Connections made.
    pub total_connections: u64,
    /// Connections that could not be made.
    pub failed: u64,
    /// Bytes from clients.
    pub up_bytes: u64,
    /// Bytes to clients.
    pub down_bytes: u64,
}
