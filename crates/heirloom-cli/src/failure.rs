//! An error of the program: what is said, and with which code the program ends.

use std::fmt;

use heirloom::control::{ClientError, Failure as Refusal, FailureCode};
use heirloom::protocol::{Cause, Reason};
use heirloom::upgrade::AskError;
use heirloom::{StartError, TakeoverError};

use crate::exit::Exit;

/// Why the program ends without having done what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: Exit,
    /// Whether it was a takeover that ended with the incumbent's death: there is nobody to be replaced any more.
    pub(crate) incumbent_died: bool,
    error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Failure { exit, incumbent_died: false, error: error.into() }
    }

    /// Where and why a takeover ended, if it is that.
    pub(crate) fn reason(&self) -> Option<&Reason> {
        match self.error.downcast_ref()? {
            TakeoverError::Ended(reason) => Some(reason),
            TakeoverError::Serving(_) => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure::new(Exit::Failed, error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(Exit::Failed, error)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let exit = match &error {
            StartError::Nobody(_) => Exit::NobodyThere,
            StartError::AlreadyServed(_)
            | StartError::Refused(_)
            | StartError::Untrusted(_)
            | StartError::Version { .. } => Exit::Refused,
            StartError::Client(ClientError::Permission { .. }) => Exit::Refused,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    }
}

impl From<TakeoverError> for Failure {
    fn from(error: TakeoverError) -> Self {
        let (exit, incumbent_died) = match &error {
            TakeoverError::Ended(reason) => {
                (Exit::RolledBack, matches!(reason.cause, Cause::Exited | Cause::Closed))
            }
            TakeoverError::Serving(_) => (Exit::Failed, false),
        };
        Failure { incumbent_died, ..Failure::new(exit, error) }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::Nobody { .. } => Exit::NobodyThere,
            ClientError::Permission { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    }
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Refused(refusal) => refusal.into(),
            AskError::Client(error) => error.into(),
            error => Failure::new(Exit::Failed, error),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let exit = match refusal.code {
            FailureCode::RolledBack => Exit::RolledBack,
            FailureCode::Failed | FailureCode::Malformed | FailureCode::TooLong | FailureCode::Unknown => {
                Exit::Failed
            }
            _ => Exit::Refused,
        };
        Failure::new(exit, refusal)
    }
}
