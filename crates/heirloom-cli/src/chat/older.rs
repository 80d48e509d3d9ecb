//! Protocol 0 at the client: an older program takes the connection, or is relieved of it.
//!
//! No state can be carried, so everything is written and sent before the descriptor is given away, and nothing is
//! touched afterwards. The older program's `"Quit"` is the commit; a connection that ends without it means that the
//! older program has gone, and the client serves on.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use heirloom::{ConnectionId, Incumbent, Kind, OlderIncumbent};
use serde::Deserialize;

use crate::failure::Failure;

/// The chat client's own requests at the control socket.
#[derive(Debug, Deserialize)]
pub(super) enum ChatRequest {
    /// Protocol 0: hand over the connection.
    RequestFds,
}

/// How long the buffers may take to empty before an older program is refused.
pub(super) const FLUSH_WITHIN: Duration = Duration::from_secs(10);

/// An older program that wants the connection.
pub(super) enum Older {
    /// Its answer waits for the buffers to be empty.
    Flushing { connection: ConnectionId, until: Instant },
    /// It has the descriptor; nothing may be touched until it commits or goes.
    Handed { connection: ConnectionId },
}

impl Older {
    pub(super) fn connection(&self) -> ConnectionId {
        match self {
            Older::Flushing { connection, .. } | Older::Handed { connection } => *connection,
        }
    }
}

/// Takes the connection from an incumbent of protocol 0.
pub(super) fn take_over(
    older: OlderIncumbent,
) -> Result<(Incumbent<ChatRequest>, Option<TcpStream>), Failure> {
    let (descriptor, incumbent) = older.take_over::<ChatRequest>()?;
    let socket = descriptor.and_then(tcp_stream);
    tracing::info!(connected = socket.is_some(), "took over from an incumbent of protocol 0");
    Ok((incumbent, socket))
}

fn tcp_stream(descriptor: OwnedFd) -> Option<TcpStream> {
    match Kind::of(&descriptor) {
        Ok(Kind::TcpStream) => Some(TcpStream::from(descriptor)),
        kind => {
            tracing::warn!(
                ?kind,
                "the older incumbent handed over something that is no TCP connection; closing it"
            );
            None
        }
    }
}
