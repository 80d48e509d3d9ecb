//! Where a control socket is: by path, by name, or where `heirloom chat` has it by default.

use std::path::PathBuf;

use clap::Args;
use heirloom::control::path::default_path;

use crate::chat::DEFAULT_ADDRESS;
use crate::exit::Exit;
use crate::failure::Failure;

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

    /// The path; without an option that of a `heirloom chat` without options.
    pub(crate) fn path_of_chat(&self) -> Result<PathBuf, Failure> {
        self.path("chat", DEFAULT_ADDRESS)
    }
}
