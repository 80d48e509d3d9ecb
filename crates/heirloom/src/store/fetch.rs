//! Fetching over a socket what `heirloom run` keeps, where environment variables would be too small for the names.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::channel::{Channel, ChannelError, Incoming};
use crate::control::client::{Client, ClientError};
use crate::control::request::{Reply, Request};

/// The variable with the path of the socket.
pub const HEIRLOOM_STORE: &str = "HEIRLOOM_STORE";

/// The packet that ends it.
pub const END: &[u8] = b".";

/// How long the keeper may take for its next answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The request of whoever fetches.
///
/// ```
/// use heirloom::{control::Request, store::FetchRequest};
///
/// assert_eq!(Request::Application(FetchRequest::Fetch).to_line()?, b"\"Fetch\"\n");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FetchRequest {
    /// Everything that is kept. A [`FetchReply`] answers, with one end of a channel: on it come packets of descriptors, with
    /// their names in the packet's bytes, each followed by a line break; after the last [`END`].
    Fetch,
}

/// The answer.
///
/// ```
/// let reply: heirloom::store::FetchReply = serde_json::from_str(r#"{"Fetch": {"descriptors": 3}}"#)?;
/// assert_eq!(reply, heirloom::store::FetchReply::Fetch { descriptors: 3 });
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FetchReply {
    /// So many are to come.
    Fetch {
        /// How many descriptors there are.
        descriptors: u64,
    },
}

/// Why what is kept was not had. It still is kept.
///
/// ```
/// use heirloom::store::FetchError;
///
/// let error = FetchError::Missing { got: 3, expected: 7 };
/// assert!(error.to_string().contains("3 of 7"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The keeper cannot be asked.
    #[error("cannot ask for what is stored: {0}")]
    Client(#[from] ClientError),
    /// The keeper answers, but not with what is stored.
    #[error("asked for what is stored, and was answered: {0}")]
    Answer(String),
    /// The channel fails.
    #[error("cannot receive what is stored: {0}")]
    Channel(#[from] ChannelError),
    /// Not all of it came.
    #[error("only {got} of {expected} stored descriptors have arrived")]
    Missing {
        /// How many came.
        got: u64,
        /// How many there are.
        expected: u64,
    },
    /// A system call failed.
    #[error("cannot wait for what is stored: {0}")]
    Io(#[from] io::Error),
}

/// Everything that the keeper at this control socket has, by name.
pub(super) fn fetch(path: &OsStr) -> Result<Vec<(String, OwnedFd)>, FetchError> {
    let mut client = Client::connect_within(path, PATIENCE)?;
    client.set_timeout(PATIENCE);
    client.send(&Request::Application(FetchRequest::Fetch))?;
    let (line, mut descriptors) = client.receive()?;
    let answer = || FetchError::Answer(String::from_utf8_lossy(&line).into_owned());
    let reply = match Reply::parse(&line) {
        Ok(Reply::Application(value)) => serde_json::from_value(value).map_err(|_| answer())?,
        Ok(Reply::Error(failure)) => return Err(FetchError::Answer(failure.to_string())),
        _ => return Err(answer()),
    };
    let FetchReply::Fetch { descriptors: expected } = reply;
    let (Some(channel), true) = (descriptors.pop(), descriptors.is_empty()) else { return Err(answer()) };
    receive(&Channel::adopt(channel)?, expected)
}

fn receive(channel: &Channel, expected: u64) -> Result<Vec<(String, OwnedFd)>, FetchError> {
    let mut all = Vec::new();
    let missing = |got: usize| FetchError::Missing { got: got as u64, expected };
    let mut until = Instant::now() + PATIENCE;
    loop {
        match channel.receive()? {
            Incoming::Empty => {
                let left = until.saturating_duration_since(Instant::now());
                match poll(&mut [PollFd::new(channel, PollFlags::IN)], left.try_into().ok().as_ref()) {
                    Ok(0) => return Err(missing(all.len())),
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(io::Error::from(error).into()),
                }
            }
            Incoming::Packet { bytes, descriptors } if bytes == END && descriptors.is_empty() => {
                return if all.len() as u64 == expected { Ok(all) } else { Err(missing(all.len())) };
            }
            Incoming::Packet { bytes, descriptors } => {
                let names = String::from_utf8_lossy(&bytes).into_owned();
                if names.lines().count() != descriptors.len() {
                    return Err(FetchError::Answer(format!(
                        "{} names for {}",
                        names.lines().count(),
                        descriptors.len()
                    )));
                }
                all.extend(names.lines().map(str::to_owned).zip(descriptors));
                until = Instant::now() + PATIENCE;
            }
            Incoming::Closed => return Err(missing(all.len())),
        }
    }
}
