//! How the program ends: its exit codes, which scripts and supervisors may rely on.
//!
//! Code and meaning are written down here only: `--help` and the man pages take them from here.

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
    /// All of them, in the order of their codes.
    pub(crate) const ALL: &[Exit] =
        &[Exit::Done, Exit::Failed, Exit::Usage, Exit::NobodyThere, Exit::Refused, Exit::RolledBack];

    /// The number that the parent process sees.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    /// What it means, for people.
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done, or replaced by a successor",
            Exit::Failed => "failed; stderr says why",
            Exit::Usage => "wrong usage",
            Exit::NobodyThere => "nobody answers at the control socket",
            Exit::Refused => "refused, or busy with another takeover",
            Exit::RolledBack => "the takeover was rolled back; the incumbent still serves",
        }
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
        let documentation = include_str!("../../../docs/chat.md");
        let (_, table) =
            documentation.split_once("| code | meaning |\n|---|---|\n").expect("a table of exit codes");
        let documented: Vec<&str> = table.lines().take_while(|line| line.starts_with('|')).collect();
        let ours: Vec<String> =
            Exit::ALL.iter().map(|exit| format!("| {} | {} |", exit.code(), exit.meaning())).collect();
        assert_eq!(documented, ours);
        // A number that scripts rely on does not change, not even together with its documentation.
        assert!(Exit::ALL.iter().map(|exit| exit.code()).eq(0..=5));
    }
}
