//! The exec transport: the incumbent becomes the new program in place, by `execve(2)`. Same pid, same parent, same terminal.
//!
//! Descriptors stay open under their numbers, the service lock among them, so that nobody else can take it; the manifest
//! is in a sealed memfd. A call that fails changes nothing: descriptors are close-on-exec again, signal mask and
//! dispositions as before, and the incumbent serves on. After one that succeeds there is no way back, which is why a
//! [preflight](crate::upgrade) comes first.
//!
//! What travels beside the bundle: the environment (but for `HEIRLOOM_UPGRADE` and systemd's `LISTEN_*`), the working
//! directory, limits, ignored signals. Signals are blocked from the freeze until [`start`](crate::start()) returns in
//! the new program, and wait: a program that installs its handlers before it calls that misses none.
//!
//! All other threads end at once in the call, wherever they are: a program with threads has stopped them by then, as for
//! any freeze. A descriptor that another library opened without close-on-exec stays open too, as always.

mod inherit;
mod record;
mod replace;

pub use inherit::InPlaceError;

pub(crate) use inherit::inherit;
pub(crate) use replace::{Beside, replace};
