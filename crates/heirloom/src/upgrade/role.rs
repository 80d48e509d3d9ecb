//! The variable by which an incumbent tells the program that it starts what part it has.
//!
//! A value names the process that it is meant for: a variable that is inherited further, by a child of that process, says
//! nothing there. But for one: under a supervisor who inherits the part of a successor has it, as it has the supervisor's store
//! and must not begin another.

use std::ffi::{OsStr, OsString};
use std::fmt;

use rustix::fs::fstat;

use crate::notify;

/// The variable's name.
pub(crate) const VARIABLE: &str = "HEIRLOOM_UPGRADE";

/// What an upgrade means this process to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To look at the manifest on stdin, which has this inode, and answer: a child of the incumbent.
    Preflight { incumbent: u32, manifest: u64 },
    /// To take over: a child of the incumbent, or of its supervisor.
    Successor { incumbent: u32 },
    /// The incumbent itself as another program; the manifest is in this descriptor.
    InPlace { incumbent: u32, manifest: i32 },
}

impl Role {
    /// The role of this process, if it has one.
    pub(crate) fn of_this_process() -> Option<Role> {
        let role = Role::parse(&std::env::var_os(VARIABLE)?)?;
        let meant = match role {
            // By what it was given, and not by its parent: one that has lost its parent must not take itself for a program
            // that was started by hand, and serve with a manifest for its stdin.
            Role::Preflight { manifest, .. } => {
                fstat(rustix::stdio::stdin()).is_ok_and(|stdin| stdin.st_ino == manifest)
            }
            // One under a supervisor is a successor for good: what the incumbent leaves if it dies is for the process that
            // the supervisor starts, with the store, and a second one would be a rival of that.
            Role::Successor { incumbent } => parent() == Some(incumbent) || notify::is_supervised(),
            Role::InPlace { incumbent, .. } => std::process::id() == incumbent,
        };
        meant.then_some(role)
    }

    fn parse(value: &OsStr) -> Option<Role> {
        let mut parts = value.to_str()?.split(':');
        let (role, pid) = (parts.next()?, parts.next()?.parse().ok()?);
        let role = match role {
            "preflight" => Role::Preflight { incumbent: pid, manifest: parts.next()?.parse().ok()? },
            "successor" => Role::Successor { incumbent: pid },
            "in-place" => Role::InPlace { incumbent: pid, manifest: parts.next()?.parse().ok()? },
            _ => return None,
        };
        parts.next().is_none().then_some(role)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Preflight { incumbent, manifest } => write!(f, "preflight:{incumbent}:{manifest}"),
            Role::Successor { incumbent } => write!(f, "successor:{incumbent}"),
            Role::InPlace { incumbent, manifest } => write!(f, "in-place:{incumbent}:{manifest}"),
        }
    }
}

/// The parent of this process, where it can be seen from here.
pub(crate) fn parent() -> Option<u32> {
    rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs())
}

/// Whether a variable is left out of a started program's environment: what was meant for this process alone, ours and
/// systemd's. LISTEN_PID would still match after an execve, and its descriptors are long in use; with the WATCHDOG_PID of its
/// predecessor a successor would not tell the watchdog that it lives.
pub(crate) fn is_ours_alone(name: &OsStr) -> bool {
    let theirs = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"];
    name == VARIABLE || theirs.iter().any(|theirs| name == *theirs)
}

/// The environment of a started program.
pub(crate) fn environment(role: Role) -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os()
        .filter(|(name, _)| !is_ours_alone(name))
        .chain([(VARIABLE.into(), role.to_string().into())])
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn roles_travel_as_text() {
        for role in [
            Role::Preflight { incumbent: 1, manifest: u64::MAX },
            Role::Successor { incumbent: 4_000_000 },
            Role::InPlace { incumbent: 1, manifest: 19_999 },
        ] {
            assert_eq!(Role::parse(role.to_string().as_ref()), Some(role));
        }
        for nonsense in
            ["", "preflight", "preflight:1", "preflight:x:1", "in-place:1", "successor:1:2", "king:1"]
        {
            assert_eq!(Role::parse(nonsense.as_ref()), None, "{nonsense}");
        }
    }

    #[test]
    fn what_was_meant_for_one_process_is_not_passed_on() {
        let role = Role::Successor { incumbent: 7 };
        let environment: Vec<_> = environment(role).collect();
        assert_eq!(environment.iter().filter(|(name, _)| name == VARIABLE).count(), 1);
        assert!(environment.iter().any(|(name, _)| name == "PATH"), "the rest is");
        assert!(is_ours_alone("LISTEN_PID".as_ref()) && !is_ours_alone("LISTEN".as_ref()));
    }

    proptest! {
        #[test]
        fn any_value_is_a_role_or_none(value in prop_oneof![
            any::<Vec<u8>>(),
            "(preflight|successor|in-place):-?[0-9]{0,21}(:[+-]?[0-9]{0,21}){0,2}".prop_map(String::into_bytes),
        ]) {
            if let Some(role) = Role::parse(&OsString::from_vec(value)) {
                prop_assert_eq!(Role::parse(role.to_string().as_ref()), Some(role));
            }
        }
    }
}
