//! A relay for TCP and UNIX connections that can be replaced with every connection established.
#![forbid(unsafe_code)]

pub mod access;
pub mod address;
pub mod config;
