//! The access log: a line for each connection that has ended.
//!
//! The relay [submits](AccessWriter::submit) an [`AccessRecord`] and never waits for a disk or a reader: a thread of its own
//! writes. When that cannot keep up, lines are dropped, counted, and spoken of; nothing else suffers.

mod queue;
mod record;
mod writer;

pub use record::{AccessRecord, End};
pub use writer::{AccessError, AccessWriter};
