//! The ways in which a bundle travels.

pub mod exec;
mod protocol0;
pub mod socket;

pub use protocol0::OlderIncumbent;
