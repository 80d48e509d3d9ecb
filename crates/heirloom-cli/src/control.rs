//! Where a control socket is: by path, by name, or where `heirloom chat` has it by default.

use std::path::PathBuf;

use clap::Args;
use heirloom::control::path::default_path;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Item;

/// Where the chat server is if nothing else is said, which names the control socket.
pub(crate) const DEFAULT_ADDRESS: &str = "127.0.0.1:31337";

/// The control socket, for the lists of files in `--help` and the man pages.
pub(crate) const SOCKET: Item = (
    "$XDG_RUNTIME_DIR/heirloom/NAME.sock",
    "The control socket. Without --name, NAME is chat- and the address of the chat's server, for instance \
     chat-127.0.0.1:31337; of a chat server chat-listen- and its address. The process that ends without a successor removes it.",
);
/// The service lock beside it.
pub(crate) const LOCK: Item = (
    "$XDG_RUNTIME_DIR/heirloom/NAME.sock.lock",
    "The service lock: the process that serves holds an flock(2) on it. It is beside the control socket, wherever that \
     is, and is not to be removed.",
);
/// The variable that says where they are.
pub(crate) const RUNTIME_DIRECTORY: Item = (
    "XDG_RUNTIME_DIR",
    "The control socket is in its directory heirloom, unless --control says where. Without an absolute path in it, \
     that is /run/heirloom for root and /run/user/UID/heirloom for others.",
);

/// The options that say which control socket is meant.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Target {
    /// The path of the control socket
    #[arg(long, visible_alias = "ipc", value_name = "PATH")]
    control: Option<PathBuf>,
    /// The name of the control socket in the runtime directory ($XDG_RUNTIME_DIR/heirloom, or /run/heirloom for root)
    #[arg(long, value_name = "NAME", conflicts_with = "control")]
    name: Option<String>,
}

impl Target {
    /// The path; without an option the one of a role and an address, `chat-127.0.0.1:31337.sock` for instance.
    pub(crate) fn path(&self, role: &str, address: &str) -> Result<PathBuf, Failure> {
        if let Some(path) = &self.control {
            return Ok(path.clone());
        }
        let name = self.name.clone().unwrap_or_else(|| format!("{role}-{address}"));
        default_path(&name).map_err(|error| Failure::new(Exit::Failed, error))
    }

    /// The path, if an option says where it is.
    pub(crate) fn path_if_said(&self) -> Result<Option<PathBuf>, Failure> {
        match (&self.control, &self.name) {
            (None, None) => Ok(None),
            _ => self.path("", "").map(Some),
        }
    }

    /// The path; without an option that of a `heirloom chat` without options.
    pub(crate) fn path_of_chat(&self) -> Result<PathBuf, Failure> {
        self.path("chat", DEFAULT_ADDRESS)
    }
}
