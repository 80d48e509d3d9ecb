//! The control socket: the UNIX stream socket at which an incumbent answers requests.
//!
//! Requests and replies are JSON, one message a line. [`path`] says where the socket is and binds it
//! safely, [`line`](mod@line) cuts a stream into lines, [`request`] has the messages, [`status`] what an incumbent
//! tells about itself, and [`client`] asks. Every request is answered by one line; an application adds
//! requests of its own (see [`Request`]).

pub mod client;
pub mod line;
pub mod path;
pub mod request;
pub mod status;

pub use client::{Client, ClientError};
pub use line::{LineReader, TooLong};
pub use path::PathError;
pub use request::{
    Failure, FailureCode, Hello, ManifestSummary, NoRequests, Reply, Request, RequestError, VersionRange,
    Welcome,
};
pub use status::{ItemStatus, LastTakeover, Status, Supervised};
