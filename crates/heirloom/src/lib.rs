//! Heirloom hands a running server's sockets, live connections and state to the process that replaces it: on a restart,
//! an upgrade or a new configuration. Clients notice nothing; no byte is lost, repeated or reordered.
//!
//! A process that serves is an [`Incumbent`]: it answers at a control socket and can be asked for a takeover. One that
//! is to replace it calls [`start`], gets a [`Successor`], and with it everything: first the [`Bundle`] of descriptors
//! and state while the incumbent goes on serving, then, in a short freeze, what has changed since. The takeover is a
//! transaction: either the successor serves everything, or the incumbent goes on as if nothing had happened. Who may
//! touch the descriptors at which moment is decided by two state machines without I/O, in [`protocol`].
//!
//! ```no_run
//! use heirloom::{Bundle, Config, NoRequests, Replace, Service, Start};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let service = Service::new("echo 127.0.0.1:7");
//! let (bundle, incumbent) = match heirloom::start::<NoRequests>(
//!     "/run/echo/echo.sock".as_ref(), service, Config::default(), Replace::Try)?
//! {
//!     Start::Fresh(incumbent) => (Bundle::new(), incumbent),
//!     Start::Successor(successor) => {
//!         let taken = successor.receive()?.ready()?.accept()?;
//!         (taken.bundle, taken.incumbent)
//!     }
//!     Start::InPlace(taken) => (taken.bundle, taken.incumbent),
//!     Start::Preflight(preflight) => return Ok(preflight.pass()?),
//!     Start::Older(_) => return Err("an incumbent of another kind".into()),
//! };
//! // Serve; see `Incumbent` for its part in the event loop.
//! # drop((bundle, incumbent)); Ok(()) }
//! ```
//!
//! Linux only. Sealed memfds need 3.17, pidfds 5.3; SO_PEERPIDFD (6.5) closes the last race in telling who the other
//! process is, and has a fallback.
#![forbid(unsafe_code)]

pub mod bundle;
mod busy_poll;
pub mod channel;
mod clock;
pub mod codec;
pub mod config;
pub mod control;
pub mod courtesy;
#[cfg(feature = "crash-points")]
pub mod crash;
#[cfg(not(feature = "crash-points"))]
mod crash;
pub mod descriptors;
pub mod incumbent;
pub mod item;
pub mod kind;
pub mod limits;
pub mod lock;
pub mod manifest;
pub mod notify;
pub mod peer;
pub mod protocol;
pub mod runtime;
pub mod service;
mod start;
pub mod store;
pub mod transport;
mod unit;
pub mod upgrade;

pub use bundle::{Bundle, BundleError, Taken as TakenItem};
pub use codec::{Cbor, Codec, CodecError};
pub use config::{Config, Delegate, Outsiders, Preflights};
pub use control::request::{NoRequests, VersionRange};
pub use incumbent::{
    Asked, Batch, ConnectionId, Delegated, Freeze, HandoverError, Incumbent, Offer, Outcome, StatusAsked,
    TakenBy, Turn, UpgradeAsked,
};
pub use item::{CONTROL_NAME, Entry, EntryRef, Item, ItemId, RESERVED_PREFIX, Typed};
pub use kind::Kind;
pub use limits::Limits;
pub use service::Service;
pub use start::{Replace, Start, StartError, start};
pub use transport::OlderIncumbent;
pub use transport::socket::{Complete, Lent, Offered, Successor, Taken, TakeoverError};
