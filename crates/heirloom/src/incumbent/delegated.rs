//! Requests of the library's own that the application has asked to answer itself (see
//! [`Delegate`](crate::config::Delegate)).

use rustix::process::geteuid;

use super::Incumbent;
use super::connection::{ConnectionId, failure};
use crate::control::request::{Failure, FailureCode, Reply};
use crate::control::status::Status;
use crate::upgrade::Upgrade;

/// A request that the application answers. Dropping it refuses.
///
/// ```
/// use heirloom::{Delegated, Incumbent, Turn};
///
/// fn answer(asked: Delegated<'_, heirloom::NoRequests>, listening: bool) {
///     match asked {
///         Delegated::Status(asked) => {
///             let mut status = asked.status();
///             status.counters.insert("listening".into(), listening.into());
///             asked.answer(status);
///         }
///         // What the library would have done.
///         Delegated::Upgrade(asked) => asked.of_this_process(),
///     }
/// }
/// ```
pub enum Delegated<'i, A> {
    /// What is there?
    Status(StatusAsked<'i, A>),
    /// Let a new program take the place.
    Upgrade(UpgradeAsked<'i, A>),
}

/// A request for the status.
///
/// ```
/// fn plain(asked: heirloom::StatusAsked<'_, heirloom::NoRequests>) {
///     let status = asked.status();
///     asked.answer(status);
/// }
/// ```
pub struct StatusAsked<'i, A> {
    pub(super) incumbent: &'i mut Incumbent<A>,
    pub(super) connection: ConnectionId,
    pub(super) answered: bool,
}

impl<A> StatusAsked<'_, A> {
    /// What the library would answer.
    pub fn status(&self) -> Status {
        self.incumbent.status()
    }

    /// Answers.
    pub fn answer(mut self, status: Status) {
        self.answered = true;
        self.incumbent.answer_later(self.connection, Reply::Status(status).to_line(), Vec::new());
    }
}

impl<A> Drop for StatusAsked<'_, A> {
    fn drop(&mut self) {
        if !self.answered {
            refuse_unanswered(self.incumbent, self.connection);
        }
    }
}

/// A request for an upgrade.
///
/// ```
/// fn never(asked: heirloom::UpgradeAsked<'_, heirloom::NoRequests>) {
///     use heirloom::control::{Failure, FailureCode};
///     asked.refuse(Failure::new(FailureCode::Failed, "this one stays"));
/// }
/// ```
pub struct UpgradeAsked<'i, A> {
    pub(super) incumbent: &'i mut Incumbent<A>,
    pub(super) connection: ConnectionId,
    pub(super) request: Upgrade,
    pub(super) answered: bool,
}

impl<A> UpgradeAsked<'_, A> {
    /// What is asked for.
    pub fn request(&self) -> &Upgrade {
        &self.request
    }

    /// What the library would answer to a request for the status.
    pub fn status(&self) -> Status {
        self.incumbent.status()
    }

    /// Whether whoever asks may say what is run: only the incumbent's own user and root may.
    pub fn may_name_a_program(&self) -> bool {
        let peer = self.incumbent.connections.get(&self.connection).map(|connection| connection.peer.uid);
        peer.is_some_and(|uid| uid == 0 || uid == geteuid().as_raw())
    }

    /// It is of this process: the library goes on with it, and answers.
    pub fn of_this_process(mut self) {
        self.answered = true;
        let request = std::mem::take(&mut self.request);
        self.incumbent.answer_again(self.connection);
        self.incumbent.upgrade_asked(self.connection, &request);
    }

    /// Keeps the client waiting for [`Incumbent::answer_later`], with a [`Reply`].
    pub fn defer(mut self) -> ConnectionId {
        self.answered = true;
        self.connection
    }

    /// Refuses.
    pub fn refuse(mut self, why: Failure) {
        self.answered = true;
        self.incumbent.answer_later(self.connection, Reply::Error(why).to_line(), Vec::new());
    }
}

impl<A> Drop for UpgradeAsked<'_, A> {
    fn drop(&mut self) {
        if !self.answered {
            refuse_unanswered(self.incumbent, self.connection);
        }
    }
}

impl<A> Incumbent<A> {
    /// The application does not answer after all: what a connection has sent next is looked at again.
    fn answer_again(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.waiting = false;
        }
        self.replied.push(id);
    }
}

fn refuse_unanswered<A>(incumbent: &mut Incumbent<A>, connection: ConnectionId) {
    let line = failure(FailureCode::Failed, "the application gave no answer");
    incumbent.answer_later(connection, line, Vec::new());
}
