//! Fetching: a program asks for all that is stored at once, over a channel of its own, instead of by `LISTEN_FDS`.
//!
//! What was stored when it asked is what it gets, and it stays stored. Packets hold up to [`MAX_DESCRIPTORS`], their
//! bytes are the names, each with a newline behind it; after the last one comes the packet `.` and the end. Nothing
//! here waits: a fetcher that does not read for a while is dropped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use heirloom::channel::{Channel, MAX_DESCRIPTORS, MAX_PACKET, SendError};

use crate::clock::Moment;
use crate::store::Held;

/// How long a fetcher may read nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait when too much is on its way, for which there is no event.
pub(crate) const AGAIN: Duration = Duration::from_millis(20);

/// The packet behind the last descriptor.
const END: &[u8] = b".";

/// Somebody who fetches.
#[derive(Debug)]
pub(crate) struct Fetch {
    channel: Channel,
    held: Vec<Rc<Held>>,
    sent: usize,
    /// When it is dropped if it has read nothing by then.
    pub(crate) until: Moment,
}

/// How far a fetch has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All is sent.
    Done,
    /// Until the channel is writable.
    Full,
    /// Until others have received theirs.
    InFlight,
    /// The fetcher is gone, or cannot be sent to.
    Failed(String),
}

impl Fetch {
    /// A fetch of these, and the end of the channel that is for whoever asked.
    pub(crate) fn new(held: Vec<Rc<Held>>, now: Moment) -> io::Result<(Fetch, OwnedFd)> {
        let (channel, theirs) = Channel::pair()?;
        Ok((Fetch { channel, held, sent: 0, until: now.after(PATIENCE) }, theirs))
    }

    /// Sends as much as can be sent.
    pub(crate) fn go_on(&mut self, now: Moment) -> Progress {
        loop {
            let batch = self.next_batch();
            let sent = if batch.is_empty() {
                self.channel.send(END, &[])
            } else {
                let names: Vec<u8> = batch.iter().flat_map(|held| held.name.bytes().chain([b'\n'])).collect();
                let descriptors: Vec<BorrowedFd<'_>> =
                    batch.iter().map(|held| held.descriptor.as_fd()).collect();
                self.channel.send(&names, &descriptors)
            };
            match sent {
                Ok(()) if batch.is_empty() => return Progress::Done,
                Ok(()) => {
                    self.sent += batch.len();
                    self.until = now.after(PATIENCE);
                }
                Err(SendError::Full) => return Progress::Full,
                Err(SendError::InFlight { .. }) => return Progress::InFlight,
                Err(error) => return Progress::Failed(error.to_string()),
            }
        }
    }

    /// As many as fit in one packet, with their names.
    fn next_batch(&self) -> &[Rc<Held>] {
        let rest = &self.held[self.sent..];
        let mut bytes = 0;
        let fits = rest.iter().take(MAX_DESCRIPTORS).take_while(|held| {
            bytes += held.name.len() + 1;
            bytes <= MAX_PACKET
        });
        &rest[..fits.count()]
    }
}

impl AsFd for Fetch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
