//! The ways of handing over that are measured beside each other.

use clap::ValueEnum;

/// How a server hands its connections over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// By the library.
    Library,
    /// The system calls that cannot be done without, 252 descriptors a message.
    Floor,
    /// As the floor, but with one descriptor a message, as pg_doorman does.
    OneAMessage,
    /// As the floor, but with one UNIX connection for each descriptor, which is acknowledged, as MOSN does.
    OneAConnection,
}

impl Way {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Library => "library",
            Way::Floor => "floor",
            Way::OneAMessage => "one-a-message",
            Way::OneAConnection => "one-a-connection",
        }
    }
}
