//! The ways in which a bundle travels.

pub mod socket;
