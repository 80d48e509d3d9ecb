//! Keeps a program running, and its descriptors: socket activation, an fd store, readiness, watchdog and restart for any
//! program that speaks sd_notify(3), with or without systemd. It may be PID 1 of a container.
//!
//! [`run`] starts a [`Command`] and stays until there is nothing more to run. What the command stores survives its death;
//! the next process gets it in `LISTEN_FDS`, or fetches it. An upgrade at the control socket starts a new version of the
//! command, which takes over or gets the store, and the previous one again if that fails; run itself is upgraded in place,
//! with everything that it holds. Where there is a supervisor above, systemd or another run, that keeps what is held as well, so
//! that it survives a SIGKILL of run; elsewhere that closes it.
//!
//! One thread and one epoll, and nothing that the command or anybody else does is waited for.
//!
//! ```no_run
//! use heirloom_run::{Command, Options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut options = Options::new(Command::new("/usr/sbin/echod", ["--verbose"]));
//! options.listen.push("127.0.0.1:7".parse()?);
//! let code = heirloom_run::run(options)?;
//! std::process::exit(code.into());
//! # }
//! ```
#![forbid(unsafe_code)]

mod above;
mod backoff;
mod clock;
mod error;
pub mod exit;
mod fetch;
mod listen;
mod notify;
mod options;
mod seldom;
mod start;
mod store;
mod supervisor;

pub use error::RunError;
pub use listen::{Address, Listen, ListenError};
pub use options::{Command, Options, Restart, StoreAbove, parse_duration};
pub use supervisor::run;

/// Held while a test starts a process, which has everybody's descriptors until it is a program, and shared by tests that
/// look whether a descriptor is closed everywhere.
#[cfg(test)]
static FORKS: std::sync::RwLock<()> = std::sync::RwLock::new(());
