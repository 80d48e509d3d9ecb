//! What happens in a room, as it is told to the [room](super::room) and written in the [journal](super::journal).

use std::borrow::Cow;

use heirloom::ItemId;
use serde::{Deserialize, Serialize};

use crate::chat::bytes;

/// Something that has happened. What depended on time, on a socket or on a setting is decided by then.
///
/// Journals hold these names: of an event that is there already none may change, and a field that is added needs a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event<'b> {
    /// Somebody has come.
    Joined {
        id: ItemId,
        /// Where it comes from.
        address: String,
        /// What the kernel had counted of its connection by then, see [`Counted`].
        counted: Counted,
    },
    /// A client has sent some bytes, which need not be a line.
    Said {
        id: ItemId,
        #[serde(with = "bytes")]
        bytes: Cow<'b, [u8]>,
    },
    /// A client has nothing more to say, and is sent what it is still to hear.
    Left { id: ItemId },
    /// A client that does not read is not to cost more memory.
    CutOff { id: ItemId },
    /// A client that had left has heard everything, or would not in time.
    Gone { id: ItemId, heard: bool },
    /// Nobody is heard any more, and nobody comes.
    Closed,
}

/// How much was read from a connection and written to it, as the kernel counts
/// ([`TcpCounters`](heirloom_sys::TcpCounters)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counted {
    pub(super) consumed: u64,
    pub(super) written: u64,
}

impl Event<'_> {
    /// Whom it is about.
    pub(super) fn id(&self) -> Option<ItemId> {
        match self {
            Event::Joined { id, .. }
            | Event::Said { id, .. }
            | Event::Left { id }
            | Event::CutOff { id }
            | Event::Gone { id, .. } => Some(*id),
            Event::Closed => None,
        }
    }
}
