//! A relay for TCP and UNIX connections that can be replaced with every connection established, and whatever is in flight.
//!
//! An [`Engine`] serves: one event loop a thread, which moves bytes by splice(2) from socket to pipe to socket. It comes from a
//! [`Prepared`], in which everything that costs time was done while an incumbent still served. What the engine hands over, and how
//! it stops for that, is in the terms of the library: a base and a delta, and descriptors that are lent.
#![forbid(unsafe_code)]

pub mod access;
pub mod address;
mod arriving;
mod bound;
mod clock;
pub mod config;
mod connection;
mod door;
mod each;
mod engine;
mod error;
mod event_loop;
mod fair;
mod flow;
mod gate;
mod handover;
mod id;
mod inherited;
mod pipes;
mod plan;
mod prepared;
mod rates;
mod ready;
mod report;
mod shared;
mod socket;
mod table;
mod timers;
mod urgent;

pub use config::Config;
pub use engine::{Engine, Frozen};
pub use error::EngineError;
pub use prepared::Prepared;
pub use ready::Ready;
pub use report::{BackendReport, ListenerReport, Report};
