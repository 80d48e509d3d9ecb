//! The ways of handing over that are measured beside each other.

use std::path::Path;

use clap::ValueEnum;

use crate::{floor, library};

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

    /// A server of a chain: its first one with as many connections, or else a successor.
    pub(crate) fn serve(
        self,
        control: &Path,
        state_bytes: usize,
        first: Option<usize>,
    ) -> anyhow::Result<()> {
        match (self, first) {
            (Way::Library, Some(count)) => library::first(control, count, state_bytes),
            (Way::Library, None) => library::successor(control),
            (way, Some(count)) => floor::first(way, control, count, state_bytes),
            (way, None) => floor::successor(way, control, state_bytes),
        }
    }
}
