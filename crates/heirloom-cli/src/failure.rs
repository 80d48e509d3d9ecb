//! An error of the program: what is said, and with which code the program ends.

use std::fmt;

use heirloom::control::{ClientError, Failure as Refusal, FailureCode};
use heirloom::{StartError, TakeoverError};

use crate::exit::Exit;

/// Why the program ends without having done what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: Exit,
    error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Failure { exit, error: error.into() }
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
            StartError::AlreadyServed(_) | StartError::Refused(_) | StartError::Untrusted(_) => Exit::Refused,
            StartError::Client(ClientError::Permission { .. }) => Exit::Refused,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    }
}

impl From<TakeoverError> for Failure {
    fn from(error: TakeoverError) -> Self {
        let exit = match &error {
            TakeoverError::Ended(_) => Exit::RolledBack,
            TakeoverError::Serving(_) => Exit::Failed,
        };
        Failure::new(exit, error)
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

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let exit = match refusal.code {
            FailureCode::Failed | FailureCode::Malformed | FailureCode::TooLong | FailureCode::Unknown => {
                Exit::Failed
            }
            _ => Exit::Refused,
        };
        Failure::new(exit, refusal)
    }
}
