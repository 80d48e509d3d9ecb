//! How the program ends: its exit codes, which scripts and supervisors may rely on.

use std::process::{ExitCode, Termination};

/// What the program's exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Did what was asked, or was replaced by a successor.
    Done = 0,
    /// Failed; the message on stderr says why.
    Failed = 1,
    /// The command line makes no sense (clap's own code for it).
    Usage = 2,
    /// Nobody answers at the control socket.
    NobodyThere = 3,
    /// The incumbent refused, or is busy with another takeover.
    Refused = 4,
    /// The takeover was rolled back; the incumbent still serves.
    RolledBack = 5,
}

impl Exit {
    /// The number that the parent process sees.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_are_documented() {
        let all = [Exit::Done, Exit::Failed, Exit::Usage, Exit::NobodyThere, Exit::Refused, Exit::RolledBack];
        assert_eq!(all.map(Exit::code), [0, 1, 2, 3, 4, 5]);
    }
}
