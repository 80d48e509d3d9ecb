//! Upgrades: a new program takes the place of the one that serves, at the request of an operator.
//!
//! The incumbent starts the new program itself, so that it gets the same environment, directory and standard streams.
//! An upgrade goes through these stages, and a failure of any of them leaves the incumbent serving:
//!
//! 1. **Preflight.** The new program is started as a child that gets the incumbent's current manifest, without
//!    descriptors. It validates its own configuration, decodes the manifest, answers and ends ([`Preflight`]). Nothing is
//!    frozen. A dry run ends here. A program may [do without](crate::Preflights) where the next stage finds out as much.
//! 2. **Takeover**, the usual case: the new program is started, and takes over by the socket transport.
//!    **In place**, for a program that sits at a terminal or is PID 1: everything is frozen, and the incumbent becomes the
//!    new program by `execve(2)` ([`exec`](crate::transport::exec)).
//!
//! [`Launch`] is what is started, [`Upgrade`] the request for it, and [`ask`] how another process makes that request. A
//! started program learns its part from the variable `HEIRLOOM_UPGRADE`, which [`start`](crate::start()) reads.

mod ask;
mod check;
mod launch;
mod preflight;
mod request;
mod role;

pub use ask::{AskError, Upgraded, ask};
pub use launch::Launch;
pub use preflight::{Preflight, PreflightError};
pub use request::{Checked, Upgrade};

pub(crate) use check::{Check, Finding};
pub(crate) use launch::StartedSuccessor;
pub(crate) use preflight::path_section;
pub(crate) use role::{Role, environment};

/// Whether an incumbent has started this process, to take over or to say whether it could. A program whose configuration is wrong
/// goes on then to [`start`](crate::start()), and says so to the incumbent: by [`Preflight::refuse`] or
/// [`Successor::withdraw`](crate::Successor::withdraw).
///
/// ```
/// assert!(!heirloom::upgrade::is_asked());
/// ```
pub fn is_asked() -> bool {
    matches!(Role::of_this_process(), Some(Role::Preflight { .. } | Role::Successor { .. }))
}
