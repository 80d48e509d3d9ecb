//! redis-server, and redis-cli as publisher and subscriber.

use std::path::PathBuf;
use std::process::Command;

use super::{host_and_port, start_on_a_free_port};
use crate::support::{Process, Scratch, have, skip};

/// A server that keeps nothing.
pub(crate) struct Redis {
    _server: Process,
    address: String,
    _scratch: Scratch,
}

impl Redis {
    /// Starts it, or skips the test.
    pub(crate) fn start() -> Option<Redis> {
        if !have("redis-server") || !have("redis-cli") {
            skip("redis is not installed (apt-get install redis-server redis-tools)");
            return None;
        }
        let scratch = Scratch::new();
        let directory: PathBuf = scratch.path("");
        let (server, address) = start_on_a_free_port(|port| {
            let mut redis = Command::new("redis-server");
            redis.args([
                "--bind",
                "127.0.0.1",
                "--port",
                &port.to_string(),
                "--save",
                "",
                "--appendonly",
                "no",
            ]);
            redis.arg("--dir").arg(&directory);
            redis
        });
        Some(Redis { _server: server, address, _scratch: scratch })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

/// `redis-cli` at this address.
pub(crate) fn redis_cli(address: &str) -> Command {
    let (host, port) = host_and_port(address);
    let mut command = Command::new("redis-cli");
    command.args(["-h", host, "-p", port]).env_remove("REDISCLI_AUTH");
    command
}
