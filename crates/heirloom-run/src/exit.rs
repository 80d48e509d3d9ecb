//! The codes that `heirloom run` ends with when they are not the command's own: those of env(1), timeout(1) and shells.

use rustix::process::WaitStatus;
use serde::{Deserialize, Serialize};

/// run itself has failed.
pub const RUN_FAILED: u8 = 125;
/// The command is there, and cannot be executed.
pub const CANNOT_RUN: u8 = 126;
/// There is no such command.
pub const NOT_FOUND: u8 = 127;

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ended {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(i32),
    /// It was not ours to be told.
    Unknown,
}

impl Ended {
    pub(crate) fn of(status: WaitStatus) -> Ended {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ended::Code(code as u8),
            (_, Some(signal)) => Ended::Signal(signal),
            _ => Ended::Unknown,
        }
    }

    /// The code to end with in its place.
    pub(crate) fn code(self) -> u8 {
        match self {
            Ended::Code(code) => code,
            Ended::Signal(signal) => 128u8.wrapping_add(signal as u8),
            Ended::Unknown => 1,
        }
    }

    pub(crate) fn is_success(self) -> bool {
        self == Ended::Code(0)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Code(code) => write!(f, "code {code}"),
            Ended::Signal(signal) => write!(f, "signal {signal}"),
            Ended::Unknown => write!(f, "a code that this process was not told"),
        }
    }
}
