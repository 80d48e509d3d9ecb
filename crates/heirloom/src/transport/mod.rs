//! The ways in which a bundle travels.

pub mod exec;
pub mod socket;
