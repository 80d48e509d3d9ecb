//! An operator's side: ask an incumbent for an upgrade, and find out what became of it.
//!
//! A successful upgrade ends the incumbent, and the connection with it. So success is the next generation answering at
//! the same control socket; the end of the connection alone says nothing.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::request::{Checked, Upgrade};
use crate::control::client::{Client, ClientError};
use crate::control::request::{Failure, FailureCode, NoRequests, Reply, Request};
use crate::control::status::Status;

/// How often a control socket is asked again until the successor answers.
const ASK_AGAIN: Duration = Duration::from_millis(5);
/// How long nobody may answer after the incumbent has gone.
const SILENCE: Duration = Duration::from_secs(5);

/// What became of a request.
///
/// ```
/// use heirloom::upgrade::{AskError, Upgrade, Upgraded, ask};
/// use std::time::Duration;
///
/// let nowhere = std::env::temp_dir().join("no such socket");
/// match ask(&nowhere, Upgrade::default(), Duration::from_secs(60)) {
///     Ok(Upgraded::Replaced { before, now }) => println!("pid {} became {}", before.pid, now.pid),
///     Ok(Upgraded::Checked(checked)) => println!("{} could take over", checked.version),
///     Ok(Upgraded::Supervised { now, .. }) => println!("its command runs as {:?}", now.supervised),
///     Err(AskError::Client(error)) => println!("{error}"),
///     Err(error) => println!("not upgraded: {error}"),
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upgraded {
    /// The new program serves.
    Replaced {
        /// What the incumbent said of itself before.
        before: Box<Status>,
        /// What the new program says of itself.
        now: Box<Status>,
    },
    /// A dry run: the new program could take over.
    Checked(Checked),
    /// What a supervisor supervises has been upgraded; the supervisor is the same.
    Supervised {
        /// What the supervisor said before.
        before: Box<Status>,
        /// What it says now.
        now: Box<Status>,
    },
}

/// Why there was no upgrade.
///
/// ```
/// use heirloom::upgrade::AskError;
///
/// let error = AskError::Gone { path: "/run/echo.sock".into() };
/// assert!(error.to_string().contains("nobody"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The incumbent refused, or the upgrade failed and it serves on: the code says which.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// The control socket cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The incumbent is of a time before upgrades.
    #[error(
        "the incumbent ({program} {version}) knows nothing of upgrades; start the new program by hand, and it takes over"
    )]
    Older {
        /// Its name.
        program: String,
        /// Its version.
        version: String,
    },
    /// The incumbent ended, and nobody has answered since.
    #[error(
        "the incumbent has ended, and nobody answers at {} since: the new program may have failed as it started; see its log",
        path.display()
    )]
    Gone {
        /// The control socket.
        path: PathBuf,
    },
    /// It takes longer than one wanted to wait.
    #[error(
        "there is no outcome within {0:?}; the upgrade goes on, and a status will show what became of it"
    )]
    Late(Duration),
    /// The incumbent closed the connection, but the same generation still serves.
    #[error(
        "the incumbent closed the connection without saying why, and serves on as generation {generation}; look at its log"
    )]
    Unchanged {
        /// The generation that serves.
        generation: u64,
    },
    /// The answer makes no sense.
    #[error("the incumbent answered something else: {0}; it may be of another version")]
    Unexpected(String),
}

/// Asks the incumbent at this control socket for an upgrade, and waits until the new program serves or it has failed.
///
/// `patience` is how long the incumbent may take; it has limits of its own ([`Times`](crate::protocol::Times)), which
/// together are shorter than a minute by default. A timeout leaves the upgrade going on.
///
/// # Errors
///
/// See [`AskError`].
pub fn ask(path: &Path, mut request: Upgrade, patience: Duration) -> Result<Upgraded, AskError> {
    let before = first_status(path)?;
    request.generation.get_or_insert(before.generation);
    let mut client = Client::connect(path)?;
    client.set_timeout(patience);
    match client.request(&Request::<NoRequests>::Upgrade(request)) {
        Ok(Reply::Checked(checked)) => Ok(Upgraded::Checked(checked)),
        Ok(Reply::Upgraded(now)) => Ok(Upgraded::Supervised { before: Box::new(before), now: Box::new(now) }),
        Ok(Reply::Error(failure)) if failure.code == FailureCode::Unknown => {
            let Status { program, version, .. } = before;
            Err(AskError::Older { program, version })
        }
        Ok(Reply::Error(failure)) => Err(failure.into()),
        Ok(other) => Err(AskError::Unexpected(format!("{other:?}"))),
        Err(ClientError::Closed { .. }) => {
            let now = successor(path, &before)?;
            Ok(Upgraded::Replaced { before: Box::new(before), now: Box::new(now) })
        }
        Err(ClientError::Timeout { timeout, .. }) => Err(AskError::Late(timeout)),
        Err(error) => Err(error.into()),
    }
}

/// The status of whoever serves. One that was just being replaced may close the connection before it answers.
fn first_status(path: &Path) -> Result<Status, AskError> {
    let give_up = Instant::now() + SILENCE;
    loop {
        match status(path) {
            Err(AskError::Client(ClientError::Closed { .. })) if Instant::now() < give_up => {
                thread::sleep(ASK_AGAIN);
            }
            status => return status,
        }
    }
}

/// The status of the next generation, or of a later one.
fn successor(path: &Path, before: &Status) -> Result<Status, AskError> {
    let give_up = Instant::now() + SILENCE;
    loop {
        match status(path) {
            Ok(now) if now.generation > before.generation => return Ok(now),
            // A restart by somebody else begins again at 0.
            Ok(now) if now.started_unix_ms != before.started_unix_ms => {
                return Err(AskError::Gone { path: path.into() });
            }
            Ok(now) if Instant::now() >= give_up => {
                return Err(AskError::Unchanged { generation: now.generation });
            }
            Ok(_) | Err(AskError::Client(ClientError::Closed { .. })) if Instant::now() < give_up => {}
            // A successor has the socket from the offer on: with the incumbent it has ended, too. A supervisor may wait for us
            // before it starts the next one.
            Err(AskError::Client(ClientError::Nobody { .. } | ClientError::Closed { .. })) => {
                return Err(AskError::Gone { path: path.into() });
            }
            Ok(_) => {}
            Err(error) => return Err(error),
        }
        thread::sleep(ASK_AGAIN);
    }
}

fn status(path: &Path) -> Result<Status, AskError> {
    match Client::connect(path)?.request(&Request::<NoRequests>::Status)? {
        Reply::Status(status) => Ok(status),
        Reply::Error(failure) => Err(failure.into()),
        other => Err(AskError::Unexpected(format!("{other:?}"))),
    }
}
