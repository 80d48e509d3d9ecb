//! Protocol 0: an incumbent of the first kind, which hands over one connection and nothing else.
//!
//! After `"RequestFds"` it answers with the two bytes `hi` and, if it is connected, the connection's descriptor; after
//! `"Quit"` it exits. It carries no state and knows no commit: from the moment it has answered, it must not be asked
//! to go on, so nothing is done between its answer and `"Quit"` that could fail.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Config;
use crate::control::client::{Client, ClientError};
use crate::control::request::Request;
use crate::incumbent::Incumbent;
use crate::lock::{LockError, LockFile, lock_path};
use crate::manifest::ServiceRecord;
use crate::service::Service;
use crate::start::{StartError, serve_fresh};

/// An incumbent that speaks protocol 0, and is still serving.
///
/// ```no_run
/// use heirloom::{Config, NoRequests, Replace, Service, Start, start};
///
/// # fn main() -> Result<(), heirloom::StartError> {
/// let service = Service::new("chat");
/// let path = "/run/chat/chat.sock".as_ref();
/// if let Start::Older(older) = start::<NoRequests>(path, service, Config::default(), Replace::Try)? {
///     let (connection, incumbent) = older.take_over::<NoRequests>()?;
///     println!("serving, connected: {}", connection.is_some());
///     # drop(incumbent);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct OlderIncumbent {
    client: Client,
    path: PathBuf,
    service: Service,
    config: Config,
}

/// What protocol 0 knows beside our own Ping and Quit.
#[derive(Serialize)]
enum Older {
    RequestFds,
}

impl OlderIncumbent {
    pub(crate) fn new(client: Client, path: &Path, service: Service, config: Config) -> Self {
        OlderIncumbent { client, path: path.into(), service, config }
    }

    /// Takes its connection, tells it to quit, and serves once it has gone. The control socket is bound anew: an
    /// incumbent of protocol 0 does not hand over its listener.
    ///
    /// # Errors
    ///
    /// It did not answer, answered something else, or did not go. Before `"Quit"` it goes on serving.
    pub fn take_over<A: DeserializeOwned>(mut self) -> Result<(Option<OwnedFd>, Incumbent<A>), StartError> {
        let nonsense = |what: String| StartError::Nonsense { path: self.path.clone(), what };
        let lock = LockFile::open(lock_path(&self.path))?;
        self.client.send(&Request::Application(Older::RequestFds))?;
        let (answer, mut descriptors) = self.client.receive_bytes()?;
        if answer != b"hi" {
            return Err(nonsense(String::from_utf8_lossy(&answer).into_owned()));
        }
        if descriptors.len() > 1 {
            return Err(nonsense(format!("{} descriptors instead of one", descriptors.len())));
        }
        self.client.send(&Request::<Older>::Quit)?;
        match self.client.receive() {
            Err(ClientError::Closed { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok((line, _)) => return Err(nonsense(String::from_utf8_lossy(&line).into_owned())),
        }
        let deadline = Instant::now() + self.config.times.relock;
        let lock = lock.lock_until(deadline).map_err(|(_, error)| match error {
            LockError::Held { .. } => StartError::LockHeld(lock_path(&self.path)),
            error => error.into(),
        })?;
        let record = ServiceRecord { generation: 1, ..ServiceRecord::default() };
        let incumbent = serve_fresh(&self.path, lock, &self.service, &self.config, record)?;
        Ok((descriptors.pop(), incumbent))
    }
}
