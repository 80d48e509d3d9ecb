//! Bytes on their way: in memory, or in the kernel where they survive this process.

use super::buffer::Buffer;
use super::conduit::Conduit;

pub(super) enum Queue {
    Memory(Buffer),
    Kernel(Conduit),
}

impl Queue {
    /// Holds `bytes` in memory, or what is in the `conduit` with `bytes` behind that.
    pub(super) fn new(conduit: Option<Conduit>, bytes: Vec<u8>, limit: usize) -> Self {
        match conduit {
            None => Queue::Memory(Buffer::from_vec(bytes, limit)),
            Some(mut conduit) => {
                conduit.push(&bytes);
                Queue::Kernel(conduit)
            }
        }
    }

    /// How many bytes are queued.
    pub(super) fn len(&self) -> usize {
        match self {
            Queue::Memory(buffer) => buffer.len(),
            Queue::Kernel(conduit) => conduit.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether more can be taken in.
    pub(super) fn has_room(&self) -> bool {
        match self {
            Queue::Memory(buffer) => buffer.space() > 0,
            Queue::Kernel(conduit) => conduit.has_room(),
        }
    }

    /// Whether nobody but this process has the bytes that it takes in.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self, Queue::Memory(_))
    }

    /// A copy of what is in memory: everything, or what waits behind a pipe.
    pub(super) fn to_vec(&self) -> Vec<u8> {
        match self {
            Queue::Memory(buffer) => buffer.to_vec(),
            Queue::Kernel(conduit) => conduit.behind().to_vec(),
        }
    }

    /// The queue in the kernel, if it is one.
    pub(super) fn conduit(&self) -> Option<&Conduit> {
        match self {
            Queue::Memory(_) => None,
            Queue::Kernel(conduit) => Some(conduit),
        }
    }
}
