//! Requests of the application's own, and their answers.

use std::os::fd::OwnedFd;

use serde::Serialize;

use super::Incumbent;
use super::connection::{ConnectionId, failure};
use crate::control::request::{Failure, FailureCode, Reply};

/// A request of the application's own. Each must be answered; dropping it answers with an error.
///
/// ```
/// use heirloom::Asked;
/// use serde::Deserialize;
///
/// #[derive(Deserialize)]
/// enum Mine {
///     Topic,
/// }
///
/// fn answer(mut asked: Asked<'_, Mine>) {
///     match asked.request() {
///         Some(Mine::Topic) => asked.reply(&"cats"),
///         None => asked.refuse("answered already"),
///     }
/// }
/// ```
pub struct Asked<'i, A> {
    pub(super) incumbent: &'i mut Incumbent<A>,
    pub(super) connection: ConnectionId,
    pub(super) request: Option<A>,
    pub(super) answered: bool,
}

impl<A> Asked<'_, A> {
    /// The request. It is there once.
    pub fn request(&mut self) -> Option<A> {
        self.request.take()
    }

    /// On which connection it came.
    pub fn connection(&self) -> ConnectionId {
        self.connection
    }

    /// Whether the process that asks may take over by its place; see [`Outsiders`](crate::Outsiders). For programs that can also
    /// be taken over by a request of their own.
    ///
    /// # Errors
    ///
    /// Why not, for it to be told.
    pub fn check_unit(&self) -> Result<(), Failure> {
        self.incumbent.refuse_outsider(self.connection)
    }

    /// Says [`Turn::Closed`](super::Turn::Closed) when this connection ends.
    pub fn watch(&mut self) {
        if let Some(connection) = self.incumbent.connections.get_mut(&self.connection) {
            connection.watched = true;
        }
    }

    /// Answers with a value, as one line of JSON.
    pub fn reply(self, value: &impl Serialize) {
        let line = match serde_json::to_value(value) {
            Ok(value) => Reply::Application(value).to_line(),
            Err(error) => failure(FailureCode::Failed, error),
        };
        self.reply_raw(line, Vec::new());
    }

    /// Answers with these bytes and, beside the first of them, these descriptors.
    pub fn reply_raw(mut self, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) {
        self.answered = true;
        self.incumbent.answer_later(self.connection, bytes, descriptors);
    }

    /// Answers with an error.
    pub fn refuse(self, why: &str) {
        self.reply_raw(failure(FailureCode::Failed, why), Vec::new());
    }

    /// Keeps the client waiting for [`Incumbent::answer_later`].
    pub fn defer(mut self) -> ConnectionId {
        self.answered = true;
        self.connection
    }
}

impl<A> Drop for Asked<'_, A> {
    fn drop(&mut self) {
        if !self.answered {
            let line = failure(FailureCode::Failed, "the application gave no answer");
            self.incumbent.answer_later(self.connection, line, Vec::new());
        }
    }
}

impl<A> Incumbent<A> {
    /// Answers a request that was [deferred](Asked::defer), with bytes and, beside the first of them, descriptors.
    /// Returns false if the client has gone.
    pub fn answer_later(&mut self, id: ConnectionId, bytes: Vec<u8>, descriptors: Vec<OwnedFd>) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        connection.waiting = false;
        connection.send(bytes, descriptors);
        self.replied.push(id);
        true
    }
}
