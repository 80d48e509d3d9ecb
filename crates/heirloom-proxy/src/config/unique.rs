//! Addresses that may be there only once, however they are written.

use super::{Backend, Listener};
use crate::address::{Address, Place};

/// Why nobody can listen there beside these. A port that is any free one is another each time, but a text with it is the
/// same listener's after a reload.
pub(super) fn listener_address(address: &Address, others: &[Listener]) -> Option<String> {
    let other = others.iter().find(|other| clash(&other.address, address))?;
    Some(format!("the listener {:?} listens at {address} already: leave one of them out", other.name))
}

/// Why there cannot be such a backend beside these.
pub(super) fn backend_address(address: &Address, others: &[Backend]) -> Option<String> {
    let other = others.iter().find(|other| clash(&other.address, address))?;
    Some(format!("the backend {:?} is at {address} already: leave one of them out", other.name))
}

fn clash(one: &Address, other: &Address) -> bool {
    let any_port = matches!(one.place(), Place::Tcp(place) if place.port() == 0);
    one == other || (one.place() == other.place() && !any_port)
}
